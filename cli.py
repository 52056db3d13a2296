"""What the programs' command lines share: arguments, one-line errors, prompt files, signals."""

from __future__ import annotations

import argparse
import contextlib
import errno
import glob
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

import tp
from convert_hf import DTYPES

EMBEDDED = Path(__file__).parent / "checkpoints" / "tiny"
ending: list[int] = []  # the signal that ends the program: at once, or once it is held no more


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number from low to high."""

    def read(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            above = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{above}")
        return value

    read.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return read


def make_parser(doc: str, checkpoint: str | Path = EMBEDDED) -> argparse.ArgumentParser:
    """A parser with what every program takes; doc is the program's docstring, checkpoint its
    default."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", default=checkpoint, metavar="NAME",
        help="a folder, a .gguf file, smollm2, or org/model[@revision] on the Hugging Face Hub; "
        "default %(default)s")
    add("--adapter", action="append", default=[], metavar="NAME",
        help="a LoRA adapter to merge in: a folder or org/adapter[@revision]; may be repeated")
    add("--window", type=number(int, 1), metavar="W",
        help="latest tokens seen; default: what the sinks leave of the trained context")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    add("--device", metavar="D", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    add("--quantize", choices=["int8", "int4"], help="quantize the weights while loading")
    add("--group-size", type=int, choices=[32, 64, 128], default=32,
        help="weights that share an int4 scale; default 32")
    add("--json", action="store_true", help="JSON on stdout")
    return parser


def add_generation(parser: argparse.ArgumentParser, samples=False) -> argparse.ArgumentParser:
    """What every program takes that generates, some of them several answers to one prompt."""
    add = parser.add_argument
    if samples:
        add("--samples", type=number(int, 1), default=1, metavar="N",
            help="answers to a prompt, with seeds that count up; default 1")
    add("--max-new-tokens", type=number(int, 1), default=512, metavar="N", help="default 512")
    add("--compile", action="store_true", help="compile the model for this machine first")
    add("--compile-prefill", action="store_true",
        help="compile how prompts are read, too: worth it for long ones")
    add("--temperature", type=number(float, 0), default=0.8, metavar="T",
        help="0 is greedy; default 0.8")
    add("--top-k", type=number(int, 1), metavar="K")
    add("--top-p", type=number(float, 0, 1), default=0.95, metavar="P", help="default 0.95")
    add("--min-p", type=number(float, 0, 1), metavar="P",
        help="only tokens at least P times as likely as the likeliest")
    add("--repetition-penalty", type=number(float, 1e-3), default=1.0, metavar="R",
        help="above 1, what the prompt (in chat: the turn) and the answer say is said less again")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N", help="default: random, reported")
    add("--stop", action="append", default=[], metavar="TEXT", help="end here; may be repeated")
    add("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    add("--sink", type=number(int, 0), metavar="S", help="first tokens, never evicted; default 4")
    add("--draft", metavar="NAME", help="a smaller model that proposes tokens")
    add("--lookup", action="store_true", help="propose what followed these words before")
    add("--speculate", type=number(int, 1), metavar="K",
        help="tokens proposed a round; default: as many as pay")
    return parser


@contextlib.contextmanager
def user_errors(parser: argparse.ArgumentParser):
    """End the program with one line and status 2 for what the user gave, and quietly when nobody
    reads its output any more, or on a signal. What the engine logs meanwhile is said."""
    log, handler = logging.getLogger("gpt_stream"), logging.Handler()
    handler.emit = lambda record: say(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with end_on_signals():
            yield
            show("")
            tp.part()
            if ending:
                sys.exit(128 + ending[0])
    except BrokenPipeError:
        drop_output(sys.stdout)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        if tp.local_rank() == 0 or not isinstance(error, ValueError):  # once a machine
            fail(parser, str(error) or type(error).__name__)
        sys.exit(2)
    except RuntimeError as error:
        if "allocate memory" in str(error):  # of a CPU
            fail(parser, str(error).partition("] . ")[2] or str(error))
            sys.exit(2)
        if tp.n_ranks() == 1:
            raise
        fail(parser, f"rank {tp.rank()}: a process was lost, or failed: {error}")
        sys.exit(1)
    finally:
        log.removeHandler(handler)


def fail(parser: argparse.ArgumentParser, message: str) -> None:
    line = message.splitlines()[0]
    line = line if len(line) <= 600 else f"{line[:450]} ... {line[-100:]}"
    try:
        sys.stderr.write(f"{parser.prog}: error: {line}\n")
    except OSError:  # nobody can be told
        drop_output(sys.stderr)


def drop_output(stream: TextIO) -> None:
    """Or Python would try to write it again when it ends, and say so in its own words."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_text(source: str, text: str) -> str:
    """The text itself. Raises ValueError, naming the source, when it is empty or not UTF-8."""
    if not text:
        raise ValueError(f"{source} is empty; give it some text")
    try:
        text.encode()
    except UnicodeEncodeError:  # how Python keeps undecodable bytes of a command line
        raise ValueError(f"{source} is not UTF-8 text") from None
    return text


def read_prompts(path: str) -> list[dict]:
    """The lines of a JSON Lines file: each {"prompt": text} or {"turns": [text, ...]}, as in
    MT-Bench's question.jsonl. Raises ValueError naming the file and the line."""
    with open(path, "rb") as file:
        lines = [(n, line) for n, line in enumerate(file, 1) if line.strip()]
    entries = []
    for n, line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # not UTF-8 is one too
            raise ValueError(f"{path}, line {n}: not a line of JSON in UTF-8") from None
        try:
            texts = [entry["prompt"]] if "prompt" in entry else entry["turns"]
        except (TypeError, KeyError):
            texts = None
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(
                f'{path}, line {n}: needs {{"prompt": text}} or {{"turns": [text, ...]}}')
        for text in texts:
            check_text(f"{path}, line {n}: the prompt", text)
        entries.append(entry)
    if not entries:
        raise ValueError(f"{path}: no prompts in it")
    return entries


def ending_signals() -> list[int]:
    """What asks a program to end: SIGTERM, and the SIGHUP of a terminal that closes. One that was
    ignored when the program began, as under nohup, stays so."""
    kinds = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))  # one is not Windows'
    return [kind for kind in kinds if kind and signal.getsignal(kind) != signal.SIG_IGN]


def on_signals(kinds: list[int], handler: Callable) -> contextlib.ExitStack:
    """A context in which these signals have a handler. Under torchrun they have none, since a rank
    that waits for another could not run it: there they end every process (see tp.start)."""
    stack = contextlib.ExitStack()
    for kind in kinds if tp.n_ranks() == 1 else ():
        stack.callback(signal.signal, kind, signal.signal(kind, handler))
    return stack


def end_on_signals() -> contextlib.ExitStack:
    """SIGTERM and SIGHUP raise SystemExit in this context, and so leave nothing half-written. Once:
    what they interrupt may be cleaning up already."""
    def end(signal_number, frame):
        ending.append(signal_number)
        if len(ending) == 1:
            sys.exit(128 + signal_number)

    ending.clear()
    return on_signals(ending_signals(), end)


@contextlib.contextmanager
def hold_interrupt():
    """Collect Ctrl-C in the list that this yields instead of raising it: half a step would leave
    the cache's length and its slots apart. A second one is raised as usual. What ends the program
    is collected too, and in `ending`."""
    caught = []

    def note(signal_number, frame):
        if signal_number != signal.SIGINT:
            ending.append(signal_number)
        elif caught:
            raise KeyboardInterrupt
        caught.append(signal_number)

    with on_signals([signal.SIGINT, *ending_signals()], note):
        yield caught


def say(line: str) -> None:
    if tp.rank() == 0:
        put(f"{line}\n", sys.stderr)


def wrote(path: Path) -> None:
    say(f"wrote {path}")
    name_leftovers(path)


def name_leftovers(path: Path) -> None:
    """Say what killed runs left beside a folder or file that is written whole or not at all."""
    for left in path.parent.glob(glob.escape(path.name) + ".partial-*"):
        say(f"{left} is left of a run that was killed, or is being written now; if not, remove it")


def show(text: str) -> None:
    put(text, sys.stdout)


def put(text: str, stream: TextIO) -> None:
    """Write at once. Raises OSError naming the stream, as on a full disk. A terminal that has
    closed is told by SIGHUP, and sooner by this."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output(stream)
        if error.errno != errno.EIO:
            raise OSError(f"{stream.name.strip('<>')}: {error.strerror}") from None
        signal.raise_signal(signal.SIGHUP)


def figures(record: dict) -> str:
    """A record of generate.answer, for people."""
    speed = f"{record['decode_tok_s']:.1f}" if record["decode_tok_s"] else "-"
    return (f"{record['prompt_tokens']} prompt + {record['new_tokens']} new tokens "
            f"({record['finish_reason']}), first after {record['ttft_s']:.3f} s, "
            f"decode {speed} tok/s, {record['evicted']} evicted, "
            f"cache {record['cache_bytes'] / 1e6:.1f} MB"
            + (f", {record['accepted']} of {record['proposed']} proposals accepted in "
               f"{record['rounds']} rounds" if "rounds" in record else ""))
