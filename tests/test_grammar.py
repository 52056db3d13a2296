"""Structured output: what ends by itself fits, read by jsonschema, re and Python's own parsers."""

import json
import math
import re
import sys

import pytest
import torch

import grammar as program
from draw import UNDRAWN, RowSampler
from formats.hub import CHECKPOINTS
from generate import generate, load, make_cache
from grammar import Grammar, token_bytes, vocabulary
from helpers import TINY, as_on_a_gpu, random_model, run
from sample import Sampling
from streams import Batch, Prompt, generate_batch
from test_errors import refused
from test_tokenizer import byte_level, metaspace  # noqa: F401  (fixtures)
from tokenizer import Tokenizer

pytest.importorskip("llguidance")
check_answers = pytest.importorskip("schemas", reason="needs pip install jsonschema").check_answers
SMOLLM2 = CHECKPOINTS / "smollm2-135m-instruct"
PERSON = {"type": "object", "additionalProperties": False, "required": ["name", "age"],
          "properties": {"name": {"type": "string", "maxLength": 12},
                         "age": {"type": "integer", "minimum": 0, "maximum": 150}}}


@pytest.fixture(scope="module")
def tiny():
    """A model with random weights and the embedded model's tokenizer, of sentencepiece's kind."""
    return random_model(vocab_size=4096, eos_ids=(2,)), Tokenizer(TINY)


@pytest.fixture
def bytes_model(byte_level):  # noqa: F811
    """The same with a tokenizer.json, and ids that it does not have."""
    tokenizer = Tokenizer(byte_level)
    size = tokenizer.vocabulary.library.get_vocab_size() + 7
    return random_model(vocab_size=size, eos_ids=(tokenizer.specials["<|im_end|>"],)), tokenizer


def answer(model, tokenizer, sampling, n=200, prompt=(1, 5, 9), **options):
    """(text, whether it ended by itself) of an answer."""
    ids = list(generate(model, make_cache(model, 4, 200), list(prompt), n, sampling=sampling,
                        **options))
    ended = ids[-1] in model.config.eos_ids
    return tokenizer.decode(ids[:-1] if ended else ids), ended


def text_with(pair, temperature=1.5, seed=1, **source):
    model, tokenizer = pair
    grammar = Grammar(tokenizer, model.config.vocab_size, **source)
    text, ended = answer(model, tokenizer, Sampling(temperature, seed=seed, grammar=grammar))
    assert ended, text
    return text


# ------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("kind", ["tiny", "byte_level", "metaspace"])
def test_the_bytes_of_tokens_are_the_text_of_answers(kind, request):
    folder = TINY if kind == "tiny" else request.getfixturevalue(kind)
    tokenizer = Tokenizer(folder)
    texts = token_bytes(tokenizer, 5000)
    for text in ("Hello, world:  two", "Größe 数量 🎈\n\ttab", '{"a": [1, 2.5e3, null]}'):
        ids = tokenizer.encode(text, bos=False)
        assert b"".join(texts[i] for i in ids).decode() == tokenizer.decode(ids)
    assert texts[4999] == b"" and not any(texts[i] for i in tokenizer.hidden_ids)


@pytest.mark.released
@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs SmolLM2: python -m formats.hub smollm2")
def test_the_table_of_tokens_is_that_of_llguidance_itself():
    import llguidance
    tokenizer = Tokenizer(SMOLLM2)
    theirs = llguidance.LLTokenizer(tokenizer.vocabulary.library.to_str())
    ours = vocabulary(tokenizer, 49152)
    for token_id in range(49152):
        assert ours.decode_bytes([token_id]) == theirs.decode_bytes([token_id])
        assert ours.is_special_token(token_id) == theirs.is_special_token(token_id)


