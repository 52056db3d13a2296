"""Tensor parallelism (Megatron-LM, Shoeybi et al., 2019, section 3) over torch.distributed.

    torchrun --nproc-per-node 2 generate.py --compile

Every process ("rank") holds a slice of every layer: some heads of the attention, with their part of
the cache, and some columns of the feed-forward. A layer's two sums over all of them are the only
traffic within it. The output projection is sliced by vocabulary and its logits are gathered. The
embedding is whole on every rank: a step reads one row of it, and slicing would cost another sum.

NCCL carries what is on GPUs, gloo what is on CPUs. Where the processes are is torchrun's business:
nothing is asked here but its environment variables, and whether it is still there, so several
machines work as one does.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import functools
import json
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def n_ranks() -> int:
    """How many processes share the model; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


# ------------------------------------------------------------------------------ processes


def join(device: str | None) -> str | None:
    """Meet the other ranks, once; the device of this one. Raises ValueError when this machine has
    fewer GPUs than ranks."""
    if n_ranks() == 1:
        return device
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if on_gpu:
        if device not in (None, "cuda"):
            raise ValueError(f"device {device!r}: under torchrun it is cpu or cuda, and each "
                             "process takes the GPU of its own number")
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if there < wanted:
            raise ValueError(f"device 'cuda': {wanted} processes on this machine need a GPU each, "
                             f"and this PyTorch sees {there}")
        device = f"cuda:{local_rank()}"
        torch.cuda.set_device(local_rank())  # which NCCL takes
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        text_group()
        if not on_gpu:  # to destroy NCCL's would wait for ever for the CUDA graphs that use it
            atexit.register(dist.destroy_process_group)
    return device or "cpu"


@functools.cache
def text_group() -> dist.ProcessGroup:
    """For texts, which may wait for a person to type them. A lost rank is noticed all the same."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))


def part() -> None:
    """Wait for the others before leaving: gloo may take what a process sent last for lost when that
    process has gone. Whoever leaves for an error does not wait."""
    if n_ranks() > 1 and dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.barrier(group=text_group())


def tell_all(text: str) -> str:
    """Rank 0's text, on every rank."""
    return text if n_ranks() == 1 else gather_texts(text)[0]


def agree(ids: list) -> list:
    """Rank 0's token ids, on every rank: a template may hold the date, and machines may differ."""
    return ids if n_ranks() == 1 else json.loads(tell_all(json.dumps(ids)))


def gather_texts(text: str) -> list[str]:
    """Every rank's text, on every rank."""
    raw = text.encode(errors="surrogateescape")
    sizes = torch.zeros(n_ranks(), dtype=torch.int64)
    sizes[rank()] = len(raw)
    dist.all_reduce(sizes, group=text_group())
    longest = int(sizes.max())
    mine = torch.tensor(list(raw.ljust(longest)), dtype=torch.uint8)
    every = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(every, mine, group=text_group())
    return [bytes(message[:size].tolist()).decode(errors="surrogateescape")
            for message, size in zip(every, sizes.tolist())]


