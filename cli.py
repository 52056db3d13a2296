"""What the programs' command lines share: arguments, their help, prompt files and figures."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from formats.chat_template import check_args
from formats.tools import Tools, tools_of
from grammar import Grammar
from layers import GROUP_SIZES, MODES
from sample import Sampling
from terminal import say, show
from tokenizer import Tokenizer

EMBEDDED = Path(__file__).parent / "checkpoints" / "tiny"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXAMPLES = "examples:"
# How tokens are drawn where neither a flag nor the model says it; other settings are off.
DEFAULTS = {"temperature": 0.8, "top_p": 0.95}
OWN = "; default: the model's own (generation_config.json), else"


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number from low to high."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= min(high, sys.float_info.max):
            above = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{above}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


class HelpFormatter(argparse.HelpFormatter):
    """Adds every option's default, keeps examples as they are, and never breaks a word, however
    narrow the terminal is. argparse's own formatters override the same underscore methods."""

    def __init__(self, prog: str, **settings):
        columns = min(shutil.get_terminal_size().columns, 100)  # a longer line is hard to read
        super().__init__(prog, **{**settings, "width": columns - 2})

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help, action.default
        if action.required or default == argparse.SUPPRESS or "; default" in text:
            return text
        if isinstance(default, list):
            default = " ".join(map(str, default))
        shown = "off" if default is False else "none" if default in (None, "") else str(default)
        if " " in shown:
            shown = f'"{shown}"'
        shown = shown.replace("%", "%%")  # argparse formats the help with %
        return f"{text}; default {shown}"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_long_words=False,
                             break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLES) else "\n".join(self._split_lines(text, width))


def plain_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a program's docstring: its first paragraph says what the program does,
    its second holds the examples. The first example also gives the program's name."""
    about, examples = doc.split("\n\n")[:2]
    name = re.search(r"python (-m )?(\S+)", examples)
    prog = f"python -m {name[2]}" if name[1] else Path(name[2]).name
    parser = argparse.ArgumentParser(prog, description=about, formatter_class=HelpFormatter,
                                     epilog=f"{EXAMPLES}\n\n{examples.rstrip()}")
    # A help that is longer than a buffer fails while it is written; show says where.
    parser.print_help = lambda file=None: show(parser.format_help())
    return parser


def add_checkpoint(parser: argparse.ArgumentParser, default: str | Path | None = None) -> None:
    """Add --checkpoint. Without a default it is required."""
    parser.add_argument(
        "--checkpoint", default=default, required=default is None, metavar="NAME",
        help="a folder, a .gguf file, smollm2, or org/model[@revision] on the Hugging Face Hub")


