"""Where a stream looks: how much of its attention each layer gives to sinks and to the window.

    python -m examples.attention_sinks --plot attention_sinks.png

Fused kernels never write attention's weights down. But model.py calls `attend` by its name, so a
wrapper sees every layer's queries and keys, and writes softmax(q k^T) out beside the real thing.

docs/attention_sinks.png is SmolLM2's: once the window slides, the very first token gets 0.29 to
0.68 of all attention in each layer from 12 on (one key of 256), and the other sinks nearly nothing.
Without sinks that share has to go elsewhere, and perplexity jumps up (docs/performance.md). The
embedded model has no sinks: each gets 0.004 at most.
"""

import math
from unittest import mock

import torch

import model as engine
from attention import grouped
from cli import add_checkpoint, plain_parser
from eval import read_text
from generate import load, make_cache
from terminal import user_errors

S, W = 4, 252
SPANS = [(0, 0), (1, 1), *((2 ** i, 2 ** (i + 1) - 1) for i in range(1, 7)), (128, W - 1)]
NAMES = [*(f"sink {i}" for i in range(S)), *(f"{a}-{b}" if b > a else str(a) for a, b in SPANS)]


def weights(q_sink, q_recent, k, at):
    """(B, T, n): the share of attention that each of the n slots in use gets, averaged over heads.
    """
    B, T, _, D = q_recent.shape
    k = k[:, :, :at.mask.shape[-1]].transpose(2, 3)  # (B, kv_heads, D, n)
    scores = grouped(q_recent, k.shape[1]) @ k  # (B, kv_heads, T * G, n)
    scores[..., :at.n_sink] = grouped(q_sink, k.shape[1]) @ k[..., :at.n_sink]
    shares = (scores / math.sqrt(D) + at.mask[:, None]).softmax(-1)
    return shares.view(B, k.shape[1], T, -1, k.shape[-1]).mean((1, 3))


def record_weights(model, cache, chunk):
    """Feed a chunk of tokens (1, T) to the model. Returns every layer's weights, (layers, T, n)."""
    layers, attend = [], engine.attend

    def attend_and_record(q_sink, q_recent, k, v, at):
        layers.append(weights(q_sink, q_recent, k, at)[0])
        return attend(q_sink, q_recent, k, v, at)

    with mock.patch.object(engine, "attend", attend_and_record):
        model(chunk, cache)
    return torch.stack(layers)


@torch.no_grad()
def by_place(model, cache, ids):
    """(N, layers, S + spans): the share of attention that each query gives to each sink, and to the
    window's keys at distances within each span. Queries count once the window slides."""
    found = []
    for chunk in ids[None].split(cache.max_chunk, dim=1):
        positions, slides = cache.positions(chunk.shape[1]), int(cache.length) >= S + W
        shares = record_weights(model, cache, chunk)
        ring = torch.arange(S, shares.shape[-1])
        held = cache.held(cache.of_layer[0], positions, ring)
        distance = positions[0, :, None] - held  # (T, n - S)
        spans = [(shares[..., S:] * ((a <= distance) & (distance <= b))).sum(-1) for a, b in SPANS]
        places = torch.cat([shares[..., :S], torch.stack(spans, -1)], -1).transpose(0, 1)
        found.append(places if slides else places[:0])
    return torch.cat(found)


def plot_shares(path, shares):
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure, axes = plt.subplots(figsize=(7, 5))
    image = axes.imshow(shares.numpy(), norm="log", vmin=1e-3, vmax=1, aspect="auto")
    axes.set_xticks(range(len(NAMES)), NAMES, rotation=45, ha="right")
    axes.set(ylabel="layer", xlabel="sinks, then the window's keys by their distance in tokens")
    figure.colorbar(image, label="share of attention")
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main():
    parser = plain_parser(__doc__)
    add_checkpoint(parser, "smollm2")
    parser.add_argument("--text", default="tests/text.txt", metavar="FILE",
                        help="UTF-8 text, plain or .xz")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it")
    with user_errors(parser):
        args = parser.parse_args()
        model, tokenizer = load(args.checkpoint, device="cpu", dtype=torch.float32)
        if "sliding" in model.config.kinds:
            raise ValueError(f"--checkpoint {args.checkpoint} has layers that slide; this compares "
                             "layers that see everything")
        ids = torch.tensor(tokenizer.encode(read_text(args.text))[:2048])
        if len(ids) <= 384:
            raise ValueError(f"{args.text} has {len(ids)} tokens; it needs more than 384")
        mean = by_place(model, make_cache(model, S, W), ids).mean(0)  # (layers, S + spans)
        print("layer", *(f"{name:>7}" for name in NAMES))
        for layer, row in enumerate(mean):
            print(f"{layer:5}", *(f"{share:7.3f}" for share in row))
        if args.plot:
            plot_shares(args.plot, mean)


if __name__ == "__main__":
    main()
