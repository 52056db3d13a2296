"""guidellm, by its command: ten requests, two at a time, of synthetic text."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from checks import BASE, MODEL, check

report = pathlib.Path(tempfile.mkdtemp()) / "report.json"


def benchmark():
    done = subprocess.run(
        [str(pathlib.Path(sys.executable).with_name("guidellm")), "run",
         "--backend", f"kind=openai_http,target={BASE.removesuffix('/v1')},model={MODEL}",
         "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=10",
         "--data", "kind=synthetic_text,prompt_tokens=20,output_tokens=9",
         "--tokenizer", f"kind=huggingface_auto,model={os.environ['TOKENIZER']}",
         "--output", f"kind=json,path={report}", "--disable-console-interactive"],
        capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    [found] = json.loads(report.read_text())["benchmarks"]
    counts = found["metrics"]["request_totals"]
    if counts["errored"] or counts["successful"] < 9:
        raise RuntimeError(str(counts))
    return True


check("benchmark", benchmark)
