"""An endless conversation: it never resets, and each turn prefills only its own tokens.

    python chat.py --compile
    python chat.py --prompts mt_bench.jsonl --limit 20

Typed, or all turns of a file as one conversation, as in SwiftInfer and StreamingLLM. The cache
keeps the sinks and the latest tokens, so memory and the time to a turn's first token stay constant.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator

from cli import (add_generation, check_text, figures, make_parser, number, read_prompts, say, show,
                 user_errors)
from generate import answer, get_ready, make_cache, open_model, open_speculation

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (input() then edits lines and remembers them)

HELP = "/reset forgets everything, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


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


def turn_ids(tokenizer, text: str, raw: bool, system: str | None, last_id: int | None) -> list[int]:
    """The ids that a turn adds to the conversation; last_id is the last one in it, if any."""
    if raw:
        return tokenizer.encode(text, bos=last_id is None)
    if last_id is None:
        return tokenizer.first_turn(text, system)
    return tokenizer.next_turn(text, last_id)


def totals(records: list[dict]) -> str:
    """One line about a whole conversation."""
    waits = sorted(record["ttft_s"] for record in records)
    decoding = sum((r["new_tokens"] - 1) / r["decode_tok_s"] for r in records if r["decode_tok_s"])
    decoded = sum(r["new_tokens"] - 1 for r in records if r["decode_tok_s"])
    return (f"{len(records)} turns, {sum(r['prompt_tokens'] for r in records)} prompt + "
            f"{sum(r['new_tokens'] for r in records)} new tokens, decode "
            f"{decoded / decoding if decoding else 0:.1f} tok/s, first token after "
            f"{waits[len(waits) // 2]:.3f} s (median), {waits[-1]:.3f} s (worst), "
            f"{records[-1]['evicted']} evicted, cache {records[-1]['cache_bytes'] / 1e6:.1f} MB")


def main():
    parser = add_generation(make_parser(__doc__))
    parser.add_argument("--prompts", metavar="FILE", help="turns to say, a JSON object a line")
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="first N turns only")
    parser.add_argument("--pin-system", metavar="TEXT", help="a system turn that is never evicted")
    args = parser.parse_args()
    with user_errors(parser):
        if args.limit and not args.prompts:
            raise ValueError("--limit goes with --prompts")
        turns = from_file(read_prompts(args.prompts), args.limit) if args.prompts else None
        model, tokenizer = open_model(args)
        if args.pin_system is not None:
            if args.sink is not None:
                raise ValueError("--pin-system decides the number of sinks; leave --sink out")
            if turns and any(raw for _, raw in turns):
                raise ValueError('--pin-system needs a template: {"prompt": ...} lines have none')
            check_text("--pin-system", args.pin_system)
            args.sink = len(tokenizer.encode(tokenizer.system_turn(args.pin_system)))
        cache = make_cache(model, args.sink, args.window)
        speculation = open_speculation(model, cache, tokenizer, args)
        generator = get_ready(model, cache, args, speculation)

        records, last_id = [], None
        for text, raw in turns or ((line, False) for line in typed()):
            if turns is None and text == "/reset":
                cache.reset()
                if speculation:
                    speculation.reset()
                last_id = None
                continue
            if turns:
                say(f"\n> {text}")
            ids = turn_ids(tokenizer, check_text("the turn", text), raw, args.pin_system, last_id)
            record = answer(model, cache, tokenizer, ids, args, generator,
                            (lambda piece: None) if args.json else show, speculation)
            print(json.dumps({"turn": len(records), **record}) if args.json else "", flush=True)
            say(f"turn {len(records)}: {figures(record)}")
            records.append(record)
            last_id = record["token_ids"][-1]
    if records:
        say(f"{totals(records)}, seed {args.seed}")


if __name__ == "__main__":
    main()