def make_parser(doc: str, checkpoint: str | Path = EMBEDDED) -> argparse.ArgumentParser:
    """A parser with the arguments of every program that runs a model. doc is the program's
    docstring, checkpoint the default of --checkpoint."""
    parser = plain_parser(doc)
    add_checkpoint(parser, checkpoint)
    add = parser.add_argument
    add("--adapter", action="append", default=[], metavar="NAME",
        help="a LoRA adapter to merge in: a folder or org/adapter[@revision]; may be repeated")
    add("--window", type=number(int, 1), metavar="W",
        help="latest tokens seen; default: what the sinks leave of the trained context")
    add("--dtype", choices=DTYPES, help="type of the numbers; default: the checkpoint's own")
    add("--device", metavar="D", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    add("--quantize", choices=MODES, help="quantize the weights")
    add("--group-size", type=int, choices=GROUP_SIZES, default=32,
        help="columns of a weight that share an int4 scale")
    return parser


def add_generation(parser: argparse.ArgumentParser, samples=False) -> argparse.ArgumentParser:
    """Add the arguments of every program that generates, and with `samples` --samples."""
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
    add("--temperature", type=number(float, 0), metavar="T",
        help=f"below 1, likely tokens get likelier; 0 takes the likeliest{OWN} "
        f"{DEFAULTS['temperature']}")
    add("--top-k", type=number(int, 1), metavar="K", help=f"only the K likeliest tokens{OWN} all")
    add("--top-p", type=number(float, 0, 1), metavar="P",
        help="only the likeliest tokens that together reach the probability P"
        f"{OWN} {DEFAULTS['top_p']}")
    add("--min-p", type=number(float, 0, 1), metavar="P",
        help=f"only tokens at least P times as likely as the likeliest{OWN} off")
    add("--repetition-penalty", type=number(float, 1e-3), metavar="R",
        help="above 1, what the prompt (in chat: the turn) and the answer say is said less again"
        f"{OWN} off")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N",
        help="where random numbers begin; default: random, reported")
    add("--stop", action="append", default=[], metavar="TEXT", help="end here; may be repeated")
    add("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    add("--json-schema", metavar="FILE", help="answer in JSON that fits the schema in this file")
    add("--regex", metavar="R", help="answer what this regular expression matches as a whole")
    add("--grammar", metavar="FILE", help="answer a sentence of the Lark grammar in this file")
    add("--sink", type=number(int, 0), metavar="S", help="first tokens, never evicted; default 4")
    add("--draft", metavar="NAME",
        help="a smaller model with the same tokenizer, which proposes tokens")
    add("--lookup", action="store_true", help="propose what followed these words before")
    add("--speculate", type=number(int, 1), metavar="K",
        help="tokens proposed a round; default: as many as pay")
    return parser


def add_template_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--template-arg", action="append", default=[], metavar="NAME=VALUE",
        help="what the chat template is given, such as enable_thinking=false; may be repeated")


def template_args_of(args) -> dict:
    """The arguments for the chat template, as the command line says: JSON values where they are
    that, else texts. Raises ValueError naming one that is not NAME=VALUE."""
    values = {}
    for pair in args.template_arg:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--template-arg {pair!r:.80} must be NAME=VALUE")
        check_text("--template-arg", pair)
        try:
            values[name] = json.loads(text)
        except (ValueError, RecursionError):
            values[name] = text
    check_args(values)
    return values


def check_text(source: str, text: str) -> str:
    """The text itself. Raises ValueError, naming the source, when it is empty or not UTF-8."""
    if not text:
        raise ValueError(f"{source} is empty; give it some text")
    try:
        text.encode()
    except UnicodeEncodeError:  # Python keeps undecodable bytes of a command line as surrogates
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
        except ValueError:  # of JSON, or of UTF-8
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


def figures(record: dict) -> str:
    """The figures of a record of generate.answer, as a line to read."""
    speed = f"{record['decode_tok_s']:.1f}" if record["decode_tok_s"] else "-"
    return (f"{record['prompt_tokens']} prompt + {record['new_tokens']} new tokens "
            f"({record['finish_reason']}), first after {record['ttft_s']:.3f} s, "
            f"decode {speed} tok/s, {record['evicted']} evicted, "
            f"cache {record['cache_bytes'] / 1e6:.1f} MB"
            + (f", {record['accepted']} of {record['proposed']} proposals accepted in "
               f"{record['rounds']} rounds" if "rounds" in record else ""))


def load_arguments(args) -> dict:
    """The arguments of `load` from a command line, all but the checkpoint's name."""
    return dict(device=args.device, dtype=DTYPES.get(args.dtype), quantize=args.quantize,
                group_size=args.group_size, adapters=args.adapter)


def sampling_of(args, suggested: dict[str, float]) -> Sampling:
    """How tokens are drawn: as the command line says, else as the model suggests, which is told,
    else as DEFAULTS say."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    taken = {name: value for name, value in suggested.items() if name not in given}
    if args.draft or args.lookup:  # which no penalty goes with
        taken.pop("repetition_penalty", None)
    if {**DEFAULTS, **taken, **given}["temperature"] == 0:  # greedy: there is no more to say
        taken = {name: value for name, value in taken.items()
                 if name in ("temperature", "repetition_penalty")}
    say_suggested(taken)
    return Sampling(**{**DEFAULTS, **taken, **given}, seed=args.seed)


def say_suggested(settings: dict[str, float]) -> None:
    """Say which settings of a model's are in force."""
    if settings:
        said = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items())
        say(f"tokens are drawn as the model's generation_config.json says: {said}")


