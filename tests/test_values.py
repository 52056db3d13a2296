"""Values that nobody asked for: logits that are not finite, weights of any dtype, old and damaged
files, and a stdout that cannot write what is said. Each is one line, and never a traceback."""

import asyncio
import io
import json
import math
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import chat
from cli import make_parser
from convert_hf import convert
from draw import NOT_FINITE
from formats.folder import open_file
from generate import generate, load, make_cache, prefill
from helpers import TINY, as_on_a_gpu, hf_model, random_model, run
from sample import Sampling
from streams import Batch, Prompt, generate_batch
from terminal import show, user_errors
from test_errors import refused

WINDOW = 28

# ------------------------------------------------------------------------------ logits


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files for the programs that read one."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "prompts.jsonl").write_text('{"turns": ["Tell me of the cat.", "A dog?"]}\n' * 2)
    (folder / "text.txt").write_text("The cat sat on the mat. " * 30)
    return folder


def changed(folder, change, source=TINY):
    """A copy of the embedded checkpoint with its weights changed."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def arguments(program, texts):
    return {"generate": ["--prompt", "The cat"], "eval": ["--text", texts / "text.txt"]}.get(
        program, ["--prompts", texts / "prompts.jsonl"])


@pytest.mark.parametrize("program, how", [
    ("generate", "greedy"), ("generate", "sampled"), ("generate", "penalized"),
    ("chat", "sampled"), ("batch", "sampled"), ("eval", None)])
def test_a_dtype_in_which_a_model_overflows_is_one_line(program, how, texts, tmp_path):
    """The scaled weights fit fp16, and what they make of numbers does not."""
    def louder(weights):
        weights["layers.2.ffn_norm.weight"] *= 3e4

    folder = changed(tmp_path / "loud", louder)
    argv = [*arguments(program, texts), "--checkpoint", folder, "--device", "cpu"]
    if how:
        argv += ["--max-new-tokens", 5, "--seed", 1, *{
            "greedy": ["--temperature", 0], "sampled": ["--top-k", 5],
            "penalized": ["--repetition-penalty", 1.2]}[how]]
    refused(program, *argv, "--dtype", "fp16", naming=["NaN or infinite", "--dtype"])
    for dtype in ("fp32", "bf16"):
        status, out, err = run(program, *argv, "--dtype", dtype, "--json")
        assert status == 0, err
        assert "NaN" not in out and "Infinity" not in out


def test_batch_py_finishes_the_other_answers_and_then_says_which_broke_off(tmp_path):
    token_id = 1234  # which no other prompt has

    def poison(weights):
        weights["output.weight"] = weights["embed.weight"].clone()
        weights["embed.weight"][token_id] = math.nan

    folder = changed(tmp_path / "poisoned", poison)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": False}))
    _, tokenizer = load(TINY, device="cpu")
    word = "the " + tokenizer.decode([token_id])
    assert token_id in tokenizer.encode(word)
    lines = ["The cat", word, "A dog"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": x}) + "\n" for x in lines))
    shared = ["--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 9, "--temperature", 0,
              "--dtype", "fp32", "--device", "cpu"]
    status, out, err = run("batch", "--checkpoint", folder, *shared)
    assert status == 2 and "Traceback" not in err
    assert "1 of 3 prompts broke off, prompt 1 the first" in err.splitlines()[-1]
    expected = {json.loads(line)["index"]: json.loads(line)["token_ids"]
                for line in run("batch", "--checkpoint", TINY, *shared)[1].splitlines()}
    found = {json.loads(line)["index"]: json.loads(line)["token_ids"] for line in out.splitlines()}
    assert found == {index: expected[index] for index in (0, 2)}


def poisoned():
    """A model that knows no answer to token 63, whose embedding is NaN."""
    model = random_model()
    model.embed.weight[63] = math.nan
    return model


@pytest.mark.parametrize("way", ["cpu", "gpu"])
def test_a_row_without_a_token_ends_and_disturbs_no_other(way, monkeypatch):
    """Be it in its prompt or its answer, read alone or beside others; rows are used again."""
    if way == "gpu":
        as_on_a_gpu(monkeypatch)
    model = poisoned()
    hows = [Sampling(), Sampling(0.8, seed=1), Sampling(1.0, top_p=0.9, seed=2),
            Sampling(0.9, top_k=7, presence_penalty=0.5, seed=3)]
    good = [Prompt([n + 1, n + 2, 3], how, 12, ()) for n, how in enumerate(hows)]
    bad = [Prompt([5, 63, 6], how, 12, (), logprobs=n or None) for n, how in enumerate(hows)]
    mixed = [one for pair in zip(good, bad) for one in pair] + good
    for batch_size in (1, 3):
        said = {}
        for stream, token_id in generate_batch(model, mixed, batch=Batch(model, batch_size, 4, 24)):
            said.setdefault(stream.index, []).append(token_id)
            if token_id is None:
                assert stream.error == (NOT_FINITE if 63 in stream.prompt.ids else "")
        for index, prompt in enumerate(mixed):
            alone = generate(model, make_cache(model, 4, 24), prompt.ids, 12, stop_ids=(),
                             sampling=prompt.sampling)
            assert said[index] == ([None] if prompt in bad else [*alone, None])


def test_an_answer_keeps_what_was_said_before_its_logits_broke():
    model, calls = random_model(), []
    step = model.step
    model.step = lambda *a: calls.append(1) or step(*a) * (math.inf if len(calls) == 7 else 1)
    plain = list(generate(random_model(), make_cache(model, 4, WINDOW), [1, 2], 20, stop_ids=()))
    said = []
    with pytest.raises(ValueError, match="NaN or infinite"):
        for token_id in generate(model, make_cache(model, 4, WINDOW), [1, 2], 20, stop_ids=()):
            said.append(token_id)
    assert said == plain[:6]  # the first comes of the prompt


# ------------------------------------------------------------------------------ the server


@pytest.fixture
def engine():
    pytest.importorskip("fastapi")
    from server.engine import Engine
    model, tokenizer = load(TINY, device="cpu", dtype=torch.float32)
    table = model.embed.weight.clone()  # the output keeps its own
    table[1234] = math.nan
    model.embed.weight = torch.nn.Parameter(table, requires_grad=False)
    engine = Engine(model, tokenizer, 3, window=60).start()
    yield engine
    engine.stop()
    assert engine.ended.wait(20)


async def complete(engine, ids, **fields):
    """(status, body) of a completion, as the HTTP side answers it."""
    from server.jobs import make_jobs
    from server.protocol import ApiError, parse_request
    from server.responses import ResponseWriter
    body = {"model": "m", "prompt": ids, "temperature": 0, "max_tokens": 12, **fields}
    request = parse_request(json.dumps(body).encode(), False, "m", 500)
    jobs, writer = make_jobs(engine, request, ""), ResponseWriter(request, "m", "")
    try:
        async for events in engine.submit(jobs):
            writer.add(events)
        return 200, json.dumps(writer.completion(jobs)["choices"])
    except ApiError as error:
        return error.status, json.dumps(error.body)
    finally:
        engine.cancel(jobs)


def test_a_request_whose_logits_are_not_finite_has_an_error_and_others_their_answers(engine):
    async def both(*prompts, **fields):
        return await asyncio.gather(*[complete(engine, ids, **fields) for ids in prompts])

    good, bad = [300, 301, 302], [300, 1234, 302]
    for fields in ({}, {"logprobs": 5}, {"n": 3, "temperature": 0.9, "seed": 1, "stream": True}):
        [expected] = asyncio.run(both(good, **fields))
        answers = asyncio.run(both(good, bad, good, [bad, good], **fields))
        assert [status for status, _ in answers] == [200, 500, 200, 500]
        texts = [[choice["text"] for choice in json.loads(body)]
                 for status, body in (expected, *answers) if status == 200]
        assert texts[0] == texts[1] == texts[2]
        for _, body in answers:
            assert "NaN" not in body.replace("are NaN or", "") and "Infinity" not in body
        assert "--dtype" in answers[1][1] and "server_error" in answers[1][1]
    assert engine.state() == "ok"


def test_a_masked_token_s_logprob_is_a_number_in_json(engine):
    """-inf is no JSON; OpenAI writes -9999."""
    finish = engine.model.finish
    keep = torch.zeros(4096).index_fill_(0, torch.tensor([300, 301]), 1).bool()
    engine.model.finish = lambda *a: finish(*a).masked_fill(~keep, -math.inf)
    status, body = asyncio.run(complete(engine, [300, 301], logprobs=5))
    likeliest = json.loads(body, parse_constant=pytest.fail)[0]["logprobs"]["top_logprobs"]
    assert status == 200 and all(-9999.0 in each.values() for each in likeliest)


# ------------------------------------------------------------------------------ weights


SIZES = dict(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
             initializer_range=0.2)
DTYPES = {  # every one that safetensors writes; what becomes of a weight that has it
    torch.float64: "computed", torch.float32: "computed", torch.float16: "computed",
    torch.bfloat16: "computed", **dict.fromkeys(
        [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz,
         torch.float8_e5m2fnuz, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
         torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64], "refused")}
OUT = {"ours": "layers.0.attention.out.weight", "hf": "model.layers.0.self_attn.o_proj.weight"}


@pytest.fixture(scope="module")
def both_kinds(tmp_path_factory):
    """A folder of transformers', and it converted."""
    folder = tmp_path_factory.mktemp("both")
    hf_model("Llama", **SIZES).save_pretrained(folder / "hf")
    shutil.copy(TINY / "tokenizer.model", folder / "hf")
    convert(folder / "hf", folder / "ours")
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["hf", "ours"])
def test_a_weight_of_any_dtype_is_computed_with_or_named(kind, dtype, both_kinds, tmp_path):
    for only in ([OUT[kind]], None):
        def cast(weights, names=only):
            for one in names or list(weights):
                weights[one] = weights[one].abs().float().to(dtype)

        folder = changed(tmp_path / str(only), cast, both_kinds / kind)
        raw = json.loads((folder / "config.json").read_text())
        raw.pop("dtype")  # so that the weights decide
        (folder / "config.json").write_text(json.dumps(raw))
        if DTYPES[dtype] == "refused":
            with pytest.raises(ValueError, match=f"tensor .* holds {dtype}") as raised:
                load(folder, device="cpu")
            assert "\n" not in str(raised.value) and (not only or only[0] in str(raised.value))
            continue
        model, _ = load(folder, device="cpu")
        wanted = torch.float32 if only or dtype == torch.float64 else dtype
        assert {weight.dtype for weight in model.parameters()} == {wanted}
        exact, _ = load(folder, device="cpu", dtype=torch.float32)
        logits = [prefill(one, make_cache(one, 4, WINDOW), [7, 8, 9]) for one in (model, exact)]
        assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[1].abs().max()


