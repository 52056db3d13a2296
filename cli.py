"""What the programs' command lines share: arguments, one-line errors, prompt files, signals."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import tp
from convert_hf import DTYPES
from linear import adapt_threads, keep_threads
from session import name_leftovers

EMBEDDED = Path(__file__).parent / "checkpoints" / "tiny"
EXAMPLES = "examples:"
# The signals that asked the program to end, the first of which it ends by, and those that may ask.
ending: list[int] = []
heeded: list[int] = []


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number from low to high."""

    def read(text: str):
        value = kind(text)
        if not low <= value <= min(high, sys.float_info.max):
            above = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{above}")
        return value

    read.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return read


class HelpFormatter(argparse.HelpFormatter):
    """Says every option's default, keeps examples as they are, and every word whole, however narrow
    the terminal is. (Methods with an underscore are how argparse's own formatters are made.)"""

    def __init__(self, prog: str, **how):
        columns = min(shutil.get_terminal_size().columns, 100)  # a longer line is hard to read
        super().__init__(prog, **{**how, "width": columns - 2})

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help, action.default
        if action.required or default == argparse.SUPPRESS or "; default" in text:
            return text
        if isinstance(default, list):
            default = " ".join(map(str, default))
        said = "off" if default is False else "none" if default in (None, "") else str(default)
        said = (f'"{said}"' if " " in said else said).replace("%", "%%")
        return f"{text}; default {said}"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_long_words=False,
                             break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLES) else "\n".join(self._split_lines(text, width))


def plain_parser(doc: str) -> argparse.ArgumentParser:
    """A parser that takes its help from a program's docstring: what comes first says what the
    program does, then come its examples, which also name it."""
    about, examples = doc.split("\n\n")[:2]
    name = re.search(r"python (-m )?(\S+)", examples)
    prog = f"python -m {name[2]}" if name[1] else Path(name[2]).name
    return argparse.ArgumentParser(prog, description=about, formatter_class=HelpFormatter,
                                   epilog=f"{EXAMPLES}\n\n{examples.rstrip()}")


def add_checkpoint(parser: argparse.ArgumentParser, default: str | Path | None = None) -> None:
    """--checkpoint, which has to be given where it has no default."""
    parser.add_argument(
        "--checkpoint", default=default, required=default is None, metavar="NAME",
        help="a folder, a .gguf file, smollm2, or org/model[@revision] on the Hugging Face Hub")


