"""How good a model is: its perplexity along one long text, or its marks in lm-evaluation-harness.

    python eval.py --text tests/text.txt
    python eval.py --text valid.txt.xz --mode stream window recompute dense --plot stream.png
    python eval.py --checkpoint smollm2 --tasks arc_easy,lambada_openai   # pip install lm_eval

A text is one uninterrupted stream, for each way of keeping the past:

    stream     sinks and a window: StreamingLLM, this engine's cache
    window     the window alone (no sinks), of the same total size
    recompute  the latest S + W tokens read anew for every token: the paper's slow gold standard
    dense      every token seen, and so only up to the trained context

Tasks (evaluation/harness.py) are read as streams, too.
"""

from __future__ import annotations

import json
import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import load_arguments, make_parser, number
from draw import NOT_FINITE
from evaluation.harness import harness_model, run_tasks
from formats.files import atomic_write, check_target, import_optional
from generate import default_window, make_cache
from kv_cache import KVCache
from load import load
from model import Transformer
from terminal import progress, show, user_errors
from tokenizer import Tokenizer

MODES = ("stream", "window", "recompute", "dense")
RECOMPUTED_ROWS = 16  # windows in one call of the model
SMOOTH = 1000  # a point of the plot is the mean of this many tokens


def read_text(path: str) -> str:
    """A UTF-8 text file, plain or .xz."""
    opener = lzma.open if path.endswith(".xz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return file.read()
    except (UnicodeDecodeError, lzma.LZMAError, EOFError):
        raise ValueError(f"{path}: not UTF-8 text, plain or .xz") from None


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats (T,) float32 that each target (T,) cost under logits (T, V)."""
    return F.cross_entropy(logits, targets, reduction="none")


def perplexity(nats: float) -> float:
    """e to the mean of nats; beyond what a float holds, the largest power that it does."""
    return math.exp(min(nats, 709))


@torch.no_grad()
def streamed(model: Transformer, ids: Tensor, cache: KVCache) -> Iterator[Tensor]:
    """Nats of each token after the first, a chunk at a time, through the cache."""
    for inputs, targets in zip(ids[:-1].split(cache.max_chunk), ids[1:].split(cache.max_chunk)):
        yield nll(model(inputs[None], cache)[0], targets)


@torch.no_grad()
def recomputed(model: Transformer, ids: Tensor, context: int, every: int) -> Iterator[Tensor]:
    """Nats of each token whose number is a multiple of `every`, predicted from the latest `context`
    tokens alone, which are read anew for it."""
    first = ids[:context + 1]
    yield nll(model(first[None, :-1])[0], first[1:])[every - 1::every]
    if len(ids) == len(first):
        return
    windows = ids[1:-1].unfold(0, context, 1)  # (n, context): the tokens that end before a target
    start = (every - 1 - context) % every
    for rows, targets in zip(windows[start::every].split(RECOMPUTED_ROWS),
                             ids[context + 1:][start::every].split(RECOMPUTED_ROWS)):
        last = torch.full((len(rows),), context - 1, device=ids.device)
        yield nll(model(rows, None, last)[:, 0], targets)


def measure(model: Transformer, ids: Tensor, mode: str, n_sink: int, window: int,
            every: int = 1) -> Tensor:
    """Nats of the tokens of ids (N + 1,) but the first, with a progress bar: of each n-th of them,
    n = every, so (N // n,). Modes without sinks see no further than the model's sliding window.
    Raises ValueError where a token's are not finite."""
    longest = model.config.common_window or math.inf
    size = min(n_sink + window, longest)
    if mode == "dense":
        ids = ids[:min(model.config.max_seq_len, longest) + 1]
        parts = streamed(model, ids, make_cache(model, 0, len(ids) - 1))
    elif mode == "recompute":
        parts = recomputed(model, ids, size, every)
    elif mode == "window":
        parts = streamed(model, ids, make_cache(model, 0, size))
    else:
        parts = streamed(model, ids, make_cache(model, n_sink, window))
    done, count, total = [], 0, 0.0
    with progress(mode, "tokens") as advance:
        for part in parts:
            done.append(part)
            count, total = count + len(part), total + part.sum().item()
            if not math.isfinite(total):
                raise ValueError(NOT_FINITE)
            advance(count, (len(ids) - 1) // (every if mode == "recompute" else 1),
                    f"perplexity {perplexity(total / max(count, 1)):.3f}")
    nats = torch.cat(done)
    return nats if mode == "recompute" else nats[every - 1::every]


def check_plot(path: str) -> None:
    """Raises ValueError without matplotlib, and for a name that does not end in a picture's kind.
    """
    import_optional("matplotlib", "--plot").use("Agg")
    from matplotlib.backend_bases import FigureCanvasBase
    kinds = FigureCanvasBase.get_supported_filetypes()
    if check_target(path).suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot {path}: the name must end in one of .{', .'.join(kinds)}")


def plot_curves(path: str, curves: dict[str, Tensor], marks: dict[str, int], every: int) -> None:
    """Plot the perplexity of the latest SMOOTH tokens along the text: a curve for each mode, of
    nats of each n-th token, n = every, and a vertical line at each mark."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    smooth = max(1, SMOOTH // every)
    for name, nats in curves.items():
        total = nats.double().cumsum(0)
        before = torch.cat([total.new_zeros(min(smooth, len(nats))), total[:-smooth]])
        seen = torch.arange(1, len(nats) + 1).clamp(max=smooth)
        perplexity = ((total - before) / seen).exp()
        shown = slice(min(smooth // 10, len(nats) // 2), None)  # means of few tokens are too noisy
        axes.plot(range(every, every * len(nats) + 1, every)[shown], perplexity[shown],
                  label=name, linewidth=1)
    for (name, position), style in zip(marks.items(), ("--", ":")):
        axes.axvline(position, color="gray", linestyle=style, label=f"{name} {position:,}")
    axes.set(xlabel="tokens", ylabel=f"perplexity of the latest {SMOOTH} tokens", yscale="log")
    axes.legend()
    figure.tight_layout()
    with atomic_write(Path(path)) as partial:
        figure.savefig(partial, dpi=110, format=Path(path).suffix[1:])


def run_texts(args, model: Transformer, ids: Tensor) -> None:
    """Print a record for each way of keeping the past that the command line names, and draw."""
    curves, marks = {}, {"trained context,": model.config.max_seq_len}
    for mode in args.mode:
        for n_sink in args.sink:
            start = time.perf_counter()
            window = args.window or default_window(model.config, n_sink)
            nats = measure(model, ids, mode, n_sink, window, args.every).cpu()
            if not len(nats):
                raise ValueError(f"--every {args.every}: {mode} has fewer tokens than that")
            name = f"{mode}, {n_sink} sinks" if mode == "stream" else mode
            curves[name] = nats
            marks[f"{name} slides from"] = n_sink + window
            record = dict(mode=mode, sink=n_sink, window=window, tokens=len(nats),
                          nats=nats.mean().item(), perplexity=perplexity(nats.mean().item()),
                          seconds=time.perf_counter() - start)
            show((json.dumps(record) if args.json else f"{name:20} {record['tokens']} tokens  "
                  f"perplexity {record['perplexity']:.3f}") + "\n")
            if mode != "stream":
                break  # the number of sinks changes only the stream
    if args.plot:
        plot_curves(args.plot, curves, marks, args.every)


def run_harness(args, model: Transformer, tokenizer: Tokenizer) -> None:
    """Print the harness's table of the tasks, or a record of each."""
    from lm_eval.utils import make_table

    n_sink = args.sink[0]
    lm = harness_model(model, tokenizer, n_sink,
                       args.window or default_window(model.config, n_sink), args.batch)
    results = run_tasks(args.tasks.split(","), args.include_path, lm, limit=args.limit,
                        num_fewshot=args.num_fewshot)
    if args.json:
        for name, figures in results["results"].items():
            show(json.dumps({"task": name, **figures}) + "\n")
        return
    show(make_table(results))
    if results.get("groups"):
        show(make_table(results, "groups"))


def check(args) -> None:
    """Raises ValueError for flags that do not go together."""
    if (args.text is None) == (args.tasks is None):
        raise ValueError("give --text FILE or --tasks NAME,..., and not both")
    for name in ("include_path", "limit", "num_fewshot"):
        if getattr(args, name) is not None and args.text:
            raise ValueError(f"--{name.replace('_', '-')} goes with --tasks")
    if args.plot and args.tasks:
        raise ValueError("--plot goes with --text")


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--json", action="store_true", help="JSON on stdout")
    add("--text", metavar="FILE", help="UTF-8 text, plain or .xz")
    add("--tasks", metavar="NAME,...", help="instead: tasks of lm-evaluation-harness")
    add("--include-path", metavar="DIR", help="a folder with tasks of your own (YAML)")
    add("--limit", type=number(int, 1), metavar="N",
        help="of each task, the first N questions only; default: all")
    add("--num-fewshot", type=number(int, 0), metavar="N",
        help="answered questions before each; default: as the task says")
    add("--batch", type=number(int, 1), default=8, metavar="B",
        help="streams side by side")
    add("--mode", nargs="+", choices=MODES, default=["stream"],
        help="how the past is kept: sinks and a window, the window alone, the latest tokens read "
        "anew for every token, or all of it")
    add("--sink", nargs="+", type=number(int, 0), default=[4], metavar="S",
        help="first tokens, never evicted; a run for each number")
    add("--every", type=number(int, 1), default=1, metavar="N",
        help="count every N-th token only: recompute takes long")
    add("--max-tokens", type=number(int, 2), default=20_000, metavar="N",
        help="first N tokens of the text only")
    add("--plot", metavar="FILE.png", help="draw it")
    with user_errors(parser):
        args = parser.parse_args()
        check(args)
        if args.tasks:
            import_optional("lm_eval", "--tasks")
        else:
            text = read_text(args.text)
        if args.plot:
            check_plot(args.plot)  # fail before everything has been measured, not after it
        model, tokenizer = load(args.checkpoint, **load_arguments(args))
        if args.tasks:
            run_harness(args, model, tokenizer)
            return
        ids = torch.tensor(tokenizer.encode(text)[:args.max_tokens + 1],
                           device=model.norm.weight.device)
        if len(ids) < 2:
            raise ValueError(f"{args.text}: no text in it")
        run_texts(args, model, ids)


if __name__ == "__main__":
    main()
