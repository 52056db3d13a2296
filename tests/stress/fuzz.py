"""Damaged checkpoints, adapters and sessions: a program ends with its output or with one line.

    python tests/stress/fuzz.py --cases 1000 --seed 7
    python tests/stress/fuzz.py --only session --keep path/to/last-case

A case is a small checkpoint of some kind with one to three changes: bytes changed, cut or inserted,
values of a JSON file or of a safetensors header replaced, a file gone or in another's place. It is
given to a program in a process forked from this one, which has to end with its output, or with one
line and status 2, within 20 s of CPU and 2 GB. Prints the cases that end otherwise; the same seed
makes the same cases.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # whose threads would not survive a fork
STRESS = Path(__file__).parent
sys.path[:0] = [str(STRESS.parent.parent), str(STRESS.parent), str(STRESS)]

import torch  # noqa: E402
from fuzz_kinds import KINDS, make_kinds  # noqa: E402
from tqdm import tqdm  # noqa: E402

from cli import plain_parser  # noqa: E402
from formats import hub  # noqa: E402

tqdm.set_lock(threading.RLock())  # forks would share its own, and a killed one keep it
SECONDS, GROWTH = 20, 2 << 30
WAITED = 120  # seconds by the clock, on a busy machine
INTEGERS = (0, 1, -1, 2, 7, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1)


# ------------------------------------------------------------------------------ changes


def odd_value(rng: random.Random, old):
    """Another value in place of a JSON value."""
    values = [None, True, False, "", "x", "\0", "\ud800", "{{", [], {}, [[]], [None], {"": 0}, 0.5,
              -0.0, 1e-320, 1e308, float("nan"), float("inf"), "a" * 100_000, "../../etc/passwd",
              -(2**63), 2**64, 10**30, 10**400, Deep(rng.choice((50, 100_000))), *INTEGERS]
    if isinstance(old, (int, float)):
        values += 2 * [-old, old + 1, old - 1, old * 2, old // 2, float(old), str(old), [old]]
    if isinstance(old, (str, list)):
        values += 3 * [old + old, old[:-1], old[1:], old[::-1], [old], {"a": old}]
    return rng.choice(values)


class Deep(list):
    """Lists in lists, nested too deeply for json to write."""

    def __init__(self, depth: int):
        self.depth = depth


def write_json(content) -> str:
    def plain(value):
        if isinstance(value, Deep):
            marks.append("[" * value.depth + "]" * value.depth)
            return f"\0deep{len(marks) - 1}"
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    marks = []
    text = json.dumps(plain(content))
    for number, nested in enumerate(marks):
        text = text.replace(f'"\\u0000deep{number}"', nested)
    return text


def change_json(rng: random.Random, content):
    """The same JSON with a value replaced, or a key removed, renamed or added, at any depth."""
    sites = []  # (container, key)

    def walk(value, depth):
        for key in (value if isinstance(value, dict) else range(len(value))):
            sites.append((depth, value, key))
            if isinstance(value[key], (dict, list)) and len(sites) < 5000:
                walk(value[key], depth + 1)

    if not isinstance(content, (dict, list)) or rng.random() < 0.03:
        return odd_value(rng, content)
    walk(content, 0)
    if not sites:
        return odd_value(rng, content)
    level = rng.randint(0, max(depth for depth, _, _ in sites))
    _, value, key = rng.choice([site for site in sites if site[0] == level])
    way = rng.random()
    if way < 0.75:
        value[key] = odd_value(rng, value[key])
    elif way < 0.85:
        del value[key]
    elif isinstance(value, dict):
        other = rng.choice(list(value))
        value[key if way < 0.93 else str(odd_value(rng, key))[:1000]] = value[other]
    else:
        value.append(rng.choice(value))
    return content


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut or inserted, in half of the cases near the beginning."""
    at = rng.randrange(min(len(data), rng.choice((16, 64, 512, 4096, 1 << 40))) or 1)
    length = rng.choice((1, 1, 2, 4, 8, 64, 1000))
    way = rng.randrange(8)
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + data[at + length:]
    if way == 2:
        return data[:at] + rng.randbytes(length) + data[at:]
    if way == 3:
        return data[:at] + data[at:at + length] * 3 + data[at + length:]
    if way == 4:
        return data[:at] + rng.randbytes(length) + data[at + length:]
    if way == 5 and data:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    if way == 6:
        return data[:at] + rng.choice((b"\0", b"\xff")) * length + data[at + length:]
    width, number = rng.choice(((4, "<I"), (8, "<Q"))), rng.choice(INTEGERS)
    return data[:at] + struct.pack(width[1], number % 2**(8 * width[0])) + data[at + width[0]:]


