"""Tensor parallelism: real processes, which have to say what one says."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

import tp
import tp_worker
from convert_hf import convert
from generate import load
from helpers import ONE_THREAD, ROOT, TINY, TORCHRUN, random_model, run
from model import ModelConfig
from quantize import asked_quantization

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """"wide": fewer key-value heads than four ranks, biases, a vocabulary that does not divide."""
    folder = tmp_path_factory.mktemp("tp")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=509, hidden_size=64, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        initializer_range=0.15, attention_bias=True, mlp_bias=True, eos_token_id=None))
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data.add_(0.3 * torch.randn(weight.shape))
    model.save_pretrained(folder / "wide")
    shutil.copy(TINY / "tokenizer.model", folder / "wide")
    convert(folder / "wide", folder / "wide-int4", None, asked_quantization("int4", 32))
    prompts = [json.dumps({"prompt": "The cat " * n}) for n in (1, 9, 3, 20, 2)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    return folder


@pytest.fixture(scope="module")
def one(folder):
    return tp_worker.findings(folder) | tp_worker.of_the_programs(folder)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, folder):
    n = request.param
    subprocess.run([*TORCHRUN, "--nproc-per-node", str(n), ROOT / "tests" / "tp_worker.py", folder],
                   env=ONE_THREAD, check=True, timeout=300, capture_output=True)
    return n, load_file(folder / f"ranks-{n}.safetensors")


def test_logits_and_greedy_tokens_equal_one_process(one, ranks):
    n, found = ranks
    names = [name for name in tp_worker.CASES if f"{name} logits" in found]
    assert len(names) == {2: 6, 4: 4}[n]
    for name in names:
        assert (found[f"{name} logits"] - one[f"{name} logits"]).abs().max() < 1e-4, name
        assert torch.equal(found[f"{name} tokens"], one[f"{name} tokens"]), name
    for name in ("draft", "lookup", "sampled", "grammar"):
        assert torch.equal(found[f"{name} tokens"], one[f"{name} tokens"]), name
    for name in ("draft", "lookup"):
        assert found[f"{name} accepted"] == one[f"{name} accepted"] > 0


def test_a_rank_holds_its_share_of_weights_and_cache(one, ranks):
    n, found = ranks
    weights, cache = (found["wide bytes"] / one["wide bytes"]).tolist()
    assert cache == 1 / 2  # two key-value heads, each held twice by four ranks
    assert 1 / n < weights < 1 / n + 0.2  # the embedding and such copies are what is above
    if n == 2:  # a rank's part of a tied output is a view of its whole embedding
        embed = load(TINY, device="cpu", dtype=torch.float32)[0].embed.weight.nbytes
        whole, own = (it["tied bytes"][0].item() for it in (one, found))
        assert embed + (whole - embed) / 2 <= own < embed + (whole - embed) / 2 + 20_000  # norms


def test_a_token_costs_two_sums_a_layer_a_gather_and_a_broadcast(ranks):
    n, found = ranks
    layers, dim, vocab, bf16 = 3, 64, 509, 2
    gathered = -(-vocab // n) * bf16
    assert found["traffic"].tolist() == [dim * bf16] * 2 * layers + [gathered, 8]


def test_compiled_it_is_one_graph_that_is_never_compiled_again(one, ranks):
    n, found = ranks
    if n == 2:
        assert torch.equal(found["compiled tokens"], one["tied tokens"])
        assert found["graph breaks"] == 0


def test_the_programs_say_what_one_process_says(one, ranks):
    n, found = ranks
    if n != 2:
        return
    for name in ("generate", "chat", "batch"):
        theirs, ours = (json.loads(bytes(it[name].tolist())) for it in (one, found))
        assert theirs[0] == ours[0] == 0, ours[2]
        theirs, ours = ([json.loads(line) for line in it[1].splitlines() if line]
                        for it in (theirs, ours))
        assert [r["token_ids"] for r in ours] == [r["token_ids"] for r in theirs] != []
        assert ours[0]["cache_bytes"] * 2 == theirs[0]["cache_bytes"]
    for name, words in (("cuda", "under torchrun"), ("session", "work without torchrun")):
        status, _, err = json.loads(bytes(found[name].tolist()))
        assert status == 2 and words in err and "Traceback" not in err
    assert "/save works without torchrun" in json.loads(bytes(found["chat"].tolist()))[2]


def test_a_checkpoint_that_one_rank_cannot_read_is_an_error_on_all(ranks):
    n, found = ranks
    if n == 2:
        first, second = bytes(found["lacking"].tolist()).decode().splitlines()
        assert first.startswith("rank 1: ") and "no such checkpoint folder" in first
        assert "no such checkpoint folder" in second


@pytest.mark.parametrize("n, group_size, able", [(3, None, "1, 2, 4, 8"), (8, 32, "1, 2, 4"),
                                                 (16, None, "1, 2, 4, 8")])
def test_a_number_of_ranks_that_does_not_divide_names_those_that_do(n, group_size, able):
    config = dataclasses.replace(random_model().config, n_heads=8, n_kv_heads=2, head_dim=16,
                                 ffn_dim=256)
    with pytest.raises(ValueError, match=f"{n} processes cannot share 8 heads.*; {able} can"):
        tp.shard_config(config, n, group_size)
    assert isinstance(tp.shard_config(config, 4, group_size), ModelConfig)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_agents_that_meet_over_loopback_stand_for_two_machines():
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "x",
            "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    agents = [subprocess.Popen(
        [*TORCHRUN, *meet, "--rdzv-conf", f"is_host={host}", "generate.py",
         *map(str, tp_worker.QUICK)], cwd=ROOT, env=ONE_THREAD, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True) for host in (1, 0)]
    said = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    [line] = [line for out, _ in said for line in out.splitlines()]  # rank 0 alone prints
    status, alone, _ = run("generate", *tp_worker.QUICK)
    assert json.loads(line)["token_ids"] == json.loads(alone)["token_ids"]


def children(pid):
    out = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return [int(word) for word in out.stdout.split()]


@pytest.mark.parametrize("whom, number", [
    ("a rank", signal.SIGKILL), ("a rank", signal.SIGTERM), ("torchrun", signal.SIGKILL),
    ("torchrun", signal.SIGTERM), ("all", signal.SIGINT)])
def test_faults_end_every_rank_soon(whom, number, tmp_path):
    argv = [*TORCHRUN, "--nproc-per-node", "2", "generate.py", "--device", "cpu", "--ignore-eos",
            "--max-new-tokens", "1000000"]
    with open(tmp_path / "out", "w") as out:
        run = subprocess.Popen(argv, cwd=ROOT, env=ONE_THREAD, stdout=out,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    ranks = []
    try:
        until(lambda: (tmp_path / "out").stat().st_size, seconds=120)  # it is in the middle of it
        ranks += children(run.pid)
        assert len(ranks) == 2
        if whom == "all":  # as a terminal does
            os.killpg(run.pid, number)
        else:
            os.kill(ranks[1] if whom == "a rank" else run.pid, number)
        until(lambda: not any(map(is_running, ranks)))
        assert run.wait(timeout=30) != 0
    finally:
        for pid in [run.pid, *ranks] if run.poll() is None or any(map(is_running, ranks)) else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def until(done, seconds=30):
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)  # a ps takes some of it


def is_running(pid):
    """What nobody waits for here, without a process 1 that does, stays as a zombie."""
    out = subprocess.run(["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True)
    return out.stdout.strip()[:1] not in ("", "Z")
