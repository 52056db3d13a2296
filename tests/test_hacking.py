"""The worked examples of docs/hacking.md: each diff applies to a copy, and its own test passes."""

import re
import shutil
import subprocess
import sys

import pytest

from helpers import ONE_THREAD, ROOT

PAGE = (ROOT / "docs" / "hacking.md").read_text()
DIFFS = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
NEW_TEST = re.compile(r"^\+\+\+ b/(tests/test_\w+\.py)$", re.MULTILINE)


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository, without what no example needs."""
    folder = tmp_path / "gpt-stream"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "docs", "smollm2*", "published", "tokenizers"))
    return folder


def test_there_are_three():
    assert len(DIFFS) == 3 and all(NEW_TEST.search(diff) for diff in DIFFS)


@pytest.mark.slow
@pytest.mark.parametrize("diff", DIFFS, ids=[NEW_TEST.search(diff)[1] for diff in DIFFS])
def test_an_example_applies_and_its_test_passes(diff, copy):
    for argv, given in ((["git", "apply"], diff),
                        ([sys.executable, "-m", "pytest", NEW_TEST.search(diff)[1]], None)):
        done = subprocess.run(argv, cwd=copy, input=given, capture_output=True, text=True,
                              env=ONE_THREAD)
        assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("diff", DIFFS, ids=[NEW_TEST.search(diff)[1] for diff in DIFFS])
def test_without_the_change_its_test_fails(diff, copy):
    """So that the test is about the change."""
    subprocess.run(["git", "apply", "--exclude=*.py", "--include=tests/test_*"],
                   cwd=copy, input=diff, text=True, check=True)
    done = subprocess.run([sys.executable, "-m", "pytest", NEW_TEST.search(diff)[1]], cwd=copy,
                          capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode != 0
