"""int4 weights that compensate for each other's rounding: GPTQ (Frantar et al., 2022).

    python gptq.py --checkpoint smollm2 --text tests/text.txt --out checkpoints/smollm2-gptq

Rounding to nearest treats all weights alike. GPTQ uses a layer's inputs while the model reads a
text: it rounds the columns of a weight one after another, and changes the remaining ones to keep
the layer's outputs. It writes the format of quantize.py, so the result is loaded, run and sharded
like any int4 checkpoint. Three things differ from the paper:

    order   Groups of columns with large inputs are rounded first, while most columns remain to
            compensate. A group's columns stay together, so that the file needs no permutation.
    drift   A layer's inputs come from the quantized layers before it. Half of their difference to
            the original model's inputs is compensated, too (Li et al., 2025: GPTAQ).
    refit   After rounding, all scales of a row are solved for together, for the same error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import tp
from cli import add_checkpoint, number, plain_parser
from eval import read_text
from formats.checkpoint import check_not_ours_quantized, stack
from formats.config import block_layers
from formats.folder import check_out, open_checkpoint, our_config, write_checkpoint
from formats.hub import find
from layers import GROUP_SIZES
from linear import pack_nibbles
from load import check_device
from model import Block, ModelConfig, Step, rope_frequencies, sequence_step
from quantize import (
    asked_quantization,
    dequantize,
    empty_model,
    quantize_int4,
    store,
    stored_shapes,
)
from terminal import progress, user_errors, wrote
from tokenizer import Tokenizer

DAMPENING = 0.01  # of the mean of the Hessian's diagonal, added to it: the paper's
COLUMNS = 128  # rounded before the rest of the matrix is updated: the paper's lazy batches
DRIFT = 0.5  # the share of the drift that is compensated
LENGTH = 512  # of a sequence in tokens, by default
TOKENS = 4096  # in a batch

log = logging.getLogger("gpt_stream")


# ------------------------------------------------------------------------------ one weight


@torch.no_grad()
def quantize_gptq(weight: Tensor, hessian: Tensor, drift: Tensor, group_size: int,
                  name: str = "weight") -> dict[str, Tensor]:
    """weight (N, K) in int4, as quantize.quantize_int4 returns it, with a low error in the layer's
    outputs.

    hessian (K, K) float32 is x^T x of the layer's inputs x (tokens, K), in any unit. drift (K, K)
    is (y - x)^T x in the same unit, where y are the original layer's inputs. Raises ValueError with
    the name when one of the three is not finite."""
    if not weight.isfinite().all():
        raise ValueError(f"tensor {name} has NaN or infinite values and cannot be quantized")
    if not (hessian + drift).isfinite().all():
        raise ValueError(f"{name}: the text makes its inputs NaN or infinite")
    order = by_importance(hessian.diagonal(), group_size)
    hessian, inverse, factor = damped_inverse(hessian[order][:, order], name)
    weight = weight.float()[:, order]
    # |W y - Q x|^2 is |(W + W (y - x) x^T H^-1 - Q) x|^2 and a constant, x and y as columns.
    weight = weight + DRIFT * weight @ drift[order][:, order] @ inverse
    nibbles, scale, zero = round_columns(weight, factor, group_size)
    levels = nibbles - zero.repeat_interleave(group_size, 1) / 16
    scale = refit(weight, levels, hessian, scale)
    # Back in the original order: the columns one by one, the scales and zeros group by group.
    nibbles = nibbles[:, order.argsort()].to(torch.uint8)
    group_order = order[::group_size].div(group_size, rounding_mode="floor")
    back = group_order.argsort()
    return {"weight": pack_nibbles(nibbles), "scale": scale[:, back],
            "zero": zero[:, back].to(torch.uint8)}


def by_importance(diagonal: Tensor, group_size: int) -> Tensor:
    """The numbers of K columns, those with the largest inputs first. Groups stay together."""
    groups = diagonal.unflatten(0, (-1, group_size))
    first = groups.sum(1).argsort(dim=0, descending=True, stable=True)
    within = groups.argsort(dim=1, descending=True, stable=True)
    return (first[:, None] * group_size + within[first]).flatten()


def damped_inverse(hessian: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The dampened Hessian, its inverse, and the upper triangular factor with factor^T factor equal
    to the inverse. An input that was always zero has only the dampening, so its column is rounded
    by itself. A Hessian that float32 cannot invert is dampened more."""
    mean = hessian.diagonal().mean().item() or 1.0
    share = DAMPENING
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            return damped, inverse, factor
        share *= 10
        log.info("%s: its Hessian has no Cholesky factor; dampened by %g now", name, share)


