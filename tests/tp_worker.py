"""What test_tp.py runs under torchrun, and once more in a single process to compare with.

    torchrun --nproc-per-node 2 tests/tp_worker.py FOLDER [CHECKPOINT ...]

FOLDER holds the checkpoint "wide"; rank 0 leaves its findings there as ranks-N.safetensors. Of
checkpoints that are named (see of_folders), these are the logits alone."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import tp  # noqa: E402
from draw import sample  # noqa: E402
from generate import generate, load, make_cache, warm, weight_bytes  # noqa: E402
from grammar import Grammar  # noqa: E402
from helpers import TINY, run  # noqa: E402
from sample import Sampling  # noqa: E402
from speculate import Speculation  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

DRAFT = TINY.parent / "tiny-draft"
CASES = {"wide": ("wide", None), "wide-int8": ("wide", "int8"), "wide-int4": ("wide", "int4"),
         "wide-int4-file": ("wide-int4", None), "tied": (TINY, None), "tied-int8": (TINY, "int8")}
PROMPT = list(range(300, 330))
QUICK = ["--max-new-tokens", 30, "--temperature", 0, "--dtype", "fp32", "--window", 20, "--json",
         "--device", "cpu"]


def cases() -> list[str]:
    return [name for name in CASES if tp.n_ranks() < 4 or name.startswith("wide")]


def findings(folder: Path) -> dict[str, torch.Tensor]:
    """Logits and greedy tokens of every case, by name."""
    found = {}
    for name in cases():
        checkpoint, quantize = CASES[name]
        model, _ = load(folder / checkpoint, device="cpu", dtype=torch.float32, quantize=quantize)
        tokens = torch.randint(0, 500, (3, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found[f"{name} logits"] = model(tokens, make_cache(model, 4, 12, batch_size=3))
        cache = make_cache(model, 4, 12)
        found[f"{name} bytes"] = torch.tensor([weight_bytes(model), cache.nbytes()])
        found[f"{name} tokens"] = said(model, cache)
    model, _ = load(TINY, device="cpu", dtype=torch.float32)
    draft, _ = load(DRAFT, device="cpu", dtype=torch.float32, parallel=False)
    for name, speculation in (("draft", Speculation(draft, make_cache(draft, 4, 30), 3)),
                              ("lookup", Speculation(fixed=4))):
        found[f"{name} tokens"] = said(model, make_cache(model, 4, 12), speculation=speculation)
        found[f"{name} accepted"] = torch.tensor(speculation.accepted)
    found["sampled tokens"] = said(model, make_cache(model, 4, 12), temperature=0.9, top_p=0.9,
                                   seed=5)
    grammar = Grammar(Tokenizer(TINY), model.config.vocab_size, regex="[a-z ]{30,40}(yes|no)")
    found["grammar tokens"] = torch.tensor(list(generate(
        model, make_cache(model, 4, 12), PROMPT, 40, sampling=Sampling(1.5, seed=5,
                                                                       grammar=grammar))))
    return found


def of_the_traffic(folder: Path) -> dict[str, torch.Tensor]:
    """Bytes of each thing that a rank tells the others for a token, counted."""
    model, _ = load(folder / "wide", device="cpu", dtype=torch.bfloat16)
    cache = make_cache(model, 4, 12)
    sent = []

    def exchange(x, original=tp.exchange):
        sent.append(x.nbytes)
        return original(x)

    def broadcast(x, src, original=torch.distributed.broadcast):
        sent.append(x.nbytes)
        return original(x, src)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(tp, "exchange", exchange)
        patch.setattr(torch.distributed, "broadcast", broadcast)
        sample(model(torch.tensor([[7]]), cache))
    return {"traffic": torch.tensor(sent)}


def said(model, cache, **options) -> torch.Tensor:
    return torch.tensor(list(generate(model, cache, PROMPT, 40, stop_ids=(), **options)))


def of_the_compiled() -> dict[str, torch.Tensor]:
    from torch._dynamo.utils import counters
    model, _ = load(TINY, device="cpu", dtype=torch.float32, compile=True)
    cache = make_cache(model, 4, 12)
    warm(model, cache)
    with torch._dynamo.config.patch(error_on_recompile=True):
        tokens = said(model, cache)
    return {"compiled tokens": tokens, "graph breaks": torch.tensor(len(counters["graph_break"]))}


def of_the_programs(folder: Path) -> dict[str, torch.Tensor]:
    """What the programs print, as bytes."""
    runs = {"generate": run("generate", *QUICK, "--draft", DRAFT),
            "chat": run("chat", *QUICK, "--lookup", stdin=f"Hello\nAnd you?\n/save {folder}/s\n"),
            "batch": run("batch", *QUICK, "--batch", 3, "--prompts", folder / "prompts.jsonl"),
            "cuda": run("generate", "--device", "cuda:0"),
            "session": run("chat", *QUICK, "--save-session", folder / "s")}
    return {name: torch.tensor(list(json.dumps(result).encode()), dtype=torch.uint8)
            for name, result in runs.items()}


def of_a_checkpoint_that_one_rank_lacks(folder: Path) -> dict[str, torch.Tensor]:
    try:
        load(folder / ("wide" if tp.rank() == 0 else "nowhere"), device="cpu")
    except ValueError as error:
        reports = tp.all_gather_texts(str(error))
        return {"lacking": torch.tensor(list("\n".join(reports).encode()), dtype=torch.uint8)}
    return {}


def of_folders(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Logits of checkpoints in the folder, each named CHECKPOINT[+ADAPTER][=int8|=int4]."""
    found, tokens = {}, torch.arange(5, 35)[None]
    for name in names:
        checkpoint, *adapters = name.partition("=")[0].split("+")
        model, _ = load(folder / checkpoint, device="cpu", dtype=torch.float32,
                        quantize=name.partition("=")[2] or None,
                        adapters=[folder / adapter for adapter in adapters])
        with torch.no_grad():
            found[name] = model(tokens, make_cache(model, 4, 40))
    return found


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    found = of_folders(folder, names) if names else findings(folder) | of_the_traffic(folder)
    if tp.n_ranks() == 2 and not names:
        found |= of_the_compiled() | of_the_programs(folder)
        found |= of_a_checkpoint_that_one_rank_lacks(folder)
    if tp.rank() == 0:
        found = {name: tensor.contiguous() for name, tensor in found.items()}
        save_file(found, folder / f"ranks-{tp.n_ranks()}.safetensors")
    tp.barrier()
