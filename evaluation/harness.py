"""A model as lm-evaluation-harness asks it: log-likelihoods of texts, and answers up to a text.

Its requests are streams. What they begin with is read once, and the rest in rows side by side. One
that is longer than the sinks and the window is not cut: its stream goes on, and a line says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from generate import make_cache, prefill
from kv_cache import KVCache
from model import Transformer
from sample import RANGES, Sampling
from streams import Batch, Hooks, Prompt, generate_batch
from terminal import progress, say
from tokenizer import GeneratedText, Tokenizer

MAX_SCORED = 512  # tokens whose logits (V,) are held at a time
MAX_ANSWER = 256  # tokens of an answer whose task sets no limit, as in the harness

# ------------------------------------------------------------------------------ log-likelihoods


def common_length(first: list[int], second: list[int]) -> int:
    """How many ids two lists begin with together."""
    pairs = zip(first, second)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def read_shared(model: Transformer, cache: KVCache, held: list[int], ids: list[int]) -> list[int]:
    """Make the cache (one row), which holds the ids `held`, hold `ids`. It keeps what they begin
    with together, where it can roll back so far. Returns the ids."""
    n = common_length(held, ids)
    if len(held) - n + cache.overhang[0] > cache.max_chunk:
        n = 0
    if n:
        cache.rollback(len(held) - n)
    else:
        cache.reset()
    if ids[n:]:
        prefill(model, cache, ids[n:])
    return ids


def read_rows(model: Transformer, cache: KVCache, parts: list[list[int]]) -> None:
    """Continue each row by its part, which may be empty."""
    while any(parts):
        size = min(max(map(len, parts)), cache.max_chunk)
        chunks = [part[:size] for part in parts]
        padded = [chunk + [0] * (size - len(chunk)) for chunk in chunks]  # (B, size)
        tokens = torch.tensor(padded, device=cache.length.device)
        model(tokens, cache, torch.zeros_like(cache.length))
        cache.rollback([size - len(chunk) for chunk in chunks])
        parts = [part[size:] for part in parts]


def score_rows(model: Transformer, cache: KVCache, last_ids: list[int],
               parts: list[list[int]]) -> list[tuple[float, bool]]:
    """Of each row's part, which follows the row and its last id: its log-probability, and whether
    each of its tokens is the likeliest. The rows are longer afterwards, padding included."""
    totals, greedy = [0.0] * len(parts), [True] * len(parts)
    size = min(cache.max_chunk, max(1, MAX_SCORED // len(parts)))
    for start in range(0, max(map(len, parts)), size):
        targets = [part[start:start + size] for part in parts]
        longest = max(map(len, targets))
        inputs = [([last] + part)[start:start + longest] for last, part in zip(last_ids, parts)]
        padded = [row + [0] * (longest - len(row)) for row in inputs]
        logits = model(torch.tensor(padded, device=cache.length.device), cache)  # (B, T, V)
        for row, target in enumerate(targets):
            if target:
                wanted = torch.tensor(target, device=logits.device)
                of_row = logits[row, :len(target)]  # (t, V)
                totals[row] -= F.cross_entropy(of_row, wanted, reduction="sum").item()
                greedy[row] &= bool((of_row.argmax(-1) == wanted).all())
    return list(zip(totals, greedy))


def batches_of(pairs: list[tuple[list[int], list[int]]], size: int,
               longest: int) -> Iterator[list[list[int]]]:
    """The indices of pairs with the same context together, in the contexts' order, so many contexts
    at a time. A continuation above `longest` is by itself: its row cannot be rolled back after it.
    """
    groups: dict[tuple, list[int]] = {}
    for at, (context, continuation) in enumerate(pairs):
        is_long = len(continuation) > longest
        groups.setdefault((is_long, tuple(context), at if is_long else 0), []).append(at)
    for kind in (False, True):
        ordered = [groups[key] for key in sorted(groups) if key[0] == kind]
        for first in range(0, len(ordered), size):
            yield ordered[first:first + size]


@torch.no_grad()
def score(model: Transformer, pairs: list[tuple[list[int], list[int]]], n_sink: int, window: int,
          batch_size: int) -> list[tuple[float, bool]]:
    """Of each (context, continuation), neither empty: the continuation's log-probability, and
    whether each of its tokens is the likeliest one.

    Contexts are read in order, so that those which begin alike come together: what a batch of them
    has in common is read once, and a context once for all its continuations."""
    shared, found = make_cache(model, n_sink, window), [None] * len(pairs)
    rows, held, done = None, [], 0
    with progress("scoring", "requests") as advance:
        for batch in batches_of(pairs, batch_size, shared.max_chunk):
            contexts = [pairs[group[0]][0] for group in batch]
            n = min(common_length(contexts[0], context[:-1]) for context in contexts)
            held = read_shared(model, shared, held, contexts[0][:n])
            if rows is None or rows.batch_size != len(batch):
                rows = make_cache(model, n_sink, window, len(batch))
            for row in range(len(batch)):
                rows.copy_row(row, shared)
            read_rows(model, rows, [context[n:-1] for context in contexts])
            last_ids = [context[-1] for context in contexts]
            for turn in range(max(map(len, batch))):
                parts = [pairs[of_row[turn]][1] if turn < len(of_row) else []
                         for of_row in batch]
                results = score_rows(model, rows, last_ids, parts)
                for of_row, result in zip(batch, results):
                    if turn < len(of_row):
                        found[of_row[turn]] = result
                        done += 1
                advance(done, len(pairs))
                if turn + 1 < max(map(len, batch)):
                    rows.rollback(max(map(len, parts)))
    return found


# ------------------------------------------------------------------------------ answers


def generation_of(settings: dict, seed: int) -> tuple[list[str], int, Sampling]:
    """Of a request's generation_kwargs: the texts that end its answer, the most tokens of it, and
    how they are drawn. Raises ValueError for a setting that is not known here."""
    settings = dict(settings)
    until, limit = settings.pop("until", None) or [], MAX_ANSWER
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        limit = settings.pop(name, limit)
    if not settings.pop("do_sample", settings.get("temperature", 0) > 0):
        settings = {name: value for name, value in settings.items() if name not in RANGES}
    if unknown := settings.keys() - RANGES.keys():
        raise ValueError(f"a task's generation_kwargs: {min(unknown)} is not known here")
    return [until] if isinstance(until, str) else until, limit, Sampling(**settings, seed=seed)


def answer_all(model: Transformer, tokenizer: Tokenizer, all_ids: list[list[int]],
               settings: Sequence[dict], n_sink: int, window: int, batch_size: int) -> list[str]:
    """The answer to each context, up to the first of the texts that its settings name in `until`.
    What all contexts begin with is read once."""
    shared, n = make_cache(model, n_sink, window), 0
    if len(all_ids) > 1:
        n = min(common_length(all_ids[0], ids[:-1]) for ids in all_ids)
        read_shared(model, shared, [], all_ids[0][:n])
    hooks = Hooks(all_ids[0][:n], lambda cache: cache.copy_row(0, shared)) if n else Hooks()
    stop_ids = tuple({*model.config.eos_ids, tokenizer.eos_id} - {None})
    prompts, texts = [], []
    for at, ids in enumerate(all_ids):
        until, limit, sampling = generation_of(settings[at], at)
        prompts.append(Prompt(ids[n:], sampling, limit, stop_ids, hooks=hooks))
        texts.append(GeneratedText(tokenizer, until))
    batch, done = Batch(model, min(batch_size, len(prompts)), n_sink, window), 0
    with progress("answering", "requests") as advance:
        for stream, token_id in generate_batch(model, prompts, batch=batch):
            text = texts[stream.index]
            if token_id is not None:
                text.add(token_id)
                if text.stopped:
                    stream.cancel()
                continue
            if stream.error:
                raise ValueError(stream.error)
            text.flush()
            done += 1
            advance(done, len(prompts))
    return [text.text for text in texts]


# ------------------------------------------------------------------------------ the harness


def say_longer(lengths: Sequence[int], n_sink: int, window: int) -> None:
    """Say how many requests are longer than what a model sees at a time."""
    n = sum(length > n_sink + window for length in lengths)
    if n:
        say(f"{n} of {len(lengths)} requests are longer than {n_sink} sinks and a window of "
            f"{window}: their streams go on, and at their ends see the sinks and the latest tokens")


def harness_model(model: Transformer, tokenizer: Tokenizer, n_sink: int, window: int,
                  batch_size: int):
    """The model as an object of the harness, with so many rows side by side."""
    from lm_eval.api.model import TemplateLM

    class StreamLM(TemplateLM):
        """Texts become tokens by the harness's own rules, as they do for its `hf` model."""

        eot_token_id = tokenizer.eos_id
        prefix_token_id = tokenizer.named_ids.get(tokenizer.bos_token, tokenizer.eos_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs):
            ids = tokenizer.encode(string)
            return ids[len(tokenizer.front):] if add_special_tokens is False else ids

        def loglikelihood(self, requests, disable_tqdm: bool = True):
            return super().loglikelihood(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests, **kwargs):
            pairs = [(context, continuation) for _, context, continuation in requests]
            say_longer([len(context) + len(rest) - 1 for context, rest in pairs], n_sink, window)
            return score(model, pairs, n_sink, window, batch_size)

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = True):
            # Where a tokenizer puts BOS in front of a text, the harness scores it, behind another.
            texts = [self.tok_encode(request.args[0]) for request in requests]
            found = self._loglikelihood_tokens([(None, [self.prefix_token_id], ids)
                                                for ids in texts])
            return [total for total, _ in found]

        def generate_until(self, requests, disable_tqdm: bool = True):
            contexts, settings = zip(*(request.args for request in requests))
            all_ids = [tokenizer.encode(context) for context in contexts]
            say_longer([len(ids) for ids in all_ids], n_sink, window)
            return answer_all(model, tokenizer, all_ids, settings, n_sink, window, batch_size)

    return StreamLM()


def run_tasks(names: list[str], include_path: str | None, lm, **options) -> dict:
    """The harness's results of these tasks; options are what its simple_evaluate takes. Raises
    ValueError naming a task or a folder that is not there."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path {include_path}: there is no such folder")
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(f"--tasks {name}: lm_eval knows no such task; --include-path DIR "
                             "names a folder of others")
    return simple_evaluate(lm, tasks=names, task_manager=manager, log_samples=False, **options)