def make_parser(doc: str, checkpoint: str | Path = EMBEDDED) -> argparse.ArgumentParser:
    """A parser with what every program takes that runs a model; doc is the program's docstring,
    checkpoint its default."""
    parser = plain_parser(doc)
    add_checkpoint(parser, checkpoint)
    add = parser.add_argument
    add("--adapter", action="append", default=[], metavar="NAME",
        help="a LoRA adapter to merge in: a folder or org/adapter[@revision]; may be repeated")
    add("--window", type=number(int, 1), metavar="W",
        help="latest tokens seen; default: what the sinks leave of the trained context")
    add("--dtype", choices=DTYPES, help="type of the numbers; default: the checkpoint's own")
    add("--device", metavar="D", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    add("--quantize", choices=["int8", "int4"], help="quantize the weights")
    add("--group-size", type=int, choices=[32, 64, 128], default=32,
        help="columns of a weight that share an int4 scale")
    return parser


def add_generation(parser: argparse.ArgumentParser, samples=False) -> argparse.ArgumentParser:
    """What every program takes that generates, some of them several answers to one prompt."""
    add = parser.add_argument
    if samples:
        add("--samples", type=number(int, 1), default=1, metavar="N",
            help="answers to a prompt, with seeds that count up")
    add("--json", action="store_true", help="JSON on stdout")
    add("--max-new-tokens", type=number(int, 1), default=512, metavar="N",
        help="an answer's tokens, at most")
    add("--compile", action="store_true", help="compile the model for this machine first")
    add("--compile-prefill", action="store_true",
        help="compile how prompts are read, too: worth it for long ones")
    add("--temperature", type=number(float, 0), default=0.8, metavar="T",
        help="below 1, likely tokens get likelier; 0 takes the likeliest")
    add("--top-k", type=number(int, 1), metavar="K", help="only the K likeliest tokens")
    add("--top-p", type=number(float, 0, 1), default=0.95, metavar="P",
        help="only the likeliest tokens that together reach the probability P")
    add("--min-p", type=number(float, 0, 1), metavar="P",
        help="only tokens at least P times as likely as the likeliest")
    add("--repetition-penalty", type=number(float, 1e-3), default=1.0, metavar="R",
        help="above 1, what the prompt (in chat: the turn) and the answer say is said less again")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N",
        help="where random numbers begin; default: random, reported")
    add("--stop", action="append", default=[], metavar="TEXT", help="end here; may be repeated")
    add("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    add("--sink", type=number(int, 0), metavar="S", help="first tokens, never evicted; default 4")
    add("--draft", metavar="NAME",
        help="a smaller model with the same tokenizer, which proposes tokens")
    add("--lookup", action="store_true", help="propose what followed these words before")
    add("--speculate", type=number(int, 1), metavar="K",
        help="tokens proposed a round; default: as many as pay")
    return parser


@contextlib.contextmanager
def user_errors(parser: argparse.ArgumentParser):
    """End the program with one line and status 2 for what the user gave, and quietly when nobody
    reads its output any more, or on a signal. What the engine logs meanwhile is said."""
    open_streams()
    tp.behave_as_rank()
    adapt_threads()
    log, handler, said = logging.getLogger("gpt_stream"), logging.Handler(), set()

    def once(record: logging.LogRecord) -> None:  # a draft may be like its model
        if (line := record.getMessage()) not in said or record.levelno > logging.INFO:
            said.add(line)
            say(line)

    handler.emit = once
    log.addHandler(handler)
    # There is no flag for it: what is asked for in float32 is computed in float32.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores for float32")
    log.setLevel(logging.INFO)
    try:
        with end_on_signals():
            try:
                yield
            except Exception as error:
                if not ending:
                    raise
                # Of saving, before the end; or what C code, calling Python, makes of SystemExit.
                fail(parser, unwritten() or str(error) or type(error).__name__)
            finally:
                sys.stdout.flush()  # what fails at this is said here, and not by Python at its end
            tp.part()
            if ending:
                sys.exit(128 + ending[0])
    except BrokenPipeError:
        drop_output()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        if sys.flags.dev_mode:  # python -X dev: whoever changes the code wants to see where
            raise
        if tp.local_rank() == 0 or not isinstance(error, ValueError):  # once a machine
            fail(parser, unwritten() or str(error) or type(error).__name__)
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
        keep_threads()
        ending.clear()
        heeded.clear()
        log.removeHandler(handler)


class Lossy(io.FileIO):
    """A stream that drops what it cannot write."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def open_streams() -> None:
    """Open what a shell closed (`2>&-`), to nowhere: a file opened later would get its number, and
    what is printed. What stderr cannot take is dropped: a full disk, or a terminal that has gone,
    must not stop the work. The Hub's bars take several lines, which need a cursor that moves."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    if sys.stderr is sys.__stderr__:  # and nobody listens in
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(Lossy(2, "w", closefd=False)), line_buffering=True,
            encoding=getattr(sys.stderr, "encoding", None), errors="backslashreplace")
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR"):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def fail(parser: argparse.ArgumentParser, message: str) -> None:
    line = message.splitlines()[0]
    line = line if len(line) <= 600 else f"{line[:450]} ... {line[-100:]}"
    sys.stderr.write(f"{parser.prog}: error: {line}\n")


def unwritten() -> str | None:
    """What keeps stdout from being written, as a full disk; None where nothing does."""
    try:
        sys.stdout.flush()
    except OSError as error:
        drop_output()
        return f"stdout: {error.strerror}"