def test_an_unknown_decoder_is_named(byte_level, tmp_path):  # noqa: F811
    saved = json.loads((byte_level / "tokenizer.json").read_text())
    saved["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="the decoder WordPiece; a grammar needs ByteLevel"):
        Grammar(Tokenizer(tmp_path), 500, regex="a")


# ------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("kind", ["tiny", "bytes_model"])
def test_answers_of_a_random_model_to_thirty_schemas_fit(kind, request):
    model, tokenizer = request.getfixturevalue(kind)
    seeds = range(30) if kind == "tiny" else range(30, 60)
    assert check_answers(model, tokenizer, list(seeds)) >= 27


@pytest.mark.parametrize("kind", ["tiny", "bytes_model"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_regex_matches_the_whole_answer(kind, temperature, request):
    pair = request.getfixturevalue(kind)
    for regex in ("[a-f]{3}-[0-9]{2}", "(yes|no), (été|数){1,2}/", "x", '"[^"]{2}" \\\\ \t'):
        assert re.fullmatch(regex, text_with(pair, temperature, regex=regex))


@pytest.mark.parametrize("lark", ['start: "(" start ")" | /[0-9]/',
                                  'root ::= "(" root ")" | [0-9]'])
def test_a_grammar_in_lark_or_gbnf_nests(tiny, lark):
    for seed in range(5):
        text = text_with(tiny, seed=seed, lark=lark)
        digit = text.strip("()")
        assert len(digit) == 1 and digit.isdigit()
        assert text == "(" * (len(text) // 2) + digit + ")" * (len(text) // 2)


def test_one_that_allows_one_text_gives_it_and_ends(tiny):
    assert text_with(tiny, 0.0, schema={"const": {"é": [1, None]}}) in (
        f'{{"é":{gap}[1,{comma}null]}}' for gap in ("", " ") for comma in ("", " "))


def test_an_answer_that_is_cut_is_a_beginning(tiny):
    model, tokenizer = tiny
    grammar = Grammar(tokenizer, 4096, regex="[ab]{100}")
    text, ended = answer(model, tokenizer, Sampling(1.0, seed=3, grammar=grammar), 7)
    assert not ended and re.fullmatch("[ab]{7,99}", text)


def test_stop_ids_wait_until_the_grammar_allows_the_end(tiny):
    """Even one that the grammar would allow as text."""
    model, tokenizer = tiny
    [a] = [i for i in tokenizer.encode("a", bos=False) if tokenizer.decode([i]).strip() == "a"]
    grammar = Grammar(tokenizer, 4096, regex="[ a]{5}b?")
    ids = list(generate(model, make_cache(model, 4, 200), [1], 50, stop_ids=(a,),
                        sampling=Sampling(1.5, seed=1, grammar=grammar)))
    assert ids[-1] == a and re.fullmatch("[ a]{5}b?", tokenizer.decode(ids[:-1]))


def test_stop_ids_that_the_model_does_not_have_are_left_out(tiny):
    """A tokenizer may have more tokens than the model."""
    model, tokenizer = tiny
    grammar = Grammar(tokenizer, 4096, regex="[ab]{5}")
    text, ended = answer(model, tokenizer, Sampling(grammar=grammar), stop_ids=(2, 9000))
    assert ended and re.fullmatch("[ab]{5}", text)
    with pytest.raises(ValueError, match="needs a token that ends it"):
        generate(model, make_cache(model, 4, 60), [1], sampling=Sampling(grammar=grammar),
                 stop_ids=(9000,))


# ------------------------------------------------------------------------------ beside the rest


def test_rows_with_and_without_a_grammar_do_not_change_each_other(tiny):
    model, tokenizer = tiny
    grammar = Grammar(tokenizer, 4096, schema=PERSON)
    ways = [Sampling(1.2, seed=1, grammar=grammar), Sampling(0.9, top_p=0.9, seed=2), Sampling(),
            Sampling(1.0, top_k=20, seed=3, grammar=grammar), Sampling(grammar=grammar),
            Sampling(0.8, min_p=0.01, repetition_penalty=1.2, seed=4, grammar=grammar)]
    alone = [list(generate(model, make_cache(model, 4, 60), [n + 1, 7], 60, sampling=way))
             for n, way in enumerate(ways)]
    found = [[] for _ in ways]
    prompts = [Prompt([n + 1, 7], way, 60) for n, way in enumerate(ways)]
    for stream, token_id in generate_batch(model, prompts, 3, 4, 60):
        if token_id is not None:
            found[stream.index].append(token_id)
    assert found == alone


def test_a_gpu_draws_what_a_grammar_allows(tiny, monkeypatch):
    as_on_a_gpu(monkeypatch)
    assert check_answers(*tiny, list(range(70, 78))) >= 7


def test_samples_differ_and_each_fits(tiny):
    model, tokenizer = tiny
    grammar = Grammar(tokenizer, 4096, schema=PERSON)
    texts = {}
    for stream, token_id in generate_batch(
            model, [Prompt([1], Sampling(1.5, seed=1, grammar=grammar), 200, samples=4)], 4, 4, 60):
        if token_id not in (None, 2):
            texts.setdefault(stream.sample, []).append(token_id)
    people = [json.loads(tokenizer.decode(ids)) for ids in texts.values()]
    assert len({json.dumps(person) for person in people}) == 4
    assert all(0 <= person["age"] <= 150 and len(person["name"]) <= 12 for person in people)


def test_logprobs_are_those_of_the_model(tiny):
    model, tokenizer = tiny
    grammar = Grammar(tokenizer, 4096, regex="zq{3}")
    [*events] = generate_batch(model, [Prompt([1, 5], Sampling(grammar=grammar), 20, logprobs=2)],
                               1, 4, 60)
    stream, ids = events[0][0], [i for _, i in events if i is not None]
    logits = model(torch.tensor([[1, 5, *ids[:-1]]]), make_cache(model, 4, 60))[0, 1:]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([own for own, _ in stream.logprobs]), expected)
    assert [max(likeliest.values()) for _, likeliest in stream.logprobs] == pytest.approx(
        logits.log_softmax(-1).amax(-1).tolist())


def test_rows_without_a_grammar_make_no_masks(tiny):
    rows = RowSampler(2, 4096)
    rows.begin(0, Sampling(1.0, seed=1), [1])
    rows.sample(torch.randn(2, 1, 4096))
    assert rows.masks is None and not rows.unread


@pytest.mark.parametrize("way", ["cpu", "gpu"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_mask_does_not_hide_logits_that_are_not_finite(tiny, way, bad, monkeypatch):
    if way == "gpu":
        as_on_a_gpu(monkeypatch)
    _, tokenizer = tiny
    grammar = Grammar(tokenizer, 4096, regex="[ab]+")
    for how in (Sampling(grammar=grammar), Sampling(1.0, top_k=5, seed=1, grammar=grammar),
                Sampling(0.7, top_p=0.9, seed=1, grammar=grammar)):
        rows = RowSampler(2, 4096)
        rows.begin(0, how, [1], (2,))
        rows.begin(1, how, [1], (2,))
        logits = torch.randn(2, 1, 4096)
        logits[0, 0, tokenizer.eos_id] = bad
        logits[1, 0, tokenizer.eos_id] = -math.inf
        for _ in range(2):
            first, second = rows.sample(logits)[:, 0].tolist()
            assert first == UNDRAWN and re.fullmatch("[ab]+", tokenizer.decode([second]))


def test_a_row_that_ended_leaves_nothing_to_the_next(tiny):
    model, tokenizer = tiny
    grammar = Grammar(tokenizer, 4096, regex="b")
    prompts = [Prompt([1], Sampling(grammar=grammar), 5), Prompt([1], Sampling(), 5)]
    found = [[], []]
    for stream, token_id in generate_batch(model, prompts, 1, 4, 60):
        if token_id is not None:
            found[stream.index].append(token_id)
    assert tokenizer.decode(found[0][:-1]) == "b"
    assert found[1] == list(generate(model, make_cache(model, 4, 60), [1], 5))


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("source, message", [
    ({"schema": {"type": "banana"}}, "schema: Invalid type: banana"),
    ({"schema": [1]}, "schema: a JSON Schema is an object"),
    ({"schema": {"uniqueItems": True}}, 'schema: Unimplemented keys: ["uniqueItems"]'),
    ({"schema": {"not": {}}}, 'schema: Unimplemented keys: ["not"]'),
    ({"schema": {"pattern": "(?=a)b"}}, "schema: look-around"),
    ({"schema": {"format": "regex"}}, "schema: Unknown format: regex"),
    ({"schema": {"$ref": "#/$defs/no"}}, "schema: Pointer '/$defs/no' does not exist"),
    ({"schema": {"$ref": "#"}}, "schema: nothing that ends fits it"),
    ({"schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"},
                                                "b": {"$ref": "#/$defs/a"}}}},
     "schema: nothing that ends"),
    ({"schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
     "schema: nothing that ends"),
    ({"schema": {"type": "array", "items": {"anyOf": [{"$ref": "#"}]}, "minItems": 1}},
     "schema: nothing that ends"),
    ({"schema": {"enum": ["x" * 10**6]}}, "schema: it has 1000"),
    ({"schema": {"const": 2**60}}, "schema: 1152921504606846976 is above 2**53"),
    ({"schema": {"multipleOf": 99991}}, "schema: multipleOf 99991: the least common multiple"),
    ({"schema": {"allOf": [{"multipleOf": 9.73}, {"multipleOf": 967}]}},
     "schema: multipleOf 9.73 and 967: the least common multiple"),
    ({"schema": {"minProperties": 3}}, "schema: minProperties 3"),
    ({"regex": "(a{1,1000}){1,1000}"}, "regex: lexer error: too many expressions"),
    ({"regex": "("}, "regex: unclosed group"), ({"regex": "(a)\\1"}, "regex: backreferences"),
    ({"lark": ""}, "lark: no start rule"), ({"lark": "start: x"}, 'lark: unknown name: "x"'),
    ({"lark": "start: a\na: b\n %bla"}, "lark: 3(3): lexer error"),
    ({"lark": 'start: start start | "a" | /[a-z]/'}, "lark: parser error: Too many items"),
    ({"lark": "root ::= foo"}, "lark: Rule 'foo' not found"),
    ({}, "a grammar takes one of schema, regex and lark"),
    ({"regex": "a", "lark": "start: /a/"}, "a grammar takes one of schema, regex and lark")])
def test_what_cannot_be_obeyed_is_named(tiny, source, message):
    with pytest.raises(ValueError) as caught:
        Grammar(tiny[1], 4096, **source)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_recursion_with_an_end_is_taken(tiny):
    tree = {"type": "object", "additionalProperties": False, "required": ["n", "next"],
            "properties": {"n": {"enum": [1, 2]},
                           "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}}
    found = json.loads(text_with(tiny, 1.5, schema=tree))
    while found["next"]:
        found = found["next"]


def test_without_llguidance_one_line_names_the_command(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match="a grammar needs llguidance: pip install llguidance"):
        Grammar(tiny[1], 4096, regex="a")


def test_a_grammar_of_another_model_or_without_an_end_is_refused_at_the_call(tiny):
    model, tokenizer = tiny
    cache = make_cache(model, 4, 60)
    with pytest.raises(ValueError, match="the grammar is for 4000 tokens, and the model has 4096"):
        generate(model, cache, [1], sampling=Sampling(grammar=Grammar(tokenizer, 4000, regex="a")))
    grammar = Grammar(tokenizer, 4096, regex="a")
    with pytest.raises(ValueError, match="needs a token that ends it, and stop_ids has none"):
        generate(model, cache, [1], sampling=Sampling(grammar=grammar), stop_ids=())
    with pytest.raises(ValueError, match="stop_ids has none"):
        list(generate_batch(model, [Prompt([1], Sampling(grammar=grammar), stop_ids=())], 1, 4, 60))


def test_a_grammar_that_fails_midway_ends_its_answer_alone(tiny, monkeypatch):
    """It explodes after some tokens, and was not tried first."""
    monkeypatch.setattr(program, "TRIAL_TOKENS", 0)
    model, tokenizer = tiny
    grammar = Grammar(tokenizer, 4096, schema={"pattern": "^(.*a){30}$", "type": "string",
                                               "maxLength": 1000})
    sampling = Sampling(1.0, seed=1, grammar=grammar)
    said = []
    with pytest.raises(ValueError, match="the grammar could not go on: lexer error: too many"):
        said.extend(generate(model, make_cache(model, 4, 60), [1], 200, sampling=sampling))
    before = len(said) - 1  # where max_new_tokens ends it first, there is no fault
    assert said[:-1] == [*generate(model, make_cache(model, 4, 60), [1], before, sampling=sampling)]
    ended, ids = {}, []
    prompts = [Prompt([1], sampling, 200), Prompt([3], Sampling(), 200),
               Prompt([1], sampling, before)]
    for stream, token_id in generate_batch(model, prompts, batch=Batch(model, 2, 4, 60)):
        if token_id is None:
            ended[stream.index] = stream.error
        elif stream.index == 1:
            ids.append(token_id)
    assert ended[0].startswith("lexer error: too many") and not ended[1] and not ended[2]
    assert ids == list(generate(model, make_cache(model, 4, 60), [3], 200))


# ------------------------------------------------------------------------------ programs


def refused_for(naming, program, *argv):
    refused(program, *argv, naming=[naming])


def test_programs_answer_by_a_schema_a_regex_and_a_grammar(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(PERSON))
    (tmp_path / "g.lark").write_text('start: "a" | "bé"')
    status, out, _ = run("generate", "--json-schema", tmp_path / "s.json", "--seed", "1",
                         "--temperature", "1.5")
    assert status == 0 and 0 <= json.loads(out)["age"] <= 150
    status, out, _ = run("generate", "--grammar", tmp_path / "g.lark", "--json")
    assert json.loads(out)["text"] in ("a", "bé") and json.loads(out)["finish_reason"] == "eos"
    status, out, _ = run("chat", "--regex", "[a-c]{4}!", stdin="Hello\nAgain\n")
    assert status == 0 and all(re.fullmatch("[a-c]{4}!", line) for line in out.split())


def test_a_line_of_a_prompts_file_brings_its_schema(tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "A"}\n{"prompt": "B", "schema": {"enum": ["yes", 5]}}\n')
    status, out, _ = run("batch", "--prompts", prompts, "--regex", "b{2}", "--seed", 1)
    texts = {record["index"]: record["text"] for record in map(json.loads, out.splitlines())}
    assert texts[0] == "bb" and texts[1] in ('"yes"', "5")
    prompts.write_text('{"prompt": "A"}\n{"prompt": "B", "schema": 7}\n')
    refused_for("p.jsonl, prompt 1: schema: a JSON Schema is an object", "batch", "--prompts",
                prompts)


def test_flags_that_do_not_go_together_are_named(tmp_path):
    schema = tmp_path / "s.json"
    schema.write_text("[1]")
    refused_for("s.json: not a JSON Schema, which is an object", "generate", "--json-schema",
                schema)
    schema.write_text("{")
    refused_for("s.json: not JSON in UTF-8", "generate", "--json-schema", schema)
    refused_for("--regex: regex: unclosed group", "generate", "--regex", "(")
    refused_for("--regex is empty", "chat", "--regex", "")
    refused_for("--json-schema and --regex exclude", "chat", "--json-schema", schema, "--regex",
                "a")
    refused_for("--regex works without --draft and --lookup", "generate", "--regex", "a",
                "--lookup")
    refused_for("--regex and --ignore-eos exclude", "batch", "--prompts", schema, "--regex", "a",
                "--ignore-eos")
    refused_for("nothing.lark", "generate", "--grammar", tmp_path / "nothing.lark")


def test_speculation_refuses_a_grammar(tiny):
    from speculate import Speculation
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="a grammar works without speculation"):
        generate(model, make_cache(model, 4, 60), [1], speculation=Speculation(),
                 sampling=Sampling(grammar=Grammar(tokenizer, 4096, regex="a")))


@pytest.mark.released
@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs SmolLM2: python -m formats.hub smollm2")
def test_a_released_model_fills_a_schema():
    model, tokenizer = load(SMOLLM2, device="cpu")
    grammar = Grammar(tokenizer, model.config.vocab_size, schema=PERSON)
    text, ended = answer(model, tokenizer, Sampling(grammar=grammar), prompt=tokenizer.first_turn(
        "Make up a person. Give the name and the age as JSON."))
    assert ended and json.loads(text).keys() == {"name", "age"}
