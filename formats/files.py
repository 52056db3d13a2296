"""Writing a file or a folder whole or not at all, and reading small ones."""

from __future__ import annotations

import contextlib
import glob
import importlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import safetensors

log = logging.getLogger("gpt_stream")


def read_json(path: Path) -> dict:
    """The JSON object in a file; {} when there is no such file. Raises ValueError naming a file
    that holds no JSON object."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is needed, not {type(content).__name__}")
    return content


def check_keys(raw: dict, kinds: dict[str, tuple], needed: Iterable[str] = ()) -> None:
    """Check the values of a JSON object. kinds gives each key's type with the least and the
    greatest number, or for an object the kinds of its own keys. A float may be written as an
    integer. A null counts as missing. Raises ValueError naming the key, the value, and what would
    be right."""
    for key, (kind, low, high) in kinds.items():
        value = raw.get(key)
        if value is None and key not in needed:
            continue
        fits = type(value) in ((int, float) if kind is float else (kind,))
        if fits and kind is dict:
            check_keys(value, low)
        elif not fits or kind in (int, float) and not low <= value <= high:
            what = {bool: "true or false", dict: "an object",
                    int: f"an integer from {low} to {high}",
                    float: f"a number from {low} to {high}", list: "a list"}[kind]
            raise ValueError(f"{key} is {value!r:.80}; it must be {what}")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file or a folder whole or not at all. This yields a name beside `path`: the caller
    makes the file or the folder there, and it then takes the place of `path`, a folder with the
    permissions that the umask gives. After an exception nothing of it is left. Raises OSError,
    in one line that names `path`, when the disk refuses a write."""
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    try:  # a signal may raise SystemExit in any of these lines
        yield partial
        if partial.is_dir():
            set_permissions(partial)
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:  # save_file raises the latter
        line = first_line(error).replace(str(partial), str(path))
        raise OSError(naming(path, line)) from None
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def set_permissions(folder: Path) -> None:
    """Give a folder and its files what the umask allows: save_file makes files private."""
    mask = os.umask(0o077)  # setting it is the only way to read it
    os.umask(mask)
    for path in (folder, *folder.iterdir()):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def naming(path: Path, line: str) -> str:
    """An error's line, begun with the path unless it is so already, by a write within another."""
    return line if line.startswith(f"{path}: ") else f"{path}: cannot be written: {line}"


def name_leftovers(path: Path) -> None:
    """Log which partial files and folders killed runs left beside `path` (atomic_write)."""
    for left in path.parent.glob(glob.escape(path.name) + ".partial-*"):
        log.info("%s is left of a run that was killed, or is being written now; if not, remove it",
                 left)


def check_target(path: str | Path) -> Path:
    """The path as a Path. Raises ValueError when no file can be written there."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():  # a file would take the place of a device
        raise ValueError(f"{path}: exists already and is not a file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: no permission to write in {path.parent}")
    return path


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder. If it is not there, make(path) makes it first, at the path it is given, whole or
    not at all. Of several processes one makes it, and the others wait. What make leaves beside
    that path, under a longer name, is removed. Raises ValueError, in one line that names the
    folder, when it cannot be written."""
    leftovers = glob.escape(folder.name) + ".partial-*"
    if folder.is_dir() and not any(folder.parent.glob(leftovers)):
        return folder

    def remove_leftovers() -> None:
        for path in folder.parent.glob(leftovers):
            shutil.rmtree(path, ignore_errors=True)

    try:
        folder.parent.mkdir(exist_ok=True)
        with file_lock(folder.with_name(f".{folder.name}.lock")):
            remove_leftovers()  # of a run that was killed
            if not folder.is_dir():
                try:
                    with atomic_write(folder) as partial:
                        make(partial)
                finally:
                    remove_leftovers()  # again: the pip of a killed run may have gone on
    except OSError as error:
        if not folder.is_dir():
            raise ValueError(naming(folder, first_line(error))) from None
    return folder


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """A lock on the file `path`, which is made for it: one process at a time is in this context.
    The system frees the lock when that process dies."""
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl: of two first starts at once, one may fail
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process, which is making %s", path.name[1:-5])
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def import_optional(module: str, name: str | Path):
    """Import an optional package, which `name` needs. Raises ValueError with the command that
    installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{name} needs {module}: pip install {module}") from None
