"""eval.py --tasks: lm-evaluation-harness's own `hf` model on the same folder is the oracle."""

import functools
import json
import math
import shutil

import pytest
import torch

import model as model_module
from evaluation.harness import score
from generate import load
from helpers import ROOT, TINY, random_model, run
from oracle import Stream
from test_errors import refused

TASKS = ROOT / "tests" / "tasks"
NAMES = ["gpt_stream_questions", "gpt_stream_texts", "gpt_stream_endings"]


@pytest.fixture(scope="module", autouse=True)
def indexed_once():
    """The harness reads the thousands of files of its own tasks once, not for every command."""
    manager = pytest.importorskip("lm_eval.tasks.manager")
    build = manager.TaskIndex.build
    index_of = functools.cache(lambda folder: build([folder]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager.TaskIndex, "build", lambda self, folders: {
            name: entry for folder in folders for name, entry in index_of(folder).items()})
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded model as transformers saves it, which the harness's own model can read."""
    transformers, (ours, _) = pytest.importorskip("transformers"), load(TINY, device="cpu",
                                                                         dtype=torch.float32)
    settings = transformers.LlamaConfig.from_pretrained(TINY)
    del settings.gpt_stream  # which says that a folder has our names
    theirs = transformers.LlamaForCausalLM(settings)
    config, state = ours.config, ours.state_dict()
    named = {"model.embed_tokens.weight": state["embed.weight"],
             "lm_head.weight": state["embed.weight"], "model.norm.weight": state["norm.weight"]}
    for n in range(config.n_layers):
        def of(name, n=n):
            return state[f"layers.{n}.{name}.weight"]

        heads = [count * config.head_dim for count in (config.n_heads, *[config.n_kv_heads] * 2)]
        q, k, v = of("attention.qkv").split(heads)
        gate, up = of("feed_forward.gate_up").chunk(2)
        for name, weight in {
                "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                "self_attn.o_proj": of("attention.out"), "mlp.gate_proj": gate, "mlp.up_proj": up,
                "mlp.down_proj": of("feed_forward.down"),
                "input_layernorm": of("attention_norm"),
                "post_attention_layernorm": of("ffn_norm")}.items():
            named[f"model.layers.{n}.{name}.weight"] = weight
    theirs.load_state_dict(named)
    folder = tmp_path_factory.mktemp("hf")
    theirs.float().save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.model", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>",
         "eos_token": "</s>"}))
    return folder


