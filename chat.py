"""An endless conversation: it never resets, and each turn prefills only its own tokens.

    python chat.py --compile
    python chat.py --prompts mt_bench.jsonl --limit 20
    python chat.py --save-session cats.session
    python chat.py --load-session cats.session      # goes on with it, another day

Typed, or all turns of a file as one conversation, as in SwiftInfer and StreamingLLM. The cache
keeps the sinks and the latest tokens, so memory and the time to a turn's first token stay constant.

A long system turn can be read once and begin every conversation: saved before anything was said,
a session holds the pinned system turn alone.

    python chat.py --pin-system "$(cat rules.txt)" --save-session rules.session < /dev/null
    python chat.py --pin-system "$(cat rules.txt)" --load-session rules.session

With --tools the model may call functions. A call is shown, and the next typed line is its result.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cli import (
    add_generation,
    add_template_args,
    check_text,
    figures,
    grammar_arguments,
    load_arguments,
    make_grammar,
    make_parser,
    number,
    read_prompts,
    read_tools,
    sampling_of,
    speculation_arguments,
    template_args_of,
)
from formats.files import check_target, name_leftovers
from formats.session import load_session, save_session
from formats.tool_calls import Form, Reader, find_ability, form_of_calls, hidden_marks
from formats.tools import Tools, grammar_of_calls
from generate import (
    answer,
    chat_stop_ids,
    check_ids,
    discard,
    get_ready,
    make_cache,
    open_model,
    open_speculation,
    prefill,
    timed_prefill,
)
from kv_cache import KVCache
from model import Transformer
from sample import Sampling
from speculate import Speculation
from terminal import hold_interrupt, received_signals, say, show, user_errors
from tokenizer import Tokenizer
from tp import broadcast_text, n_ranks, rank

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (input() then edits lines and remembers them)

HELP = ("/reset forgets everything, /save FILE keeps the conversation, /load FILE goes on with it, "
        "/quit or Ctrl-D leaves, Ctrl-C stops an answer" if n_ranks() == 1 else
        "/reset forgets everything, /quit leaves, Ctrl-C ends all")


def typed_lines() -> Iterator[str]:
    """Lines from the terminal or a pipe, until /quit or the end. Under torchrun rank 0 reads them
    and tells the other ranks."""
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal:
        say(HELP)
    prompt, line = "> " if terminal and sys.stdout.isatty() else "", ""
    while line not in ("/quit", "/exit"):
        if line:
            yield line
        try:
            line = broadcast_text(input(prompt).strip() if rank() == 0 else "")
        except EOFError:
            line = broadcast_text("/quit")
        except KeyboardInterrupt:
            say(f"\n{HELP}")
            line = ""


def turns_of(entries: list[dict], limit: int | None) -> list[tuple[str, bool]]:
    """The turns of a prompts file, all or the first `limit`: each a text and whether it is raw,
    that is, goes to the model without the chat template."""
    turns = []
    for entry in entries:
        if "prompt" in entry:
            turns.append((entry["prompt"], True))
        else:
            turns += [(text, False) for text in entry["turns"]]
    return turns[:limit]


@dataclass
class Conversation:
    """A conversation: the model and what it remembers, and what ends an answer."""

    model: Transformer
    tokenizer: Tokenizer
    cache: KVCache
    speculation: Speculation | None
    system: str | None  # the pinned system turn's text
    last_id: int | None = None  # the last token of the latest answer
    max_new_tokens: int = 512
    stop: Sequence[str] = ()  # texts
    ignore_eos: bool = False
    template_args: dict = field(default_factory=dict)  # what else the chat template is given
    tools: Tools | None = None  # that the model may call
    form: Form | None = None  # of its calls
    calls: list[dict] = field(default_factory=list)  # of the latest answer, waiting for results
    results: list[dict] = field(default_factory=list)  # of these calls, as messages

    def caches(self) -> dict[str, tuple[Transformer, KVCache]]:
        """The caches by name, each with its model, as formats.session.save_session takes them."""
        caches = {"model": (self.model, self.cache)}
        if self.speculation and self.speculation.draft:
            caches["draft"] = self.speculation.draft, self.speculation.cache
        return caches


def turn_ids(talk: Conversation, text: str, raw: bool) -> list[int]:
    """The ids that a turn adds to the cache. Before the first answer the cache holds nothing, or
    the pinned system turn."""
    held = int(talk.cache.length)
    if raw:
        return talk.tokenizer.encode(text, bos=not held)
    if talk.results:  # what stands before the answer is in the cache, and is not rendered
        turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
        return talk.tokenizer.turns_after([*turns, *talk.results], 1, talk.last_id,
                                          talk.template_args)
    if not held or talk.last_id is None and talk.system:
        ids = talk.tokenizer.first_turn(text, talk.system, talk.template_args, pinned=held > 0)
        return ids[held:]
    return talk.tokenizer.next_turn(text, talk.last_id, talk.template_args)


def reset_conversation(talk: Conversation) -> None:
    talk.cache.reset()
    if talk.speculation:
        talk.speculation.reset()
    talk.last_id = None
    talk.calls, talk.results = [], []


def save_conversation(path: str | Path, talk: Conversation) -> None:
    """Save the conversation to a file; before its first turn, the pinned system turn alone."""
    check_target(path)
    if not talk.cache.length.any():
        if talk.system is None:
            raise ValueError(f"{path}: not written, since nothing has been said yet")
        ids = talk.tokenizer.system_turn(talk.system, talk.template_args)
        prefill(talk.model, talk.cache, ids, talk.speculation)
    unread, caches = talk.speculation.unread if talk.speculation else [], talk.caches()
    if talk.speculation and not talk.speculation.size:
        caches.pop("draft", None)  # the draft has not read on since speculation stopped
    save_session(path, caches, system=talk.system, template_args=talk.template_args or None,
                 last_id=talk.last_id, unread=unread)
    say(f"saved {path}: {int(talk.cache.length)} tokens so far")
    name_leftovers(Path(path))


def load_conversation(path: str | Path, talk: Conversation) -> None:
    """Go on with a conversation that was saved to a file."""
    facts = load_session(path, talk.caches(), system=talk.system,
                         template_args=talk.template_args or None)
    talk.last_id = facts.get("last_id")
    talk.calls, talk.results = [], []
    if talk.speculation:
        talk.speculation.restart(facts.get("unread") or [])
    say(f"loaded {path}: {int(talk.cache.length)} tokens so far")
    if not all(cache.length.any() for _, cache in talk.caches().values()):
        say("the draft begins anew: the session holds none like it")


def run_command(line: str, talk: Conversation) -> None:
    """Do what a typed command says. A command that fails changes nothing and is told in a line."""
    command, *paths = line.split(maxsplit=1)
    try:
        if command == "/reset":
            reset_conversation(talk)
        elif command == "/help":
            say(HELP)
        elif n_ranks() > 1:
            raise ValueError(f"{command} works without torchrun")
        elif not paths:
            raise ValueError(f"{command} needs a file: {command} FILE")
        else:
            path = Path(paths[0]).expanduser()  # no shell has expanded it
            if command == "/save":
                save_conversation(path, talk)
            else:
                load_conversation(path, talk)
    except (ValueError, OSError, RuntimeError) as error:
        say(str(error).splitlines()[0])


def take_turn(talk: Conversation, text: str, raw: bool, is_typed: bool, sampling: Sampling,
              emit: Callable[[str], None]) -> dict | None:
    """Answer one turn, or if it is a typed command, do what it says. Returns the answer's figures,
    or None where nothing was answered."""
    if not is_typed:
        say(f"\n> {text}")
    elif text in ("/reset", "/help") or text.split()[0] in ("/save", "/load"):
        run_command(text, talk)
        return None
    if talk.calls and take_result(talk, text):
        return None
    try:
        ids = turn_ids(talk, check_text("the turn", text), raw)
        check_ids(talk.model, ids)
    except ValueError as error:
        if not is_typed:
            raise
        say(str(error).splitlines()[0])  # and the conversation goes on
        return None
    prompt = timed_prefill(talk.model, talk.cache, ids, talk.speculation)
    stop_ids = talk.model.config.eos_ids if raw else chat_stop_ids(talk.model, talk.tokenizer)
    reader, marks = None, None
    if talk.tools:
        reader = Reader(talk.form, talk.tools.functions, sure=sampling.grammar is not None)
        marks = hidden_marks(talk.form, talk.tokenizer)
    record = answer(talk.model, talk.tokenizer, prompt, talk.max_new_tokens, sampling,
                    stop=talk.stop, stop_ids=() if talk.ignore_eos else stop_ids,
                    emit=lambda text: emit(reader.add(text)[0] if reader else text), marks=marks,
                    speculation=talk.speculation)
    talk.last_id = record["token_ids"][-1]
    if reader:
        emit(reader.end(cut=record["finish_reason"] != "eos")[0])
        record = {**record, "text": reader.content, "tool_calls": reader.calls}
        expect_results(talk, record, emit)
    return record


def expect_results(talk: Conversation, record: dict, emit: Callable[[str], None]) -> None:
    """Show an answer's calls, whose results are typed next. A call that was cut has none."""
    for call in record["tool_calls"]:
        said = call["function"]
        emit(f"{chr(10) * bool(record['text'])}{said['name']}({said['arguments']})")
    talk.results, talk.calls = [], record["tool_calls"] if record["finish_reason"] == "eos" else []
    ask_for_result(talk)


