"""kill -9 while something is written: what was there is whole, what comes is whole or absent.

    python tests/kills.py --kills 50 --seed 7

Each of convert_hf, convert_gguf, quantize and a session's save is run in a forked process and
killed at random moments of the time that it takes. Then the folder or file has to be, byte for
byte, what it was before or what an undisturbed run leaves, and the next run has to end well and to
name what the killed one left beside it.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from fuzz import in_a_fork
from fuzz_kinds import SHORT, make_kinds

PROGRAMS = {
    "convert_hf": ["{made}/llama", "{tmp}/out"],
    "convert_gguf": ["{made}/gguf-llama/model.gguf", "{tmp}/out"],
    "quantize": ["--checkpoint", "{made}/llama", "--mode", "int4", "--out", "{tmp}/out"],
    "chat": ["--checkpoint", "{made}/ours", "--prompts", "{made}/turns.jsonl", *SHORT,
             "--load-session", "{tmp}/it.session", "--save-session", "{tmp}/it.session"]}


def held(folder: Path) -> dict[str, bytes]:
    """What is at the target, a folder or a session's file."""
    paths = [folder / "it.session", *folder.glob("out/*")]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def kill(program: str, made: Path, kills: int, rng: random.Random) -> dict[str, int]:
    """How often the target was afterwards as before, or as after; raises AssertionError."""
    def run(seconds: float | None = None) -> tuple[int, str]:
        argv = [str(a).format(made=made, tmp=folder) for a in PROGRAMS[program]]
        return in_a_fork(folder, program, argv, seconds)

    counts = {"before": 0, "after": 0, "left something": 0}
    for number in range(-1, kills):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if program == "chat":
                shutil.copy(made / "session" / "it.session", folder)
            if number < 0:  # undisturbed
                before, began = held(folder), time.perf_counter()
                status, said = run()
                took, after = time.perf_counter() - began, held(folder)
                assert status == 0 and before != after, said
                continue
            run(rng.uniform(0, took))
            now = held(folder)
            assert now in (before, after), f"{program}: {sorted(now)}, half-written"
            counts["after" if now == after else "before"] += 1
            left = list(folder.glob("*.partial-*"))
            counts["left something"] += bool(left)
            if now == before:
                status, said = run()
                assert status == 0 and held(folder) == after, said
                assert all(not path.exists() or str(path) in said for path in left), said
    return counts


def main():
    from cli import plain_parser  # which fuzz has made reachable
    parser = plain_parser(__doc__)
    parser.add_argument("--kills", type=int, default=50, metavar="N",
                        help="how often each program is killed")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="where random numbers begin")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        make_kinds(Path(made))
        for program in PROGRAMS:
            counts = kill(program, Path(made), args.kills, random.Random(args.seed))
            print(json.dumps({"program": program, **counts}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
