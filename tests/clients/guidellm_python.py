"""guidellm, by its command: ten requests, two at a time, of synthetic text."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from checks import BASE, MODEL, check

folder = pathlib.Path(tempfile.mkdtemp())


def benchmark():
    done = subprocess.run(
        [str(pathlib.Path(sys.executable).with_name("guidellm")), "benchmark", "run", "--target",
         BASE.removesuffix("/v1"), "--model", MODEL, "--profile", "concurrent", "--rate", "2",
         "--max-requests", "10", "--data", os.environ["PROMPTS"], "--outputs", "json",
         "--output-dir", str(folder), "--processor", os.environ["TOKENIZER"]],
        capture_output=True, text=True)
    [path] = folder.glob("*.json")
    [report] = json.loads(path.read_text())["benchmarks"]
    counts = report["metrics"]["request_totals"]
    if done.returncode or counts["errored"]:
        raise RuntimeError(f"{counts} {done.stderr[-300:]}")
    return counts["successful"] == 10


check("benchmark", benchmark)