def change_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A changed header of the right length, or odd numbers in place of some stored ones."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    if rng.random() < 0.75:
        if rng.random() < 0.3 and "__metadata__" in header:  # a session's is JSON in JSON
            inner = header["__metadata__"]
            key = rng.choice(list(inner))
            with contextlib.suppress(ValueError):
                inner[key] = write_json(change_json(rng, json.loads(inner[key])))
        else:
            header = change_json(rng, header)
        new = write_json(header).encode()
        return len(new).to_bytes(8, "little") + new + data[8 + size:]
    entry = rng.choice([e for name, e in header.items() if name != "__metadata__"])
    begin, end = (8 + size + offset for offset in entry["data_offsets"])
    odd = rng.choice((b"\0\0\xc0\x7f", b"\x00\x7e\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f",
                      b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\x7b\xff\xfb"))
    end = min(end, begin + rng.choice((4, 64, 1 << 30)))
    return data[:begin] + odd * ((end - begin) // 4) + data[begin + (end - begin) // 4 * 4:]


def change_file(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    if rng.random() < 0.7:
        # An earlier change may have made it no JSON, or given it another shape.
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError,
                                 RecursionError):
            if path.suffix == ".json":
                path.write_text(write_json(change_json(rng, json.loads(data))))
                return
            if path.suffix == ".safetensors":
                path.write_bytes(change_safetensors(rng, data))
                return
    path.write_bytes(change_bytes(rng, data))


def change_folder(rng: random.Random, folder: Path) -> str:
    """Change one of its files. Returns the file's name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return "nothing"
    path, other = rng.choice(files), rng.choice(files)
    way = rng.random()
    if way > 0.04:
        change_file(rng, path)
    elif way > 0.02:
        path.write_bytes(other.read_bytes())
    else:
        path.unlink()
        if way > 0.01:
            path.mkdir()
    return path.name


# ------------------------------------------------------------------------------ one case


def run_case(kind: str, made: Path, seed: str, changed: bool = True,
             keep: Path | None = None) -> tuple[str, str]:
    """(how a case ended, what it said). It ended with "output" or "refused"; anything else is
    wrong."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / "case"
        shutil.copytree(made / kind, folder)
        n_changes = rng.choice((1, 1, 2, 3)) if changed else 0
        names = [change_folder(rng, folder) for _ in range(n_changes)]
        argv = rng.choice(KINDS[kind]) if changed else KINDS[kind][0]
        program, *argv = [str(a).format(case=folder, made=made, tmp=temporary) for a in argv]
        if keep:
            shutil.copytree(folder, keep, dirs_exist_ok=True)
        status, said = in_a_fork(Path(temporary), program, argv)
        left = [path.name for path in Path(temporary).rglob("*partial-*")]
        end = how_it_ended(status, said, program)
        if end == "refused" and (left or (Path(temporary) / "out").exists()):
            end = f"leaves {left or 'a folder'}"
        return end, f"{kind} {'+'.join(names)}: {program} {' '.join(argv)}\n{said}"


def in_a_fork(temporary: Path, program: str, argv: list[str], seconds: float | None = None,
              by: int = signal.SIGKILL, prepare=lambda: None) -> tuple[int, str]:
    """(wait status, stderr) of a program's main in a child of this process, prepared there, which
    may be killed after some seconds."""
    errors = temporary / "stderr"
    errors.write_text("")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(os.open(temporary / "stdout", os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            limit(temporary)
            prepare()
            sys.argv = [f"{program}.py", *argv]
            importlib.import_module(program).main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, by)
    status = os.waitpid(pid, 0)[1]
    return status, errors.read_text(errors="replace")


def limit(temporary: Path) -> None:
    """The limits of a case, in the child: the system ends what goes beyond."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GROWTH, used + GROWTH))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WAITED)
    faulthandler.enable()
    hub.CHECKPOINTS = temporary / "checkpoints"
    tempfile.tempdir = str(temporary)


def how_it_ended(status: int, said: str, program: str) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hung = number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL)
        return "hangs" if hung else f"dies of {signal.Signals(number).name}"
    lines = said.strip().splitlines()
    command = f"python -m {program}" if "." in program else f"{program}.py"
    errors = [line for line in lines if line.startswith(f"{command}: error: ")]
    if any(word in said for word in ("Traceback", "panicked", "Error in")):
        return "traceback: " + (lines[-1] if lines else "")[:60]
    code = os.WEXITSTATUS(status)
    if code == 0:
        return "output"
    if code != 2 or errors != lines[-1:]:
        return f"status {code}, {len(errors)} lines of error"
    return "refused" if len(errors[0]) < 1000 else "a line too long to read"


# ------------------------------------------------------------------------------ all of them


def fuzz(n_cases: int, seed: int, only: str | None = None, keep: Path | None = None) -> Counter:
    """How many cases ended how; says which ended badly. The unchanged ones come first, and have to
    end with their output."""
    torch.set_num_threads(1)
    ends = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        make_kinds(made)
        gc.freeze()  # the collector would copy pages shared with the children
        kinds = [kind for kind in KINDS if only in (None, kind)]
        cases = [(kind, "unchanged") for kind in kinds]
        cases += [(kinds[i % len(kinds)], f"{seed}-{i}") for i in range(n_cases)]
        for number, (kind, name) in enumerate(cases):
            end, said = run_case(kind, made, name, name != "unchanged", keep)
            if end not in ("output", "refused") or name == "unchanged" != end == "refused":
                print(f"--- {name}: {end}\n{said}", flush=True)
                end = "bad"
            ends["unchanged" if (name, end) == ("unchanged", "output") else end] += 1
            if number % 100 == 99:
                print(f"{number + 1}: {dict(ends)}", file=sys.stderr, flush=True)
    return ends


def main():
    parser = plain_parser(__doc__)
    parser.add_argument("--cases", type=int, default=60, metavar="N",
                        help="how many cases are tried")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="where random numbers begin")
    parser.add_argument("--only", choices=KINDS, metavar="KIND",
                        help=f"cases of one kind: {', '.join(KINDS)}; default: all kinds in turn")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the last case's files here")
    args = parser.parse_args()
    ends = fuzz(args.cases, args.seed, args.only, args.keep)
    print(json.dumps(ends))
    sys.exit(1 if ends["bad"] else 0)


if __name__ == "__main__":
    main()
