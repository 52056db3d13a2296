"""A full disk: one line that names the file, status 2, nothing half-written, the older file whole.

    python tests/stress/disks.py --sizes 20
    python tests/stress/disks.py --only gptq --limit

Every program that writes is run with its target on a disk of its own, in memory, that is too small
for it, in as many sizes. Where that is not allowed (see `unshare -Urm`), and with --limit, the
system keeps files from growing beyond a size instead. Then every program that prints is run with
its output to /dev/full.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from fuzz import how_it_ended, in_a_fork
from fuzz_kinds import SHORT, make_kinds
from kills import PROGRAMS, TEXT, held, left, open_sources, start, undisturbed, workplace

PAGE = 4096
TINY = ["--checkpoint", "{made}/ours", "--device", "cpu"]
EVAL = ["eval", *TINY, "--text", TEXT, "--max-tokens", 50]
PROGRAMS["eval"] = [*EVAL, "--plot", "{disk}/plot.png"]
NAMING = {"download": "org/model: "}  # the others name the file
TOLD = [*TINY, *SHORT, "--prompts", "{made}/turns.jsonl"]
PRINTING = {"generate": ["generate", *TINY, *SHORT], "chat": ["chat", *TOLD],
            "batch": ["batch", *TOLD], "eval": EVAL, "hub": ["formats.hub", "{made}/ours"]}


def fill(program: str, made: Path, sizes: int, rng: random.Random, limit: bool) -> Counter:
    """Each last line of a program, and how often it came. Raises AssertionError for another ending.
    """
    before, after, _ = undisturbed(program, made)
    used = sum(-(-len(content) // PAGE) for content in before.values())
    need = sum(-(-len(content) // PAGE) for content in after.values())
    lines = Counter()
    for at in range(sizes):
        # On every second disk only the last files do not fit.
        room = rng.randrange(1, need) if at % 2 else need - rng.randrange(1, min(4, need))
        # The file that is refused may be the largest one or a temporary one.
        most = PAGE if at % 2 else rng.randrange(PAGE, max(map(len, after.values())))
        most = most if limit else resource.RLIM_INFINITY
        with workplace(program, made, None if limit else (used + room) * PAGE) as folder:
            status, said = start(program, made, folder, prepare=partial(
                resource.setrlimit, resource.RLIMIT_FSIZE, (most, most)))
            assert how_it_ended(status, said, PROGRAMS[program][0]) == "refused", (room, most, said)
            assert program == "download" or held(folder) == before, room  # one by one
            assert not left(folder), (room, most, left(folder))
            line = said.splitlines()[-1]
            assert NAMING.get(program, str(folder)) in line, line
            lines[line.replace(str(folder), "").replace(str(made), "")] += 1
    return lines


def print_to_a_full_disk(program: str, made: Path) -> str:
    """The last line of a program that cannot print."""
    name, *argv = [str(a).format(made=made) for a in PRINTING[program]]
    with tempfile.TemporaryDirectory() as folder:
        status, said = in_a_fork(Path(folder), name, argv, prepare=lambda: os.dup2(
            os.open("/dev/full", os.O_WRONLY), 1))
    assert how_it_ended(status, said, name) == "refused" and "stdout: " in said, said
    return said.splitlines()[-1]


def main():
    from cli import number, plain_parser  # fuzz has set sys.path
    parser = plain_parser(__doc__)
    parser.add_argument("--sizes", type=number(int, 1), default=20, metavar="N",
                        help="disks for each program")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="where random numbers begin")
    parser.add_argument("--only", choices=PROGRAMS, help="fill this one's disk; default: all")
    parser.add_argument("--limit", action="store_true", help="limit the size of files instead")
    args = parser.parse_args()
    apart = ["unshare", "--user", "--map-root-user", "--mount"]  # with mounts of its own
    if not args.limit and "DISKS_APART" not in os.environ:
        args.limit = not shutil.which(apart[0]) or subprocess.run(
            [*apart, "true"], stderr=subprocess.DEVNULL).returncode != 0
        if not args.limit:
            os.execvpe(apart[0], [*apart, sys.executable, *sys.argv],
                       {**os.environ, "DISKS_APART": "1"})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        make_kinds(made)
        open_sources(made)
        for program in [args.only] if args.only else PROGRAMS:
            lines = fill(program, made, args.sizes, random.Random(args.seed), args.limit)
            print(json.dumps({"program": program, "limit": args.limit, **lines}), flush=True)
        for program in PRINTING if os.path.exists("/dev/full") and not args.only else ():
            print(json.dumps({"prints": program, print_to_a_full_disk(program, made): 1}))


if __name__ == "__main__":
    main()
