"""Whatever is damaged, a program ends with its output or one line; tests/stress has more."""

import json
import subprocess
import sys

import pytest

from helpers import TINY, run


@pytest.mark.slow
def test_sixty_damaged_checkpoints():
    done = subprocess.run([sys.executable, "tests/stress/fuzz.py", "--cases", "60", "--seed", "1"],
                          cwd=TINY.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ends = json.loads(done.stdout)
    assert ends["output"] + ends["refused"] == 60 and min(ends.values()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("script, argv, lines", [
    ("kills", ["--kills", "1"], 15),  # seven programs, by two signals; two that save one session
    ("disks", ["--sizes", "1", "--limit"], 13)])  # eight programs that write, and five that print
def test_what_is_written_is_what_was_there_or_what_comes(script, argv, lines):
    done = subprocess.run([sys.executable, f"tests/stress/{script}.py", *argv],
                          cwd=TINY.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == lines


def test_what_a_killed_save_left_is_named(tmp_path):
    (tmp_path / "s.partial-77").touch()
    status, _, said = run("chat", "--pin-system", "Be kind.", "--save-session", tmp_path / "s")
    assert status == 0 and str(tmp_path / "s.partial-77") in said