def ask_for_result(talk: Conversation) -> None:
    if len(talk.results) < len(talk.calls):
        say(f"the result of {talk.calls[len(talk.results)]['function']['name']}?")


def take_result(talk: Conversation, text: str) -> bool:
    """Take a typed line as the result of a call. True while there are more to be typed."""
    call = talk.calls[len(talk.results)]
    talk.results.append({"role": "tool", "tool_call_id": call["id"], "content": text,
                         "name": call["function"]["name"]})
    ask_for_result(talk)
    return len(talk.results) < len(talk.calls)


def converse(talk: Conversation, turns: Iterable[tuple[str, bool]], is_typed: bool,
             sampling: Sampling, as_json: bool, compile_s: float) -> list[dict]:
    """Take the turns (text, whether it is raw) until they or the program end, and print each
    answer. An answer's seed is that of the Sampling plus its number. Returns the figures of all."""
    records = []
    with contextlib.suppress(SystemExit):  # raised by a signal; the conversation is saved first
        for text, raw in turns:
            with hold_interrupt():  # half a turn must not be saved
                n = len(records)
                record = take_turn(talk, text, raw, is_typed,
                                   replace(sampling, seed=sampling.seed + n),
                                   discard if as_json else show)
                if record is not None:
                    record = {"turn": n, **record, "compile_s": compile_s}
                    show((json.dumps(record) if as_json else "") + "\n")
                    say(f"turn {n}: {figures(record)}")
                    records.append(record)
            if received_signals:
                break
    return records


