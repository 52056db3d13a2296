"""A GPU's first minutes: the rows that are worth most, first, each printed as soon as it is there.

    python -m bench.gpu_first                           # 480 s: four models, then tests/test_gpu.py
    python -m bench.gpu_first --seconds 180 --row 7b:bf16:tuned --row 7b:int8:8

A row is SHAPE:KIND, and of these what is wanted: a number of rows, and `tuned`, with the search for
the fastest blocks, which takes minutes. Each row has a process and a time limit of its own, and is
a JSON line; the kernels of a step, and what tests say, go to the folder --out. The tests run in
shards side by side, in what time is left.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.clocks import peak_bytes, seconds
from bench.gpu_figures import (
    SAMPLING,
    TOKENS,
    batch_steps,
    compile_decode,
    decode_seconds,
    device_facts,
    make_limits,
)
from bench.models import SHAPES, random_model, shape_config
from bench.steps import bytes_a_step
from cli import number, plain_parser
from draw import RowSampler
from formats.config import config_from_hf
from generate import make_cache
from load import check_device
from quantize import asked_quantization
from terminal import say, user_errors

ROWS = ["7b:bf16", "7b:int8", "7b:int4", "8b:bf16"]
SHARDS, ROW_SECONDS, WINDOW, ROUNDS = 4, {False: 90, True: 170}, 2044, 5  # by whether it is tuned
KINDS = {"bf16": None, "int8": "int8", "int4": "int4"}


def read_row(text: str) -> dict:
    """The settings of a --row. Raises ValueError naming what is wrong."""
    match = re.fullmatch(r"(\w[\w.]*):(\w+)(?::([1-9]\d*))?(:tuned)?", text)
    if not match or match[1] not in SHAPES or match[2] not in KINDS:
        raise ValueError(f"--row {text!r} is no SHAPE:KIND[:ROWS][:tuned] with a shape of "
                         f"{', '.join(SHAPES)} and a kind of {', '.join(KINDS)}")
    return dict(shape=match[1], kind=match[2], rows=int(match[3] or 1), tuned=bool(match[4]))


# ------------------------------------------------------------------------------ a row, in a process


def measure(shape: str, kind: str, rows: int, tuned: bool, out: Path) -> dict:
    """The figures of a model's step: as it is compiled from nothing, and against a copy's speed."""
    device = torch.device("cuda", 0)
    model = random_model(config_from_hf(shape_config(shape)), device, torch.bfloat16,
                         asked_quantization(KINDS[kind], 32))
    cache = make_cache(model, 4, WINDOW, rows)
    compile_s = seconds(compile_decode, model, cache)
    [copy, _] = make_limits(device)()
    if rows > 1:
        cache.length.fill_(4 + WINDOW)
        steps = [seconds(batch_steps, model, cache, TOKENS) / TOKENS for _ in range(ROUNDS)]
        sampled = None
    else:
        sampler = RowSampler(1, model.config.vocab_size, device)
        sampler.begin(0, SAMPLING, [])
        steps = [decode_seconds(model, cache, 4 + WINDOW) / TOKENS for _ in range(ROUNDS)]
        sampled = TOKENS / decode_seconds(model, cache, 4 + WINDOW, sampler.sample)
    step, read = statistics.median(steps), bytes_a_step(model, cache)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        batch_steps(model, cache, 5)
    table = profile.key_averages().table(sort_by="device_time_total", row_limit=30)
    (out / f"{shape}_{kind}_{rows}{'_tuned' * tuned}.txt").write_text(table)
    return dict(compile_cold_s=compile_s, tok_s=rows / step, step_ms=1e3 * step, step_GB=read / 1e9,
                copy_GB_s=copy, share_of_copy=read / step / 1e9 / copy, sampled_tok_s=sampled,
                spread=[rows / max(steps), rows / min(steps)], peak_GB=peak_bytes(device) / 1e9)


# ------------------------------------------------------------------------------ all of them


def run_row(text: str, out: Path, limit: float) -> dict:
    """A row in a process of its own, which is killed after `limit` seconds."""
    tuned = read_row(text)["tuned"]
    env = {**os.environ, "GPT_STREAM_TUNE": str(int(tuned)),
           "TORCHINDUCTOR_CACHE_DIR": str(out / text.replace(":", "_"))}
    argv = [sys.executable, "-m", "bench.gpu_first", "--out", str(out), "--measure", text]
    try:
        done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return dict(row=text, error=f"no figure within {limit:.0f} s")
    if done.returncode:
        return dict(row=text, error=f"exit status {done.returncode}")
    return dict(row=text, **json.loads(done.stdout))


def run_tests(out: Path, limit: float) -> list[dict]:
    """A row for each shard of the tests that need a GPU: its last line, or what it had done."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    found = subprocess.run([*pytest, "--collect-only", "tests/test_gpu.py"], capture_output=True,
                           text=True).stdout.splitlines()
    tests = [line for line in found if "::" in line]
    shards = [tests[n::SHARDS] for n in range(SHARDS) if tests[n::SHARDS]]
    logs = [out / f"tests_{n}.txt" for n in range(len(shards))]
    running = [subprocess.Popen([*pytest, "-v", *shard], stdout=log.open("w"),
                                stderr=subprocess.STDOUT) for shard, log in zip(shards, logs)]
    deadline, rows = time.monotonic() + limit, []
    for shard, log, process in zip(shards, logs, running):
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
        said = log.read_text()
        rows.append(dict(row=f"tests {log.stem}", asked=len(shard), passed=said.count(" PASSED"),
                         failed=re.findall(r"^(\S+::\S+) (?:FAILED|ERROR)", said, re.M)))
    return rows


def main():
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("--seconds", type=number(int, 30), default=480, metavar="N", help="for all; default 480")
    add("--row", action="append", metavar="ROW", help="instead of four models and the tests")
    add("--out", type=Path, default=Path("gpu_first"), metavar="DIR", help="for tables and logs")
    add("--measure", metavar="ROW", help=argparse.SUPPRESS)
    with user_errors(parser):
        args = parser.parse_args()
        for text in args.row or []:
            read_row(text)
        device = check_device("cuda:0")
        args.out.mkdir(parents=True, exist_ok=True)
        if args.measure:
            print(json.dumps(measure(**read_row(args.measure), out=args.out)))
            return
        deadline = time.monotonic() + args.seconds
        rows = [dict(row="machine", **device_facts(device))]
        print(json.dumps(rows[0]), flush=True)
        for text in args.row or ROWS:
            left = deadline - time.monotonic()
            say(text)
            row = run_row(text, args.out, min(left, ROW_SECONDS[read_row(text)["tuned"]]))
            print(json.dumps(row), flush=True)
        if not args.row:
            for row in run_tests(args.out, deadline - time.monotonic()):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
