"""An endless conversation: it never resets, and each turn prefills only its own tokens.

    python chat.py --compile
    python chat.py --prompts mt_bench.jsonl --limit 20
    python chat.py --save-session cats.session                  and another day, to go on:
    python chat.py --load-session cats.session --save-session cats.session

Typed, or all turns of a file as one conversation, as in SwiftInfer and StreamingLLM. The cache
keeps the sinks and the latest tokens, so memory and the time to a turn's first token stay constant.

A long system turn can be read once and begin every conversation: saved before anything was said,
a session holds the pinned system turn alone.

    python chat.py --pin-system "$(cat rules.txt)" --save-session rules.session < /dev/null
    python chat.py --pin-system "$(cat rules.txt)" --load-session rules.session
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cli import (add_generation, check_text, figures, make_parser, number, read_prompts, say, show,
                 user_errors)
from generate import answer, get_ready, make_cache, open_model, open_speculation, prefill
from kv_cache import KVCache, check_target, load_session, save_session
from model import Transformer
from speculate import Speculation
from tokenizer import Tokenizer

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (input() then edits lines and remembers them)

HELP = ("/reset forgets everything, /save FILE keeps the conversation, /load FILE goes on with it, "
        "/quit or Ctrl-D leaves, Ctrl-C stops an answer")


def typed() -> Iterator[str]:
    """Lines from the terminal, or from a pipe."""
    terminal = sys.stdin.isatty()
    if terminal:
        say(HELP)
    while True:
        try:
            line = input("> " if terminal and sys.stdout.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say(f"\n{HELP}")
            continue
        if line == "/quit":
            return
        if line:
            yield line


def from_file(entries: list[dict], limit: int | None) -> list[tuple[str, bool]]:
    """Every turn of a prompts file: (text, whether it is raw, that is, without the template)."""
    turns = [(text, "prompt" in entry) for entry in entries
             for text in ([entry["prompt"]] if "prompt" in entry else entry["turns"])]
    return turns[:limit]


@dataclass
class Conversation:
    """Who talks, what is remembered, and where it stands."""

    model: Transformer
    tokenizer: Tokenizer
    cache: KVCache
    speculation: Speculation | None
    system: str | None  # the pinned system turn
    last_id: int | None = None  # the last token of the latest answer

    def caches(self) -> dict[str, tuple[Transformer, KVCache]]:
        """As kv_cache.save_session takes them."""
        generator = get_ready(model, cache, args, speculation)
        talk = Conversation(model, tokenizer, cache, speculation, args.pin_system)
        if args.load_session:
            load(args.load_session, talk)

        records = []
        for text, raw in turns or ((line, False) for line in typed()):
            if turns is None and (text == "/reset" or text.split()[0] in ("/save", "/load")):
                obey(text, talk)
                continue
            if turns:
                say(f"\n> {text}")
            try:
                ids = turn_ids(talk, check_text("the turn", text), raw)
            except ValueError as error:
                if turns:
                    raise
                say(str(error).splitlines()[0])  # and the conversation goes on
                continue
            record = answer(model, cache, tokenizer, ids, args, generator,
                            (lambda piece: None) if args.json else show, speculation)
            print(json.dumps({"turn": len(records), **record}) if args.json else "", flush=True)
            say(f"turn {len(records)}: {figures(record)}")
            records.append(record)
            talk.last_id = record["token_ids"][-1]
        if args.save_session:
            save(args.save_session, talk)
    if records:
        say(f"{totals(records)}, seed {args.seed}")


if __name__ == "__main__":
    main()
