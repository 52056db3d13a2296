"""Tensor parallelism (Megatron-LM, Shoeybi et al., 2019, section 3) over torch.distributed.

    torchrun --nproc-per-node 2 generate.py --compile

Every process (a "rank") holds a shard of every layer: some heads of the attention, with their part
of the cache, and some hidden units of the feed-forward. Of both, the first product is sharded by
its outputs and the second by its inputs (Megatron's column- and row-parallel layers), so that one
all-reduce after each second product is all the traffic of a layer. The output projection is sharded
by vocabulary and its logits are gathered. Every rank holds the whole embedding: a step reads one
row of it, and a shard would cost another all-reduce.

NCCL carries the tensors of GPUs, gloo those of CPUs. torchrun starts the processes, on one machine
or on several; this file reads only the environment variables that it sets.
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
    """Join torchrun's process group, once, and return the device of this rank. Without torchrun
    that is `device` itself. Raises ValueError when the machine has fewer GPUs than ranks."""
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
        torch.cuda.set_device(local_rank())  # NCCL uses the current device
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        text_group()
        if not on_gpu:  # destroying NCCL's group would wait for ever for CUDA graphs that use it
            atexit.register(dist.destroy_process_group)
    return device or "cpu"


@functools.cache
def text_group() -> dist.ProcessGroup:
    """The process group for texts. Its timeout is long, since a person may be typing one; a lost
    rank is noticed all the same."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))


def barrier() -> None:
    """A barrier before a rank exits: gloo may lose the last message of a process that has gone.
    A rank that exits because of an error does not wait."""
    if n_ranks() > 1 and dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.barrier(group=text_group())


def broadcast_text(text: str) -> str:
    """Broadcast rank 0's text."""
    return text if n_ranks() == 1 else all_gather_texts(text)[0]


def broadcast_ids(ids: list) -> list:
    """Broadcast rank 0's token ids. A chat template may hold the date, on which machines may
    differ."""
    return ids if n_ranks() == 1 else json.loads(broadcast_text(json.dumps(ids)))


def all_gather_texts(text: str) -> list[str]:
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
def raise_on_all_ranks():
    """Raise on all ranks when the block raises on one, so that none waits for a rank that left.
    A rank that did not fail itself raises ValueError with the first failed rank's message."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if n_ranks() > 1:
        mine = str(failure) or type(failure).__name__ if failure else ""
        every = enumerate(all_gather_texts(mine))
        reports = [f"rank {number}: {report}" for number, report in every if report]
        if reports:
            barrier()
        if reports and not failure:
            raise ValueError(reports[0])
    if failure:
        raise failure


# ------------------------------------------------------------------------------ in the model

# A collective takes a tensor and returns a new one, so it is one call in a graph. PyTorch's own
# functional collectives do not compile inside a nested region in torch 2.11.
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
    # NCCL gathers into one tensor; for a list of tensors it would copy once more. The version of
    # PyTorch decides which of the two names exists without a warning.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(every.flatten(0, 1), x.contiguous())
    return every


@torch.library.register_fake("gpt_stream::all_gather")
def all_gather_fake(x, n):
    return x.new_empty(n, *x.shape)


def exchange(x: Tensor) -> list[Tensor]:
    """Every rank's x, in the order of the ranks, on CPUs: each rank sends its own to each other.
    For the few kilobytes of a token that is faster than gloo's all-reduce. All ranks then add up
    in one order, so their sums are equal to the bit."""
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
    """The sum of the x of n ranks, in x's shape."""
    return x if n == 1 else torch.ops.gpt_stream.all_reduce(x)


def all_gather(x: Tensor, n: int, size: int) -> Tensor:
    """The x (B, T, V / n) of n ranks along the vocabulary, without the padding beyond `size`:
    (B, T, size)."""
    if n == 1:
        return x
    every = torch.ops.gpt_stream.all_gather(x, n)  # (n, B, T, V / n)
    return every.permute(1, 2, 0, 3).flatten(2)[..., :size]


def broadcast_tokens(ids: Tensor) -> Tensor:
    """Broadcast rank 0's ids, so that all ranks go on with the same tokens. Unequal machines may
    compute logits that differ in the last bits, and then draw other tokens."""
    if n_ranks() > 1:
        dist.broadcast(ids, src=0)
    return ids


# ------------------------------------------------------------------------------ shards


def shard_config(config, n: int, group_size: int | None = None):
    """The ModelConfig of one of n ranks, for the whole model's config. Raises ValueError naming the
    numbers of ranks that can share the model. group_size is that of its int4 weights: no shard
    may cut a group of columns."""
    unit = group_size or 1

    if config.norm_all_heads:
        raise ValueError(f"a model whose q/k norms are over all heads together (OLMo 3) cannot be "
                         f"shared by {n} processes; one can run it")

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
    """This rank's shard of a stored tensor: of a weight or a bias, or of an int8 or int4 weight's
    scales and zeros. `blocks` is what the tensor stacks (q, k, v or gate, up), or the whole as its
    only block. layer is the tensor's formats.config.Layer, None for a norm's; config is the whole
    model's. Raises ValueError naming what ranks cannot share.

    A shard is a slice of a memory-mapped tensor, so only its pages of the file are read."""
    owner, _, part = tensor.rpartition(".")
    if layer is None or layer.is_table:
        return blocks[0]
    if part == "order":
        if layer.sharded == "inputs":
            raise ValueError(f"{owner} is stored in activation order, in which its groups cannot "
                             f"be shared by {n} processes; one can run it")
        return blocks[0]
    if layer.sharded == "inputs":
        return shard_inputs(blocks[0], part, n)
    # Of each of the stacked parts, this rank holds one shard of several: (which, of how many).
    places = [(rank(), n)] * len(layer.rows)
    if layer.sharded == "heads":
        # With more ranks than key-value heads, several ranks hold the same head.
        holders = max(n // config.n_kv_heads, 1)
        places[1:] = 2 * [(rank() // holders, n // holders)]
    number = owner.rpartition(".")[2]
    if number.isdigit():  # layers of different kinds (layers.ConcatLinear) are stored apart
        return shard_rows(blocks[0], *places[int(number)])
    if len(blocks) != len(layer.rows):
        blocks = blocks[0].split(layer.rows)
    mine = [shard_rows(block, *place) for block, place in zip(blocks, places, strict=True)]
    return mine[0] if len(mine) == 1 else torch.cat(mine)


def shard_inputs(whole: Tensor, part: str, n: int) -> Tensor:
    """This rank's part of a tensor of a layer of which ranks share the inputs: its outputs are
    added up, so that one rank alone adds the bias."""
    if part == "bias":
        return whole if rank() == 0 else torch.zeros_like(whole)
    if whole.ndim == 1:  # a scale for each row
        return whole
    return shard_rows(whole.t(), rank(), n).t().contiguous()


def shard_rows(x: Tensor, index: int, n: int) -> Tensor:
    """Shard `index` of n equal ones of x's rows. The last shards are padded with zero rows."""
    size = -(-len(x) // n)
    rows = x[index * size:(index + 1) * size]
    if len(rows) == size:
        return rows
    return F.pad(rows, [0, 0] * (x.ndim - 1) + [0, size - len(rows)])