@contextlib.contextmanager
def together():
    """What fails on one rank inside fails on all of them, so that none waits for one that left."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if n_ranks() > 1:
        mine = str(failure) or type(failure).__name__ if failure else ""
        reports = [f"rank {r}: {report}" for r, report in enumerate(gather_texts(mine)) if report]
        if reports:
            part()
        if reports and not failure:
            raise ValueError(reports[0])
    if failure:
        raise failure


# ------------------------------------------------------------------------------ in the model

# A collective takes a tensor and returns a new one, so that it is one call in a graph. (PyTorch's
# own functional ones do not compile inside a nested region in torch 2.11.)
torch.library.define("gpt_stream::all_reduce", "(Tensor x) -> Tensor")
torch.library.define("gpt_stream::all_gather", "(Tensor x, int n) -> Tensor")


@torch.library.impl("gpt_stream::all_reduce", "default")
def all_reduce_default(x):
    if not x.is_cuda:
        return torch.stack(exchange(x)).sum(0)
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@torch.library.register_fake("gpt_stream::all_reduce")
def all_reduce_fake(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.impl("gpt_stream::all_gather", "default")
def all_gather_default(x, n):
    if not x.is_cuda:
        return torch.stack(exchange(x))
    every = x.new_empty(n, *x.shape)
    # Into one tensor: what NCCL gathers for a list of them it copies once more. (Which of the two
    # names is there, and which warns, depends on the version.)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(every.flatten(0, 1), x.contiguous())
    return every


@torch.library.register_fake("gpt_stream::all_gather")
def all_gather_fake(x, n):
    return x.new_empty(n, *x.shape)


def exchange(x: Tensor) -> list[Tensor]:
    """Every rank's x, on CPUs: each sends its own to each. For the few kilobytes of a token that
    takes gloo 0.04 ms between two processes, its all-reduce 0.5 ms; and all ranks add up in the
    same order, to the same bits."""
    x = x.contiguous()
    every = [x if other == rank() else torch.empty_like(x) for other in range(n_ranks())]
    others = [other for other in range(n_ranks()) if other != rank()]
    sent = [dist.isend(x, other) for other in others]
    for other in others:
        dist.recv(every[other], other)
    for message in sent:
        message.wait()
    return every


def all_reduce(x: Tensor, n: int) -> Tensor:
    """The sum of the x of n ranks."""
    return x if n == 1 else torch.ops.gpt_stream.all_reduce(x)


def all_gather(x: Tensor, n: int, size: int) -> Tensor:
    """The x (B, T, V / n) of n ranks side by side; the first `size` count: (B, T, size)."""
    if n == 1:
        return x
    every = torch.ops.gpt_stream.all_gather(x, n)  # (n, B, T, V / n)
    return every.permute(1, 2, 0, 3).flatten(2)[..., :size]


def in_step(ids: Tensor) -> Tensor:
    """Rank 0's ids, on every rank: all go on with the same tokens, however they were drawn, and
    even where unequal machines add up to other last bits."""
    if n_ranks() > 1:
        dist.broadcast(ids, src=0)
    return ids


# ------------------------------------------------------------------------------ slices


def share(config, n: int, group_size: int | None = None):
    """The ModelConfig of one of n ranks. Raises ValueError naming the numbers of ranks that can
    share the model, its int4 groups of columns whole."""
    unit = group_size or 1

    def fits(n):
        return (config.n_heads % n == 0 and config.ffn_dim % (n * unit) == 0
                and (config.n_kv_heads % n == 0 or n % config.n_kv_heads == 0)
                and config.n_heads * config.head_dim % (n * unit) == 0)

    if not fits(n):
        groups = f", in groups of {group_size}" if group_size else ""
        raise ValueError(
            f"{n} processes cannot share {config.n_heads} heads of {config.head_dim}, "
            f"{config.n_kv_heads} key-value heads and {config.ffn_dim} feed-forward columns{groups}"
            f"; {', '.join(str(m) for m in range(1, config.n_heads + 1) if fits(m))} can")
    return dataclasses.replace(
        config, n_ranks=n, n_heads=config.n_heads // n, ffn_dim=config.ffn_dim // n,
        n_kv_heads=max(config.n_kv_heads // n, 1))


def shard(tensor: str, layer, blocks: list[Tensor], config, n: int) -> Tensor:
    """This rank's part of a stored tensor, of a weight, a bias, or of int8's or int4's parts, given
    as the blocks of rows that it stacks or as a whole. layer is its formats.config.Layer, None for
    a norm's; config is the whole model's. Raises ValueError naming what ranks cannot share.

    Parts are slices of memory-mapped tensors: of the file, only their pages are read."""
    owner, _, part = tensor.rpartition(".")
    if layer is None or layer.is_table:
        return blocks[0]
    if part == "order":
        if layer.sharded == "columns":
            raise ValueError(f"{owner} is stored in activation order, in which its groups cannot "
                             f"be shared by {n} processes; one can run it")
        return blocks[0]
    if layer.sharded == "columns":
        return shard_columns(blocks[0], part, n)
    places = [(rank(), n)] * len(layer.parts)  # which part of how many, for each of those stacked
    if layer.sharded == "heads":
        # With more ranks than key-value heads, several hold the same one.
        holders = max(n // config.n_kv_heads, 1)
        places[1:] = 2 * [(rank() // holders, n // holders)]
    number = owner.rpartition(".")[2]
    if number.isdigit():  # one of several that are stored apart
        return nth(blocks[0], *places[int(number)])
    if len(blocks) != len(layer.parts):
        blocks = blocks[0].split(list(layer.parts.values()))
    mine = [nth(block, *place) for block, place in zip(blocks, places, strict=True)]
    return mine[0] if len(mine) == 1 else torch.cat(mine)


def shard_columns(whole: Tensor, part: str, n: int) -> Tensor:
    """This rank's part of a tensor of a layer of which ranks share the inputs: its outputs are
    added up, so that one rank alone adds the bias."""
    if part == "bias":
        return whole if rank() == 0 else torch.zeros_like(whole)
    if whole.ndim == 1:  # a scale for each row
        return whole
    return nth(whole.t(), rank(), n).t().contiguous()


def nth(x: Tensor, index: int, n: int) -> Tensor:
    """Part `index` of n equal ones of x's rows, the last filled up with zeros."""
    size = -(-len(x) // n)
    part = x[index * size:(index + 1) * size]
    return F.pad(part, [0, 0] * (x.ndim - 1) + [0, size - len(part)]) if len(part) < size else part