@pytest.fixture(scope="module")
def evaluated(folder):
    """The samples of all tasks, by our model of the harness and by its own."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from evaluation.harness import harness_model
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    ours = load(folder, device="cpu", dtype=torch.float32)
    models = (harness_model(*ours, 4, 252, batch_size=3),
              HFLM(str(folder), dtype="float32", device="cpu", batch_size=2))
    return [simple_evaluate(lm, tasks=NAMES, task_manager=manager) for lm in models]


def responses(results, name):
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for [response] in sample["resps"]]


@pytest.mark.slow
def test_choices_have_the_log_likelihoods_of_the_harness_s_own_model(evaluated):
    ours, theirs = (responses(results, NAMES[0]) for results in evaluated)
    assert len(ours) == 9
    for (total, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert math.isclose(total, expected, abs_tol=1e-4)
        assert greedy == expected_greedy


@pytest.mark.slow
def test_texts_have_its_rolling_log_likelihoods(evaluated):
    ours, theirs = (responses(results, NAMES[1]) for results in evaluated)
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=1e-6)


@pytest.mark.slow
def test_answers_are_its_answers(evaluated):
    ours, theirs = (responses(results, NAMES[2]) for results in evaluated)
    # Their decoder drops the space before the first word, which ours shows.
    assert [text.removeprefix(" ") for text in ours] == theirs and all(theirs[:3])


@pytest.mark.slow
def test_the_figures_are_the_harness_s_own(evaluated):
    for name in NAMES[:2]:
        ours, theirs = (results["results"][name] for results in evaluated)
        for key, value in theirs.items():
            assert ours[key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float)
                                 else value)


@pytest.mark.slow
def test_the_command_prints_a_record_a_task():
    pytest.importorskip("lm_eval")
    status, out, err = run("eval", "--tasks", ",".join(NAMES[:2]), "--include-path", TASKS,
                           "--json", "--limit", 2, "--num-fewshot", 1, "--window", 60)
    records = {record["task"]: record for record in map(json.loads, out.splitlines())}
    assert status == 0, err
    assert set(records) == set(NAMES[:2]) and records[NAMES[0]]["acc,none"] in (0, 0.5, 1)
    assert "of 2 requests are longer than 4 sinks and a window of 60" not in err
    status, out, err = run("eval", "--tasks", NAMES[1], "--include-path", TASKS, "--window", 20)
    assert status == 0 and "word_perplexity" in out
    assert "2 of 4 requests are longer than 4 sinks and a window of 20" in err


def pairs_of(n_contexts, n_choices, n_shared, seed=0):
    """Contexts that begin with the same ids, several continuations each, in no order."""
    numbers = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(64, (n,), generator=numbers).tolist()

    shared = ids(n_shared)
    contexts = [shared + ids(2 + 7 * n) for n in range(n_contexts)]
    return [(context, ids(1 + 3 * n)) for n in range(n_choices) for context in contexts]


def full_pass(model, context, continuation):
    """(log-probability, whether all are the likeliest) by one pass over everything."""
    logits = model(torch.tensor([context + continuation]))[0, len(context) - 1:-1].double()
    wanted = torch.tensor(continuation)
    return (logits.log_softmax(-1).gather(-1, wanted[:, None]).sum().item(),
            bool((logits.argmax(-1) == wanted).all()))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@torch.no_grad()
def test_rows_side_by_side_score_what_a_full_pass_does(batch_size):
    """Also with continuations longer than a chunk, which cannot be rolled back."""
    model = random_model()
    pairs = pairs_of(5, 4, n_shared=150)
    likeliest = model(torch.tensor([pairs[0][0]]))[0, -1].argmax().item()
    pairs += [(pairs[0][0], [likeliest]), ([7], [9]), (pairs[1][0], pairs[2][0]),
              (pairs[1][0], pairs[3][0] * 2)]
    found = score(model, pairs, 4, 1000, batch_size)
    for (total, greedy), pair in zip(found, pairs, strict=True):
        expected, expected_greedy = full_pass(model, *pair)
        assert total == pytest.approx(expected, abs=2e-3) and greedy == expected_greedy
    assert any(greedy for _, greedy in found)


def test_a_request_past_the_window_is_a_stream_that_goes_on():
    model = random_model(1)
    [(context, continuation)] = pairs_of(1, 1, n_shared=60)
    continuation = (continuation + context)[:40]
    stream, total = Stream(model, 3, 20), 0.0
    logits = [stream.feed(token) for token in context][-1]
    for token in continuation:
        total += logits.log_softmax(-1)[token].item()
        logits = stream.feed(token)
    [(found, _)] = score(model, [(context, continuation)], 3, 20, 4)
    assert found == pytest.approx(total, abs=1e-3)


def test_what_requests_begin_with_is_read_once(monkeypatch):
    """And a context once for all its continuations."""
    model, read, run_model = random_model(), [], model_module.Transformer.run
    monkeypatch.setattr(model_module.Transformer, "run", lambda self, tokens, *rest: (
        read.append(tokens.numel()), run_model(self, tokens, *rest))[1])
    pairs = pairs_of(8, 4, n_shared=500)
    score(model, pairs, 4, 2000, 4)
    own = sum(len(context) - 500 for context, _ in pairs) // 4
    continuations = sum(len(continuation) for _, continuation in pairs)
    assert 500 < sum(read) < 500 + 2 * own + 2 * continuations  # half of it padding at most


@pytest.mark.parametrize("argv, naming", [
    ([], ["--text", "--tasks"]), (["--text", "x", "--tasks", "y"], ["--text", "--tasks"]),
    (["--text", "x", "--limit", "3"], ["--limit goes with --tasks"]),
    (["--text", "x", "--num-fewshot", "3"], ["--num-fewshot goes with --tasks"]),
    (["--text", "x", "--include-path", "y"], ["--include-path goes with --tasks"]),
    (["--tasks", "x", "--plot", "y.png"], ["--plot goes with --text"])])
def test_a_text_or_tasks(argv, naming):
    refused("eval", *argv, naming=naming)


def test_without_the_harness_the_line_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    refused("eval", "--tasks", "arc_easy", naming=["--tasks", "pip install lm_eval"])


@pytest.mark.slow
@pytest.mark.parametrize("argv, naming", [
    (["--tasks", "no_such_task"], ["--tasks no_such_task", "--include-path"]),
    (["--tasks", "arc_easy", "--include-path", "/no/such"], ["/no/such"])])
def test_a_task_that_is_not_there_is_one_line(argv, naming):
    pytest.importorskip("lm_eval")
    refused("eval", *argv, naming=naming)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["huggingface", "remote"])
def test_over_http_the_harness_finds_the_same(folder, evaluated, tokens):
    """Its `local-completions`, which asks for an echo with log-probabilities."""
    pytest.importorskip("fastapi")
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    from test_server import Server
    server = Server("--checkpoint", folder, sizes=("--batch", 4, "--window", 252))
    try:
        lm = LocalCompletionsAPI(
            base_url=f"http://127.0.0.1:{server.port}/v1/completions", model=folder.name,
            tokenizer=str(folder), tokenizer_backend=tokens, add_bos_token=True, batch_size=3)
        over_http = simple_evaluate(lm, tasks=NAMES[:2],
                                    task_manager=TaskManager(include_path=str(TASKS),
                                                             include_defaults=False))
    finally:
        assert server.end() == 0
    for name in NAMES[:2]:
        ours, theirs = responses(over_http, name), responses(evaluated[1], name)
        for found, expected in zip(ours, theirs, strict=True):
            assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-4,
                                  rtol=1e-6)