def round_columns(weight: Tensor, factor: Tensor, group_size: int) -> tuple[Tensor, ...]:
    """The paper's algorithm: nibbles (N, K), and for each group the scale (N, K / g) and the zero
    (N, K / g) in sixteenths.

    factor (K, K) is upper triangular, and factor^T factor the inverse Hessian. The error of column
    i divided by factor[i, i], times row i of the factor, is subtracted from the columns after it.
    """
    weight, nibbles, scales, zeros = weight.clone(), torch.empty_like(weight), [], []
    for start in range(0, weight.shape[1], COLUMNS):
        block = weight[:, start:start + COLUMNS]
        end = start + block.shape[1]
        errors = torch.empty_like(block)
        for i in range(start, end):
            if i % group_size == 0:  # the group's scale and zero, from the updated weights
                grid = quantize_int4(weight[:, i:i + group_size], group_size)
                scales.append(grid["scale"])
                zeros.append(grid["zero"].float())
                scale, zero = scales[-1][:, 0], zeros[-1][:, 0] / 16
            nibbles[:, i] = (weight[:, i] / scale + zero).round().clamp(0, 15)
            error = (weight[:, i] - (nibbles[:, i] - zero) * scale) / factor[i, i]
            weight[:, i:end] -= error[:, None] * factor[i, i:end]
            errors[:, i - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return nibbles, torch.cat(scales, 1), torch.cat(zeros, 1)


def refit(weight: Tensor, levels: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    """The scales (N, G) with the least error (w - q) H (w - q)^T, where q are these levels (N, K)
    times their scales: G linear equations a row. A scale that they do not determine stays."""
    G = scale.shape[1]
    refitted = []
    for w, s, old in zip(*(x.split(max(1, (1 << 24) // (G * len(hessian))))
                           for x in (weight, levels, scale))):
        groups = s.unflatten(1, (G, -1))  # (n, G, g)
        left = torch.einsum("nag,agk->nak", groups, hessian.unflatten(0, (G, -1)))  # (n, G, K)
        matrix = (left.unflatten(2, (G, -1)) * groups[:, None]).sum(-1)  # (n, G, G)
        right = (left * w[:, None]).sum(-1)
        hold = 1e-6 * matrix.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30  # (n, 1)
        matrix.diagonal(dim1=1, dim2=2).add_(hold)
        new = torch.linalg.solve(matrix, right + hold * old)
        refitted.append(torch.where(new > 0, new, old))
    return torch.cat(refitted)


# ------------------------------------------------------------------------------ all layers


def sequences_of(path: str, tokenizer: Tokenizer, count: int, length: int) -> Tensor:
    """Sequences (count, length) int64 from all over a text file, without overlaps and the same at
    every call. Each begins with BOS if the model has one. Raises ValueError when the text is too
    short."""
    ids = torch.tensor(tokenizer.encode(read_text(path), bos=False))
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    own = length - len(bos)  # tokens of text in a sequence
    if len(ids) < count * own:
        raise ValueError(f"{path}: has {len(ids)} tokens, and --sequences {count} of --length "
                         f"{length} take {count * own}; give more text, or fewer or shorter ones")
    pieces = ids[:len(ids) // own * own].view(-1, own)
    chosen = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[:count]
    return torch.cat([torch.tensor(bos).long().expand(count, len(bos)), pieces[chosen]], dim=1)


def input_sums(block: Block, linears: list[str], quantized_states: Tensor, float_states: Tensor,
               at: Step) -> dict[str, list[Tensor]]:
    """Two sums for each of these linears of a block: [x^T x, (y - x)^T x], each (K, K) float32.

    x are its inputs when the block reads quantized_states, the hidden states (N, L, dim) after the
    quantized layers before it; y are those when it reads float_states, after the original ones. The
    block's outputs replace float_states, in place."""
    sums, hooks = {}, []
    for name in linears:
        linear = block.get_submodule(name)
        K = linear.in_features
        sums[name] = [quantized_states.new_zeros(K, K), quantized_states.new_zeros(K, K)]
        hooks.append(linear.register_forward_pre_hook(partial(add_inputs, sums[name])))
    for x, y in zip(batches(quantized_states), batches(float_states)):
        y.copy_(block(torch.cat([x, y]), at, None, None)[len(x):])
    for hook in hooks:
        hook.remove()
    return sums


def add_inputs(sums: list[Tensor], module: nn.Module, args: tuple[Tensor]) -> None:
    """A forward hook that adds a linear's inputs to its two sums."""
    x, y = args[0].flatten(0, 1).chunk(2)  # (tokens, K) each
    sums[0].addmm_(x.t(), x)
    sums[1].addmm_((y - x).t(), x)


def batches(states: Tensor) -> tuple[Tensor, ...]:
    """Views of states (N, L, dim) with about TOKENS tokens each."""
    return states.split(max(1, TOKENS // states.shape[1]))


def quantize_layer(block: Block, prefix: str, sums: dict[str, list[Tensor]],
                   group_size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors of a block's linears, quantized. The dequantized weights replace
    those of the block."""
    for name in sums:
        weight = block.get_submodule(name).weight
        parts = quantize_gptq(weight, *sums[name], group_size, f"{prefix}{name}.weight")
        weight.copy_(dequantize(parts))
        yield from ((f"{prefix}{name}.{part}", tensor) for part, tensor in parts.items())


@torch.no_grad()
def calibrated_tensors(blocks: dict[str, list[Tensor]], config: ModelConfig, group_size: int,
                       sequences: Tensor, device: torch.device,
                       advance=None) -> Iterator[tuple[str, Tensor]]:
    """Yield all stored tensors, calibrated on sequences (N, L) int64. blocks are a float
    Checkpoint's.

    In memory are one layer in float32, its Hessians, and the hidden states of all sequences twice:
    after the quantized layers, and after the original ones."""
    table = stack(blocks["embed.weight"]).to(device)
    embedding = store("embed.weight", table, {"mode": "int8"})
    yield from embedding.items()
    sequences = sequences.to(device)
    scale = embedding["embed.scale"][sequences][..., None]
    quantized_states = embedding["embed.weight"][sequences] * scale  # (N, L, dim)
    float_states = table[sequences].float()  # the same
    del table, embedding
    for states in (quantized_states, float_states):
        states.mul_(config.embed_scale)
    for layer, kind in enumerate(config.layer_kinds):
        at = sequence_step(config, kind, sequences.shape[1], rope_frequencies(config, device, kind))
        prefix = f"layers.{layer}."
        weights = {name: stack(parts).to(device) for name, parts in blocks.items()
                   if name.startswith(prefix)}
        block = make_block(config, weights, prefix)
        sums = input_sums(block, list(block_layers(config)), quantized_states, float_states, at)
        yield from quantize_layer(block, prefix, sums, group_size)
        yield from ((name, tensor) for name, tensor in weights.items() if tensor.ndim == 1)
        for x in batches(quantized_states):
            x.copy_(block(x, at, None, None))
        if advance:
            advance(layer + 1, config.n_layers)
    yield "norm.weight", stack(blocks["norm.weight"])
    if "output.weight" in blocks:  # unless it is tied
        output = stack(blocks["output.weight"]).to(device)
        yield from store("output.weight", output, {"mode": "int8"}).items()


def make_block(config: ModelConfig, weights: dict[str, Tensor], prefix: str) -> Block:
    """A layer's Block in float32."""
    with torch.device("meta"):
        block = Block(config)
    block.load_state_dict({name.removeprefix(prefix): tensor.float().clone()
                           for name, tensor in weights.items()}, assign=True)
    return block


# ------------------------------------------------------------------------------ command line


def gptq_checkpoint(source: Path, text: str, out: Path, n_sequences: int = 128,
                    length: int | None = None, group_size: int = 32, device: str | None = None,
                    advance=None) -> None:
    """Write the checkpoint at `source` in int4 as a folder of ours, whole or not at all, calibrated
    on a text file. length None is LENGTH, or the trained context if that is shorter. Raises
    ValueError naming the file, the tensor or the size."""
    device = check_device(device)
    checkpoint = open_checkpoint(source)
    config, quantization = checkpoint.config, asked_quantization("int4", group_size)
    if checkpoint.raw.get("quantization_config"):
        raise ValueError(f"{source}: others have quantized it already; quantize the original")
    check_not_ours_quantized(checkpoint)
    shapes = stored_shapes(empty_model(config, quantization))  # raises for a wrong group size
    longest = min(config.max_seq_len, config.common_window or config.max_seq_len)
    if length and length > longest:
        raise ValueError(f"--length {length} is above the model's trained context of {longest}")

    check_out(out)
    sequences = sequences_of(text, Tokenizer(source), n_sequences, length or min(LENGTH, longest))
    weights = calibrated_tensors(checkpoint.blocks, config, group_size, sequences, device, advance)
    write_checkpoint(out, source, our_config(checkpoint, quantization),
                     ((name, tensor.cpu()) for name, tensor in weights), len(shapes))


def main():
    parser = plain_parser(__doc__)
    add_checkpoint(parser)
    add = parser.add_argument
    add("--text", required=True, metavar="FILE", help="UTF-8 text, plain or .xz")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--sequences", type=number(int, 1), default=128, metavar="N",
        help="pieces of the text to calibrate on, at most")
    add("--length", type=number(int, 2), metavar="L",
        help=f"tokens of each; default: {LENGTH}, or the trained context when that is less")
    add("--group-size", type=int, choices=GROUP_SIZES, default=32,
        help="columns of a weight that share an int4 scale")
    add("--device", metavar="D", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    with user_errors(parser):
        args = parser.parse_args()
        if tp.n_ranks() > 1:
            raise ValueError("gptq.py works without torchrun; what it writes, torchrun can run")
        source, _ = find(args.checkpoint)
        with progress("quantizing", "layers") as advance:
            gptq_checkpoint(source, args.text, args.out, args.sequences, args.length,
                            args.group_size, args.device, advance)
        wrote(args.out)


if __name__ == "__main__":
    main()