def drop_output() -> None:
    """Or Python would try to write to stdout again when it ends, and say so in its own words."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    that waits for another could not run it: there they end every process (tp.behave_as_rank)."""
    stack = contextlib.ExitStack()
    for kind in kinds if tp.n_ranks() == 1 else ():
        if (before := signal.getsignal(kind)) != signal.SIG_IGN:
            signal.signal(kind, handler)
            stack.callback(signal.signal, kind, before or signal.SIG_DFL)  # None is of C code
    return stack


def end_on_signals() -> contextlib.ExitStack:
    """SIGTERM and SIGHUP raise SystemExit in this context, and so leave nothing half-written. Once:
    what they interrupt may be cleaning up already. A third one is obeyed at once, if none is held.
    """
    def end(signal_number, frame):
        ending.append(signal_number)
        if len(ending) == 1:
            sys.exit(128 + signal_number)
        if len(ending) > 2:
            os._exit(128 + signal_number)

    heeded[:] = ending_signals()
    return on_signals(heeded, end)


@contextlib.contextmanager
def hold_interrupt():
    """Collect Ctrl-C in the list that this yields instead of raising it: half a step would leave
    the cache's length and its slots apart. A second one is raised as usual. What ends the program
    is collected too, and in `ending`; so is what came before, in a hold around this one."""
    caught = list(ending)

    def note(signal_number, frame):
        if signal_number != signal.SIGINT:
            ending.append(signal_number)
        elif caught:
            raise KeyboardInterrupt
        caught.append(signal_number)

    with on_signals([signal.SIGINT, *heeded], note):
        yield caught


def say(line: str) -> None:
    if tp.rank() == 0:
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(doing: str, unit: str) -> Iterator[Callable[..., None]]:
    """How far long work is: yields show(count, total=None, note=""), to be called at each step.

    On a terminal that is one moving line; elsewhere, and on a dumb one, a plain line every ten
    seconds, and the last. Under torchrun rank 0 shows it for all."""
    try:
        from tqdm import tqdm
    except ImportError:  # then nothing is shown
        yield lambda count, total=None, note="": None
        return
    plain, said = not sys.stderr.isatty() or os.environ.get("TERM") == "dumb", []

    def write(text: str) -> None:  # what tqdm would write over and over on one line, a line each
        if (line := text.strip()) and line not in said[-1:]:
            said.append(line)
            sys.stderr.write(f"{line}\n")

    lines = types.SimpleNamespace(flush=sys.stderr.flush, write=write)
    with tqdm(desc=doing, unit=f" {unit}", miniters=1, mininterval=10 if plain else 0.1,
              delay=1e-9, dynamic_ncols=True, leave=False, disable=tp.rank() > 0,
              file=lines if plain else sys.stderr) as bar:
        def show(count: int, total: int | None = None, note: str = "") -> None:
            bar.total, bar.leave = total, True  # of what never began, nothing is left
            if plain:
                of = f" of {total}" if total else ""
                bar.bar_format = f"{{desc}}: {count}{of} {unit}, {{elapsed}} passed{{postfix}}"
            bar.set_postfix_str(note, refresh=False)
            bar.update(count - bar.n)
        yield show


def wrote(path: Path) -> None:
    say(f"wrote {path}")
    name_leftovers(path)


def show(text: str) -> None:
    """Write to stdout at once, above progress bars. Raises OSError naming it, as on a full disk.
    When it is a terminal that has closed, the SIGHUP that comes of it may come later than this:
    what that signal ends, ends."""
    bar = getattr(sys.modules.get("tqdm"), "tqdm", None)
    try:
        with bar.external_write_mode() if bar else contextlib.nullcontext():
            sys.stdout.write(text)
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        if error.errno != errno.EIO:
            raise OSError(f"stdout: {error.strerror}") from None
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