def grammar_arguments(args) -> tuple[str, dict]:
    """The flag or file that a command line's grammar comes from, and what Grammar takes of it:
    {"schema": ...}, {"regex": ...}, {"lark": ...}, or nothing. Raises ValueError for flags that do
    not go together, and naming a file that holds no text or no JSON, OSError naming one that cannot
    be read."""
    given = {"--json-schema": args.json_schema, "--regex": args.regex, "--grammar": args.grammar}
    flags = [flag for flag, value in given.items() if value is not None]
    if len(flags) > 1:
        raise ValueError(f"{' and '.join(flags)} exclude each other")
    if not flags:
        return "", {}
    if args.draft or args.lookup:
        raise ValueError(f"{flags[0]} works without --draft and --lookup")
    if args.ignore_eos:
        raise ValueError(f"{flags[0]} and --ignore-eos exclude each other: the answer must end")
    if args.json_schema is not None:
        return args.json_schema, {"schema": read_schema(args.json_schema)}
    if args.regex is not None:
        return "--regex", {"regex": check_text("--regex", args.regex)}
    try:
        return args.grammar, {"lark": Path(args.grammar).read_text(encoding="utf-8")}
    except UnicodeDecodeError:
        raise ValueError(f"{args.grammar}: not UTF-8 text") from None


def read_schema(path: str) -> dict:
    """The JSON Schema in a file. Raises ValueError naming the file where it holds none."""
    try:
        schema = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):  # of JSON, or of UTF-8
        raise ValueError(f"{path}: not JSON in UTF-8") from None
    if not isinstance(schema, dict):
        raise ValueError(f"{path}: not a JSON Schema, which is an object")
    return schema


def read_tools(args) -> Tools:
    """The tools in the file that --tools names: OpenAI's list of them, as JSON. Raises ValueError
    naming the file, and for flags that do not go with them."""
    path, tools = args.tools, None
    if flag := grammar_arguments(args)[0]:
        raise ValueError(f"--tools and {flag} exclude each other")
    try:
        tools = tools_of(json.loads(Path(path).read_bytes()), None, None)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path}: not JSON in UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if tools is None:
        raise ValueError(f"{path}: no tools in it")
    if tools.strict and (args.draft or args.lookup):
        raise ValueError(f"{path}: strict functions work without --draft and --lookup")
    return tools


def make_grammar(source: str, asked: dict, tokenizer: Tokenizer, vocab_size: int,
                 stop_ids: Collection[int]) -> Grammar | None:
    """The grammar of grammar_arguments, if any, of answers that one of stop_ids ends. Raises
    ValueError naming where it comes from."""
    if not asked:
        return None
    try:
        grammar = Grammar(tokenizer, vocab_size, **asked)
        grammar.check_fits(vocab_size, stop_ids)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return grammar


def speculation_arguments(args) -> dict:
    """What generate.open_speculation takes of a command line. Raises ValueError for flags that do
    not go together."""
    if args.draft and args.lookup:
        raise ValueError("--draft and --lookup exclude each other")
    if args.speculate and not (args.draft or args.lookup):
        raise ValueError("--speculate goes with --draft or --lookup")
    if args.draft or args.lookup:
        for flag in ("samples", "repetition_penalty"):
            if getattr(args, flag, None) not in (None, 1):
                raise ValueError(f"--{flag.replace('_', '-')} works without --draft and --lookup")
    return dict(draft=args.draft, lookup=args.lookup, size=args.speculate, device=args.device,
                dtype=DTYPES.get(args.dtype), compile=args.compile,
                compile_prefill=args.compile_prefill)