def totals(records: list[dict]) -> str:
    """A whole conversation's figures, for people, in one line."""
    waits = sorted(record["ttft_s"] for record in records)
    decoding = sum((r["new_tokens"] - 1) / r["decode_tok_s"] for r in records if r["decode_tok_s"])
    decoded = sum(r["new_tokens"] - 1 for r in records if r["decode_tok_s"])
    return (f"{len(records)} turns, {sum(r['prompt_tokens'] for r in records)} prompt + "
            f"{sum(r['new_tokens'] for r in records)} new tokens, decode "
            f"{decoded / decoding if decoding else 0:.1f} tok/s, first token after "
            f"{waits[len(waits) // 2]:.3f} s (median), {waits[-1]:.3f} s (worst), "
            f"{records[-1]['evicted']} evicted, cache {records[-1]['cache_bytes'] / 1e6:.1f} MB")


def main():
    parser = add_generation(make_parser(__doc__, checkpoint="smollm2"))
    add = parser.add_argument
    add("--prompts", metavar="FILE",
        help="what to say, a JSON object a line; default: what is typed")
    add("--limit", type=number(int, 1), metavar="N",
        help="of --prompts, the first N turns only; default: all")
    add("--pin-system", metavar="TEXT", help="a system turn that is never evicted")
    add_template_args(parser)
    add("--tools", metavar="FILE", help="functions that the model may call: OpenAI's list of them "
        "as JSON; what they return is typed")
    add("--save-session", metavar="FILE", help="keep the conversation at its end")
    add("--load-session", metavar="FILE", help="go on with one that was kept")
    with user_errors(parser):
        args = parser.parse_args()
        speculating, asked = speculation_arguments(args), grammar_arguments(args)
        if args.limit and not args.prompts:
            raise ValueError("--limit goes with --prompts")
        if n_ranks() > 1 and (args.save_session or args.load_session):
            raise ValueError("--save-session and --load-session work without torchrun")
        if args.tools and args.prompts:
            raise ValueError("--tools works without --prompts: what functions return is typed")
        if args.save_session:
            check_target(args.save_session)  # fail before the conversation, not after it
        turns = turns_of(read_prompts(args.prompts), args.limit) if args.prompts else None
        stop = [check_text("--stop", stop_text) for stop_text in args.stop]
        template_args = template_args_of(args)
        tools = read_tools(args) if args.tools else None
        if tools:
            template_args["tools"] = list(tools.tools)
        model, tokenizer = open_model(args.checkpoint, compile=args.compile,
                                      compile_prefill=args.compile_prefill, **load_arguments(args))
        form = form_of_calls(find_ability(tokenizer.chat_template), "--tools") if tools else None
        n_sink = args.sink
        if args.pin_system is not None:
            if args.sink is not None:
                raise ValueError("--pin-system decides the number of sinks; leave --sink out")
            if turns and any(raw for _, raw in turns):
                raise ValueError('--pin-system needs a template: {"prompt": ...} lines have none')
            check_text("--pin-system", args.pin_system)
            n_sink = len(tokenizer.system_turn(args.pin_system, template_args))
        raw = turns and any(raw for _, raw in turns)
        ends = model.config.eos_ids if raw else chat_stop_ids(model, tokenizer)
        grammar = make_grammar(*asked, tokenizer, model.config.vocab_size, ends)
        if tools and tools.strict:
            grammar = grammar_of_calls(tools, form, tokenizer, model.config.vocab_size)
        cache = make_cache(model, n_sink, args.window)
        speculation = open_speculation(model, cache, tokenizer, **speculating)
        how = replace(sampling_of(args, model.suggested), grammar=grammar)
        compile_s, how = get_ready(model, cache, how, speculation)
        talk = Conversation(model, tokenizer, cache, speculation, args.pin_system,
                            max_new_tokens=args.max_new_tokens, stop=stop,
                            ignore_eos=args.ignore_eos, template_args=template_args, tools=tools,
                            form=form)
        if args.load_session:
            load_conversation(args.load_session, talk)
        is_typed = turns is None
        if is_typed:
            turns = ((line, False) for line in typed_lines())
        records = converse(talk, turns, is_typed, how, args.json, compile_s)
        if args.save_session:
            with hold_interrupt():
                save_conversation(args.save_session, talk)
    if records:
        say(f"{totals(records)}, seeds from {records[0]['seed']} on")


if __name__ == "__main__":
    main()
