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
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors

log = logging.getLogger("gpt_stream")


def read_json(path: Path) -> dict:
    """A JSON object, {} when there is no such file. Raises ValueError naming a broken one."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is needed, not {type(content).__name__}")
    return content


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which then takes its place: whole or not at all. Raises
    OSError naming the path."""
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        os.replace(partial, path)
    except (safetensors.SafetensorError, OSError) as error:  # a full disk is either
        raise OSError(f"{path}: cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def name_leftovers(path: Path) -> None:
    """Log what killed runs left beside a folder or file that is written whole or not at all."""
    for left in path.parent.glob(glob.escape(path.name) + ".partial-*"):
        log.info("%s is left of a run that was killed, or is being written now; if not, remove it",
                 left)


def check_target(path: str | Path) -> Path:
    """The path itself. Raises ValueError when no file can be written there."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise ValueError(f"{path}: exists already and is not a file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: no permission to write in {path.parent}")
    return path


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made first if it is not there: make(temporary) leaves it in temporary/"made".
    A kill at any moment leaves no half of one. Raises ValueError naming the folder."""
    partial = folder.name + ".partial-"
    left = glob.escape(partial) + "*"  # by one that was killed
    if folder.is_dir() and not any(folder.parent.glob(left)):
        return folder

    def clean() -> None:
        for path in folder.parent.glob(left):
            shutil.rmtree(path, ignore_errors=True)

    try:
        folder.parent.mkdir(exist_ok=True)
        with only_one(folder.with_name(f".{folder.name}.lock")):
            clean()
            if not folder.is_dir():
                temporary = folder.with_name(partial + secrets.token_hex(4))
                try:  # a signal may come in any line
                    temporary.mkdir(0o700)
                    make(temporary)
                    os.replace(temporary / "made", folder)
                finally:
                    clean()  # again: the pip of a run that was killed may have gone on
    except (OSError, safetensors.SafetensorError) as error:
        if not folder.is_dir():
            raise ValueError(f"{folder}: not written: {first_line(error)}") from None
    return folder


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """One process at a time is inside, and the system lets the next one in when it dies."""
    try:
        import fcntl
    except ImportError:  # Windows: of two first starts at once, one may fail
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
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def package(module: str, name: str | Path):
    """An optional package. Raises ValueError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{name} needs {module}: pip install {module}") from None