def test_a_pickle_from_before_zip_archives_is_refused_unread(both_kinds, tmp_path, monkeypatch):
    folder = shutil.copytree(both_kinds / "hf", tmp_path / "old")
    weights, path = load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save(weights, path)
    assert load(folder, device="cpu")[0].config.n_layers == 1
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    monkeypatch.setattr("torch.load", lambda *a, **k: pytest.fail("unpickled"))
    refused("generate", "--checkpoint", folder, naming=[path, "PyTorch 1.6", "model.safetensors"])


@pytest.mark.parametrize("odd", [
    {"a": torch.ones(4).to_sparse()}, {"a": torch.ones(4, device="meta")}, {3: torch.ones(4)},
    {"a": torch._neg_view(torch.ones(4))}, {"a": torch.ones(2, dtype=torch.complex64).conj()},
    {"state_dict": {"a": torch.ones(4)}}], ids=["sparse", "meta", "number", "negated",
                                                 "conjugate", "nested"])
def test_a_bin_file_of_what_is_no_plain_tensor_is_refused(odd, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(odd, path)
    with pytest.raises(ValueError, match="pytorch_model.bin.* other things than plain tensors"):
        open_file(path)


def test_damaged_archives_are_one_line_or_tensors(tmp_path):
    """Cut anywhere, or with a byte changed anywhere."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3, 4), "b": torch.arange(5)}, path)
    whole, numbers = path.read_bytes(), torch.Generator().manual_seed(0)
    refusals = 0
    for n in range(300):
        at = int(torch.randint(len(whole), (), generator=numbers))
        value = int(torch.randint(256, (), generator=numbers))
        path.write_bytes(whole[:at] if n % 3 == 0 else whole[:at] + bytes([value]) + whole[at + 1:])
        try:
            open_file(path)
        except ValueError as error:
            refusals += 1
            assert str(error).startswith(f"{path}: damaged or not a weights file: ")
            assert "\n" not in str(error)
    assert refusals > 100


# ------------------------------------------------------------------------------ stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_stdout_s_encoding_lacks_is_written_as_an_escape(encoding, monkeypatch):
    text, written = "A caf\u00e9 \u2014 \u4f60\u597d \U0001f642\n", io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, write_through=True))
    with user_errors(make_parser("What it is.\n\n    python x.py")):
        show(text)
    assert written.getvalue() == text.encode(encoding, "backslashreplace")


def test_a_conversation_outlives_streams_that_are_not_utf_8(tmp_path, monkeypatch, capsys):
    """Typed in UTF-8, which ASCII cannot read either; and it is saved at its end."""
    written, typed = io.BytesIO(), io.BytesIO("H\u00e9llo \u4f60\nHello\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, "ascii"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    monkeypatch.setattr("tokenizer.GeneratedText.flush", lambda said: " caf\u00e9 \u4f60")
    monkeypatch.setattr(sys, "argv", ["chat.py", "--checkpoint", str(TINY), "--max-new-tokens", "3",
                                      "--save-session", str(tmp_path / "it.session")])
    chat.main()
    said = capsys.readouterr().err
    assert "not UTF-8 text" in said and "turn 0" in said and (tmp_path / "it.session").exists()
    assert written.getvalue().decode("ascii").endswith(" caf\\xe9 \\u4f60\n")
