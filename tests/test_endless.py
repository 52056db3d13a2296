"""The short version of endless.py, in a process of its own, whose memory is the stream's alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_an_old_stream_is_as_exact_as_a_young_one_and_takes_no_more_memory():
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "stress" / "endless.py", "--tokens", "700",
         "--window", "8", "--turns", "1"], capture_output=True, text=True)
    record = json.loads(done.stdout)
    assert done.returncode == 0 and record["off_by"] < 1e-4 and record["grown_bytes"] < 1e6
    assert record["tokens"] > 700
