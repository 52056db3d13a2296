"""The turns of a file as one endless conversation, beside StreamingLLM's own implementation."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from bench import peers
from bench.apart import beside
from bench.clocks import compile_all, forget_peak, peak_bytes
from bench.models import peer_settings, sizes
from chat import turns_of
from cli import read_prompts
from formats.hub import find
from generate import generate, make_cache
from model import Transformer
from terminal import progress, say
from tokenizer import Tokenizer


def turn_prompts(args) -> list[list[int]]:
    """The token ids that each turn of a conversation adds. They do not depend on the answers."""
    tokenizer = Tokenizer(find(args.checkpoint)[0])  # with --shape, the embedded model's
    turns = turns_of(read_prompts(args.turns), args.limit or 20)
    return [tokenizer.encode(text, bos=n == 0) if raw
            else tokenizer.next_turn(text) if n else tokenizer.first_turn(text)
            for n, (text, raw) in enumerate(turns)]


def timed_turn(stream: Iterator[int], device: torch.device) -> dict:
    """Read an answer's tokens to its end; its figures."""
    start = time.perf_counter()
    times = [time.perf_counter() - start for _ in stream]
    return dict(new_tokens=len(times), ttft_s=times[0], seconds=times[-1],
                peak_bytes=peak_bytes(device))


def streaming_answers(args, n_sink: int, window: int) -> Callable[[list[int]], dict]:
    """A function that answers a turn of one conversation as StreamingLLM does; its figures."""
    config, dtype, device = peer_settings(args)
    model = peers.llama(config, dtype, device)

    def answer_turn(past: list, prompt_ids: list[int], max_new_tokens: int) -> dict:
        stream = peers.streaming_turn(model, past, prompt_ids, max_new_tokens, n_sink, window)
        record = timed_turn(stream, device)
        return dict(record, cache_bytes=sum(k.nbytes + v.nbytes for k, v in past))

    answer_turn(peers.streaming_past(model), [7] * 32, 3)  # the first steps of a process are slow
    past = peers.streaming_past(model)
    forget_peak(device)
    return lambda prompt_ids: answer_turn(past, prompt_ids, args.max_new_tokens)


def conversation(records: list[dict]) -> dict:
    """The figures of all turns together. Decoding is what comes after each first token."""
    waits = sorted(r["ttft_s"] for r in records)
    total, tokens = sum(r["seconds"] for r in records), sum(r["new_tokens"] for r in records)
    out = dict(tok_s=tokens / total, decode_tok_s=(tokens - len(records)) / (total - sum(waits)),
               ttft_p50_s=statistics.median(waits),
               ttft_p99_s=waits[math.ceil(0.99 * len(waits)) - 1])
    for name in ("cache_bytes", "peak_bytes"):
        out.update({f"{name}_first_turn": records[0][name], f"{name}_last_turn": records[-1][name]})
    return out


def bench_turns(args, model: Transformer) -> dict:
    prompts, cache = turn_prompts(args), make_cache(model, args.sink, args.window)
    say("compiling")
    compile_s = compile_all(model, cache)

    def answer_ours(prompt_ids: list[int]) -> dict:
        stream = generate(model, cache, prompt_ids, args.max_new_tokens, stop_ids=())
        return dict(timed_turn(stream, cache.length.device), cache_bytes=cache.nbytes())

    with (beside(args, streaming_answers, args, cache.n_sink, cache.window) as peer,
          progress("measuring", "turns") as show):
        answerers = {"": answer_ours, **({"streaming_": peer} if peer else {})}
        records = {name: [] for name in answerers}
        forget_peak(cache.length.device)
        for n, prompt_ids in enumerate(prompts):
            for name, answer in answerers.items():
                records[name].append(answer(prompt_ids))
            speeds = (f"{r[-1]['new_tokens'] / r[-1]['seconds']:.1f}" for r in records.values())
            show(n + 1, len(prompts), f"{' and '.join(speeds)} tok/s")
    out = dict(**sizes(cache), compile_s=compile_s, turns=len(prompts),
               prompt_tokens=sum(map(len, prompts)), new_tokens=len(prompts) * args.max_new_tokens)
    for name in answerers:
        out.update({name + figure: v for figure, v in conversation(records[name]).items()})
    for figure in ("tok_s", "decode_tok_s") if args.peer else ():
        out[f"{figure}_over_streaming"] = out[figure] / out[f"streaming_{figure}"]
    return out
