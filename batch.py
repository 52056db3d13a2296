"""Many independent streams side by side, each of them endless: continuous batching (streams.py).

    python batch.py --prompts mt_bench.jsonl --batch 8 --compile

A result is a JSON line, with or without --json, written when its stream ends. Of {"turns": ...}
lines only the first turn is answered: chat.py holds conversations.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from cli import (
    add_generation,
    add_template_args,
    check_text,
    grammar_arguments,
    load_arguments,
    make_grammar,
    make_parser,
    number,
    read_prompts,
    sampling_of,
    template_args_of,
)
from generate import (
    Transcript,
    chat_stop_ids,
    get_ready,
    open_model,
)
from grammar import Grammar
from model import Transformer
from streams import Batch, Prompt, Stream, generate_batch
from terminal import hold_interrupt, progress, say, show, user_errors
from tokenizer import Tokenizer
from tp import broadcast_ids


def write_results(model: Transformer, tokenizer: Tokenizer, prompts: list[Prompt], batch: Batch,
                  stop: Sequence[str], compile_s: float) -> None:
    """Print every stream's JSON line as soon as it ends, and the totals at last. On Ctrl-C the step
    is finished, the streams that have not ended are dropped, and the program ends. stop are texts
    that end an answer. Raises ValueError, at the end, for streams that a fault ended."""
    transcripts, done, new_tokens, steps, start = {}, 0, 0, 0, time.perf_counter()
    failed = []
    samples, seed = prompts[0].samples, prompts[0].sampling.seed
    n_streams, what = len(prompts) * samples, "prompts" if samples == 1 else "answers"

    def busy() -> str:
        return f"rows busy {batch.row_steps / max(1, batch.steps * len(batch.rows)):.0%}"

    with hold_interrupt() as interrupted, progress("generating", "tokens") as advance:
        for stream, token_id in generate_batch(model, prompts, batch=batch):
            if interrupted and batch.steps > steps:
                break
            steps = batch.steps
            if stream.error:
                failed.append(stream)
            elif token_id is None:
                record = record_of(model, batch, stream, transcripts.pop(stream))
                show(json.dumps({**record, "compile_s": compile_s}) + "\n")
                done += 1
            else:
                new_tokens += 1
                if stream not in transcripts:
                    transcripts[stream] = Transcript(tokenizer, len(stream.prompt.ids), stop)
                if transcripts[stream].add(token_id):
                    stream.cancel()
            advance(new_tokens, note=f"{done} of {n_streams} {what}, {busy()}")
    say(f"{done} of {n_streams} {what}, {new_tokens} new tokens, "
        f"{new_tokens / (time.perf_counter() - start):.1f} tok/s, {busy()} of {batch.steps} steps, "
        f"compiled in {compile_s:.1f} s, seed {seed}")
    if interrupted:
        sys.exit(128 + interrupted[0])
    if failed:
        raise ValueError(f"{len(failed)} of {n_streams} {what} broke off, prompt "
                         f"{failed[0].index // samples} the first: {failed[0].error}")


def make_grammars(path: str, entries: list[dict], asked: tuple[str, dict], tokenizer: Tokenizer,
                  vocab_size: int, stop_ids: list[Collection[int]]) -> list[Grammar | None]:
    """Each prompt's grammar: of its line's "schema", or else the command line's, if any."""
    made, grammars = {}, []  # made: those so far, as prompts share them
    for n, (entry, ends) in enumerate(zip(entries, stop_ids, strict=True)):
        source, given = asked
        if entry.get("schema") is not None:
            source, given = f"{path}, prompt {n}", {"schema": entry["schema"]}
        key = json.dumps([given, *ends])
        if key not in made:
            made[key] = make_grammar(source, given, tokenizer, vocab_size, ends)
        grammars.append(made[key])
    return grammars


def record_of(model: Transformer, batch: Batch, stream: Stream, transcript: Transcript) -> dict:
    """A stream's JSON line, at its end."""
    prompt, which = stream.prompt, {"index": stream.index // stream.prompt.samples}
    if prompt.samples > 1:
        which["sample"] = stream.sample
    transcript.start, transcript.prefilled = stream.started, stream.prefilled
    length = len(prompt.ids) + len(transcript.said.ids)
    record = transcript.record(model, [batch.cache, *batch.staging], length, prompt.stop_ids,
                               prompt.sampling.seed)
    return {**which, **record}


def main():
    parser = add_generation(make_parser(__doc__), samples=True)
    parser.add_argument("--prompts", required=True, metavar="FILE",
                        help="what to say, a JSON object a line; of several turns, only the first")
    parser.add_argument("--limit", type=number(int, 1), metavar="N",
                        help="of --prompts, the first N prompts only; default: all")
    parser.add_argument("--batch", type=number(int, 1), default=8, metavar="B",
                        help="streams side by side")
    add_template_args(parser)
    with user_errors(parser):
        args = parser.parse_args()
        for flag in ("draft", "lookup", "speculate"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} works on one stream, and batch.py has many")
        asked = grammar_arguments(args)
        entries = read_prompts(args.prompts)[:args.limit]
        stop = [check_text("--stop", text) for text in args.stop]
        template_args = template_args_of(args)
        model, tokenizer = open_model(args.checkpoint, compile=args.compile,
                                      compile_prefill=args.compile_prefill, **load_arguments(args))
        chat_ends, ends = chat_stop_ids(model, tokenizer), model.config.eos_ids
        stop_ids = [() if args.ignore_eos else chat_ends if "turns" in entry else ends
                    for entry in entries]
        grammars = make_grammars(args.prompts, entries, asked, tokenizer, model.config.vocab_size,
                                 stop_ids)
        ids = broadcast_ids([tokenizer.opening(entry, template_args) for entry in entries])
        batch = Batch(model, args.batch, args.sink, args.window)
        how = sampling_of(args, model.suggested)
        compile_s, how = get_ready(model, batch.staging[0], how)
        if args.compile:  # the step of all rows, as often as generate.warm runs the others
            start = time.perf_counter()
            list(generate_batch(model, [[0]] * 2, max_new_tokens=3, stop_ids=(), batch=batch))
            compile_s += time.perf_counter() - start
        # Every answer has a seed of its own, so no other prompt and no batch size changes it.
        prompts = [Prompt(one, replace(how, seed=how.seed + n * args.samples, grammar=grammars[n]),
                          args.max_new_tokens, stop_ids[n], args.samples)
                   for n, one in enumerate(ids)]
        write_results(model, tokenizer, prompts, batch, stop, compile_s)


if __name__ == "__main__":
    main()
