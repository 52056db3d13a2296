"""formats/files.py: files and folders are written whole or not at all."""

import errno
import os

import pytest
import safetensors

from formats.files import atomic_write, make_once


def make_folder(path, *names):
    path.mkdir(0o700)
    for name in names:
        (path / name).write_text(name)
        (path / name).chmod(0o600)


def permissions(path):
    return path.stat().st_mode & 0o777


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_takes_the_place_of_an_older_one(tmp_path):
    path = tmp_path / "a[1].txt"
    path.write_text("older")
    with atomic_write(path) as partial:
        partial.write_text("newer")
        assert partial.parent == tmp_path and partial.name.startswith("a[1].txt.partial-")
        assert path.read_text() == "older"
    assert path.read_text() == "newer" and os.listdir(tmp_path) == [path.name]


def test_a_folder_is_there_at_once_with_the_permissions_of_the_umask(tmp_path, umask):
    with atomic_write(tmp_path / "out") as partial:
        make_folder(partial, "a", "b")
        assert os.listdir(tmp_path) == [partial.name]
    assert os.listdir(tmp_path) == ["out"]
    assert permissions(tmp_path / "out") == 0o750
    assert {permissions(path) for path in (tmp_path / "out").iterdir()} == {0o640}
    assert os.umask(0o027) == 0o027


def test_a_file_keeps_the_permissions_that_it_was_made_with(tmp_path, umask):
    """A session holds a conversation, which others must not read."""
    with atomic_write(tmp_path / "it.session") as partial:
        partial.touch(0o600)
    assert permissions(tmp_path / "it.session") == 0o600


@pytest.mark.parametrize("error", [ValueError("a.gguf: damaged"), KeyboardInterrupt(),
                                   SystemExit(143)])
@pytest.mark.parametrize("make", [make_folder, lambda path: path.touch(), lambda path: None])
def test_an_exception_leaves_nothing_and_goes_on(tmp_path, error, make):
    (tmp_path / "out").write_text("older")
    with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "out") as partial:
        make(partial)
        raise error
    assert caught.value is error
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "older"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"),
                                   safetensors.SafetensorError("No space left\non the disk")])
def test_a_full_disk_is_one_line_that_names_the_path(tmp_path, error):
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "out"):
        raise error
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'out'}: cannot be written: ") and "No space left" in said
    assert len(said.splitlines()) == 1 and os.listdir(tmp_path) == []


def test_a_path_is_named_once_and_never_by_its_partial_name(tmp_path):
    with (pytest.raises(OSError) as caught, atomic_write(tmp_path / "out") as outer,
          atomic_write(outer) as inner):
        raise OSError(errno.ENOSPC, "No space left", str(inner / "config.json"))
    assert str(caught.value) == (f"{tmp_path / 'out'}: cannot be written: [Errno {errno.ENOSPC}] "
                                 f"No space left: '{tmp_path / 'out' / 'config.json'}'")


def test_a_folder_is_made_once(tmp_path):
    made = []

    def make(path):
        make_folder(path, "a")
        path.with_name(path.name + ".download").mkdir()
        made.append(path)

    for _ in range(2):
        assert make_once(tmp_path / "out", make) == tmp_path / "out"
    assert len(made) == 1 and sorted(os.listdir(tmp_path)) == [".out.lock", "out"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    def make(path):
        make_folder(path, "a")
        raise OSError(errno.ENOSPC, "No space left")

    with pytest.raises(ValueError) as caught:
        make_once(tmp_path / "out", make)
    assert str(caught.value) == (f"{tmp_path / 'out'}: cannot be written: [Errno {errno.ENOSPC}] "
                                 "No space left")
    assert os.listdir(tmp_path) == [".out.lock"]
