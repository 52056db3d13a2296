"""The API as people's clients use it, in this process: their fields, limits, routes and messages.

tests/clients/run.py runs the clients themselves; RECORDED is what they sent there.
"""

import asyncio
import json
import shutil

import pytest
import torch

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
import httpx2 as httpx  # noqa: E402 - what openai uses

from generate import load  # noqa: E402
from helpers import TINY, random_model  # noqa: E402
from server.app import make_app  # noqa: E402
from server.engine import Engine  # noqa: E402
from server.jobs import make_jobs  # noqa: E402
from server.protocol import ApiError, parse_request  # noqa: E402
from server.requests import Settings  # noqa: E402
from server.tokens import TokenNames  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from tool_forms import write_tool_tokenizer  # noqa: E402

HELLO = [{"role": "user", "content": "Hi there."}]
DEFAULT, LIMIT = 12, 40  # tokens of an answer


class Service:
    """An engine and its routes, without a socket."""

    def __init__(self, model, tokenizer, **sizes):
        self.engine = Engine(model, tokenizer, **{"batch_size": 4, "window": 252, **sizes}).start()
        self.app = make_app(self.engine, Settings("tiny", DEFAULT, LIMIT))

    def http(self, method, path, headers=None, **content):
        async def request():
            transport = httpx.ASGITransport(app=self.app)
            client = openai.DefaultAsyncHttpxClient(transport=transport,
                                                    base_url="http://localhost")
            async with client:
                return await client.request(method, path, headers=headers, **content)

        return asyncio.run(request())

    def post(self, path, status=200, **body):
        response = self.http("POST", path, json=body)
        assert response.status_code == status, response.text
        return response.json() if not body.get("stream") else [
            json.loads(line[6:]) for line in response.text.split("\n\n")
            if line.startswith("data: {")]

    def chat(self, messages=HELLO, status=200, **options):
        return self.post("/v1/chat/completions", status, **{
            "model": "tiny", "messages": messages, "temperature": 0, **options})

    def complete(self, prompt, status=200, **options):
        return self.post("/v1/completions", status, **{
            "model": "tiny", "prompt": prompt, "temperature": 0, **options})

    def refused(self, status=400, path="/v1/chat/completions", **body):
        error = self.post(path, status, **body)["error"]
        return error["message"]


@pytest.fixture(scope="module")
def loaded():
    return load(TINY, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def service(loaded):
    service = Service(*loaded)
    yield service
    service.engine.stop()
    assert service.engine.ended.wait(20)


def choice_of(answer):
    [choice] = answer["choices"]
    return choice


# ------------------------------------------------------------------------------ echo


@torch.no_grad()
def full_pass(model, ids):
    """(V,) log-probabilities of what follows each id but the last."""
    return model(torch.tensor([ids]))[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("n_tokens", [2, 128, 129, 240])
def test_a_prompts_log_probabilities_are_those_of_a_full_pass(service, loaded, n_tokens):
    """Of ids within a chunk, at its edge, and beyond; the first has none."""
    model, tokenizer = loaded
    ids = tokenizer.encode("The cat sat on the mat, and the dog was not amused. " * 40)[:n_tokens]
    expected = full_pass(model, ids)
    for max_tokens in (0, 1):
        told = choice_of(service.complete(ids, max_tokens=max_tokens, echo=True, logprobs=3))
        found = told["logprobs"]
        assert len(found["tokens"]) == n_tokens + max_tokens
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        own = expected.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert torch.allclose(torch.tensor(found["token_logprobs"][1:n_tokens]), own, atol=1e-4)
        for told_top, row, likeliest in zip(found["top_logprobs"][1:n_tokens], expected,
                                            expected.topk(3).values, strict=False):
            assert torch.allclose(torch.tensor(list(told_top.values())[:3]), likeliest, atol=1e-4)
            assert row.max().item() == pytest.approx(max(told_top.values()), abs=1e-4)


def test_several_prompts_are_scored_as_each_alone(service, loaded):
    prompts = [loaded[1].encode(text) for text in ("The cat", "Once upon a time", "It")]
    together = service.complete(prompts, max_tokens=1, echo=True, logprobs=1)["choices"]
    for choice, prompt in zip(together, prompts, strict=True):
        alone = choice_of(service.complete(prompt, max_tokens=1, echo=True, logprobs=1))
        assert choice["text"] == alone["text"]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
            alone["logprobs"]["token_logprobs"][1:], abs=1e-5)


@pytest.mark.parametrize("text", ["The cat sat", "Été, 日本 🙂", " a", "\n"])
def test_an_echo_is_the_prompt_itself_and_offsets_count_in_it(service, text):
    silent = choice_of(service.complete(text, max_tokens=0, echo=True))
    assert silent["text"] == text and silent["finish_reason"] == "length"
    said = choice_of(service.complete(text, max_tokens=3))["text"]
    told = choice_of(service.complete(text, max_tokens=3, echo=True, logprobs=0))
    assert told["text"] == text + said
    offsets = told["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[-3] == len(text)
    chunks = service.complete(text, max_tokens=3, echo=True, stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text + said


def test_ids_are_echoed_as_the_text_that_they_are_of(service, loaded):
    ids = loaded[1].encode("The cat sat")
    assert choice_of(service.complete(ids, max_tokens=0, echo=True))["text"] == "The cat sat"
    assert service.post("/detokenize", tokens=ids)["prompt"] == "The cat sat"


def test_nothing_is_generated_where_nothing_is_asked_for(service):
    told = service.complete(["A", "B"], max_tokens=0, n=2)
    assert [choice["text"] for choice in told["choices"]] == [""] * 4
    assert told["usage"]["completion_tokens"] == 0


def test_a_drawn_token_is_among_the_top_ones(service, loaded):
    """Even if its bias made it likely, and not the model."""
    unlikely = full_pass(loaded[0], loaded[1].encode("The cat sat"))[-1].argmin().item()
    found = choice_of(service.complete("The cat", max_tokens=1, logprobs=2,
                                       logit_bias={str(unlikely): 100}))["logprobs"]
    assert found["tokens"][0] in found["top_logprobs"][0] and len(found["top_logprobs"][0]) == 3


@pytest.mark.parametrize("folder", ["tiny", "smollm2"])
def test_the_bytes_of_tokens_are_their_texts(folder, loaded, request):
    path = TINY if folder == "tiny" else TINY.parent / "smollm2-135m-instruct"
    if not path.exists():
        pytest.skip("needs SmolLM2 (python -m formats.hub smollm2)")
    tokenizer = Tokenizer(path)
    names = TokenNames(tokenizer, 49152 if folder == "smollm2" else 4096)
    text = "Été, 日本語 🙂 and the cat"
    ids = tokenizer.encode(text, bos=False)
    tokens = [names.token(token_id, 0.0) for token_id in ids]
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == text
    assert any("\ufffd" in token.text for token in tokens)


# ------------------------------------------------------------------------------ limits and fields


def test_a_request_gets_the_default_or_what_it_asks_for_up_to_the_limit(service):
    for asked, n in ((None, DEFAULT), (1, 1), (LIMIT, LIMIT), (4096, LIMIT), (10**30, LIMIT)):
        told = service.chat(max_tokens=asked)
        assert told["usage"]["completion_tokens"] == n
        assert choice_of(told)["finish_reason"] == "length"
    assert service.chat(max_completion_tokens=3, max_tokens=9)["usage"]["completion_tokens"] == 3


def test_ends_come_when_they_may(service, loaded):
    """A bias makes the model end at once."""
    [eos] = loaded[0].config.eos_ids
    ends = {"logit_bias": {str(eos): 100}}
    for fields, n, reason in (({}, 1, "stop"), ({"min_tokens": 5}, 6, "stop"),
                              ({"ignore_eos": True}, DEFAULT, "length"),
                              ({"ignore_eos": True, "stop_token_ids": [eos]}, 1, "stop"),
                              ({"ignore_eos": True, "stop_token_ids": [eos], "min_tokens": 3}, 4,
                               "stop")):
        for told in (service.chat(**ends, **fields), service.complete("Hi", **ends, **fields)):
            assert told["usage"]["completion_tokens"] == n, fields
            assert choice_of(told)["finish_reason"] == reason


def test_a_bias_is_added_to_a_tokens_logit(service, loaded):
    model, tokenizer = loaded
    ids = tokenizer.encode("The cat sat on")
    plain = choice_of(service.complete(ids, max_tokens=1, logprobs=2))["logprobs"]
    first, second = plain["top_logprobs"][0].values()
    with torch.no_grad():
        first_id = model(torch.tensor([ids]))[0, -1].argmax().item()
    for bias, stays in ((first - second - 0.01, True), (first - second + 0.01, False)):
        told = choice_of(service.complete(ids, max_tokens=1, logprobs=0,
                                          logit_bias={str(first_id): -bias}))["logprobs"]
        assert (told["tokens"] == plain["tokens"]) == stays


def test_usage_in_every_chunk_counts_the_tokens_so_far(service):
    chunks = service.chat(stream=True, stream_options={
        "include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == DEFAULT and len(set(counts)) > 3
    prompt_tokens = service.chat()["usage"]["prompt_tokens"]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {prompt_tokens}
    plain = service.chat(stream=True, stream_options={"include_usage": True})
    assert [chunk["usage"] is None for chunk in plain] == [True] * (len(plain) - 1) + [False]


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A service whose template shows names and efforts."""
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("named") / "c")
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
        "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: "
        "{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")
    service = Service(*load(folder, device="cpu", dtype=torch.float32))
    yield service
    service.engine.stop()


def rendered(service, **body):
    ids = service.post("/tokenize", **body)["tokens"]
    return service.engine.tokenizer.decode(ids)


def test_names_and_efforts_reach_the_template(named):
    plain, bob = ([{"role": "user", "content": "Hi.", **name}] for name in ({}, {"name": "Bob"}))
    n_plain = named.post("/tokenize", messages=plain)["count"]
    assert named.chat(bob)["usage"]["prompt_tokens"] > n_plain
    assert named.chat(plain, reasoning_effort="high")["usage"]["prompt_tokens"] > n_plain
    assert "user Bob: Hi." in rendered(named, messages=bob)
    answer = choice_of(named.chat(bob))["message"]["content"]
    for name, is_cached in ((None, False), ("Eve", False), ("Bob", True)):
        talk = [{**plain[0], "name": name}, {"role": "assistant", "content": answer}, *HELLO]
        assert bool(cached(named.chat(talk))) == is_cached, name


@pytest.mark.parametrize("answer", ["Well, I", "Well, I ", "  I"])
def test_a_last_message_is_continued_as_transformers_renders_it(named, answer):
    transformers = pytest.importorskip("transformers")
    messages = [*HELLO, {"role": "assistant", "content": answer}]
    template = named.engine.tokenizer.chat_template.sources["default"]
    for fields in ({"continue_final_message": True, "add_generation_prompt": False},
                   {"add_generation_prompt": False}):
        [expected], _ = transformers.utils.chat_template_utils.render_jinja_template(
            [messages], chat_template=template, bos_token="<s>", eos_token="</s>", **fields)
        expected_ids = named.engine.tokenizer.encode(expected)
        assert named.post("/tokenize", messages=messages, **fields)["tokens"] == expected_ids
        told = named.chat(messages, **fields)
        assert told["usage"]["prompt_tokens"] == len(expected_ids)


def test_what_a_client_marks_for_a_cache_is_a_label(service):
    parts = [{"type": "text", "text": "Hi "},
             {"type": "text", "text": "there.", "cache_control": {"type": "ephemeral"}}]
    marked = [{"role": "user", "content": parts, "cache_control": {"type": "ephemeral"}}]
    assert choice_of(service.chat(marked)) == choice_of(service.chat())
    for kind in ("input_text", "output_text"):
        assert service.chat([{"role": "user", "content": [{"type": kind, "text": "Hi there."}]}])


# What clients sent, through a recording proxy, when tests/clients/run.py ran them on 2026-11-28,
# beside model, messages, tools and formats of answers.
RECORDED = {
    "openai 3.57.0": {"max_tokens": 4096, "stop": "e"},
    "openai 3.57.0, logprobs": {"logprobs": True, "max_tokens": 40, "top_logprobs": 5},
    "openai (npm) 6.49.0": {"max_tokens": 100, "stream": True},
    "AI SDK 6.0.326": {"max_tokens": 100, "stream": True,
                       "stream_options": {"include_usage": True}},
    "litellm 1.110.2": {"max_tokens": 40, "stream": True},
    "LangChain 1.7.4": {"max_completion_tokens": 100, "stream": False},
    "LlamaIndex 0.8.1": {"max_tokens": 100, "stream": False, "temperature": 0.1},
    "pydantic-ai 2.68.0": {"max_completion_tokens": 100, "stream": True,
                           "stream_options": {"include_usage": True}}}
# What others' documentation and code give as their fields' defaults.
DOCUMENTED = {
    "Open WebUI": {"stream": True, "max_tokens": 1000},
    "Continue": {"stream": True, "max_tokens": 4096},
    "guidellm": {"stream": True, "ignore_eos": True, "max_completion_tokens": 9, "max_tokens": 9,
                 "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "smolagents": {"stop": ["Observation:", "Calling tools:"], "stream": False},
    "llama.cpp's own page": {
        "stream": True, "cache_prompt": True, "samplers": None, "dynatemp_range": 0,
        "dynatemp_exponent": 1, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "xtc_probability": 0,
        "xtc_threshold": 0.1, "typical_p": 1, "repeat_last_n": 64, "repeat_penalty": 1,
        "presence_penalty": 0, "frequency_penalty": 0, "dry_multiplier": 0, "dry_base": 1.75,
        "dry_allowed_length": 2, "dry_penalty_last_n": -1, "max_tokens": 9,
        "timings_per_token": False},
    "vLLM's own fields": {
        "best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "priority": 0,
        "include_stop_str_in_output": False, "skip_special_tokens": True, "bad_words": [],
        "spaces_between_special_tokens": True, "add_special_tokens": False, "echo": False,
        "min_tokens": 0, "ignore_eos": False, "stop_token_ids": [], "allowed_token_ids": [],
        "return_tokens_as_token_ids": False, "request_id": "r1", "logits_processors": None},
    "SGLang's": {"rid": "r1", "no_stop_trim": False, "separate_reasoning": True, "regex": None,
                 "continue_final_message": False, "return_hidden_states": False, "ebnf": None},
    "TGI's": {"typical_p": 1.0, "watermark": False, "truncate": None, "top_n_tokens": None,
              "decoder_input_details": False, "return_full_text": False}}


@pytest.mark.parametrize("client", {**RECORDED, **DOCUMENTED})
def test_what_clients_send_by_default_is_taken(service, client):
    assert service.chat(**{**RECORDED, **DOCUMENTED}[client])


def test_openais_client_reads_all_of_it(service):
    async def use(client):
        chat = await client.chat.completions.create(
            model="tiny", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=3)
        assert bytes(chat.choices[0].logprobs.content[0].bytes)
        assert chat._request_id
        echoed = await client.completions.create(model="tiny", prompt="Hi", echo=True, logprobs=1,
                                                 max_tokens=0)
        assert echoed.choices[0].text == "Hi"
        [model] = [model async for model in client.models.list()]
        assert model.max_model_len > 100_000
        with pytest.raises(openai.NotFoundError, match="no embeddings"):
            await client.embeddings.create(model="tiny", input="x")

    with_openai(service, use)


# ------------------------------------------------------------------------------ /v1/responses


def with_openai(service, use):
    """What an async function of OpenAI's client returns, of a client of this service."""
    async def run():
        transport = httpx.ASGITransport(app=service.app)
        return await use(openai.AsyncOpenAI(
            base_url="http://localhost/v1", api_key="none", max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(transport=transport)))

    return asyncio.run(run())


def test_a_response_is_the_chats_answer_whole_and_streamed(service):
    asked = dict(model="tiny", temperature=0, max_output_tokens=9, instructions="Be kind.")
    told = service.chat([{"role": "system", "content": "Be kind."}, *HELLO], max_tokens=9)
    expected = choice_of(told)["message"]["content"]

    async def use(client):
        whole = await client.responses.create(input="Hi there.", **asked)
        assert whole.output_text == expected
        assert whole.status == "incomplete"
        assert whole.incomplete_details.reason == "max_output_tokens"
        assert (whole.usage.input_tokens, whole.usage.output_tokens) == (
            told["usage"]["prompt_tokens"], 9)
        events = [event async for event in await client.responses.create(
            input=[{"role": "user", "content": [{"type": "input_text", "text": "Hi there."}]}],
            stream=True, **asked)]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(event.delta for event in events
                       if event.type == "response.output_text.delta") == expected
        assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
        assert events[-1].type == "response.incomplete"
        assert events[-1].response.output_text == expected
        said = [{"role": "user", "content": "Hi there."}, *whole.output]
        again = await client.responses.create(
            input=[*said, {"role": "user", "content": "And?"}], **asked)
        assert again.usage.input_tokens_details.cached_tokens > 9

    with_openai(service, use)


def test_a_responses_text_fits_a_schema(service):
    pytest.importorskip("llguidance")
    pydantic = pytest.importorskip("pydantic")

    class Cat(pydantic.BaseModel):
        tame: bool

    async def use(client):
        told = await client.responses.parse(model="tiny", input="Say.", text_format=Cat,
                                            max_output_tokens=40, temperature=1.5)
        assert isinstance(told.output_parsed, Cat) and told.status == "completed"

    with_openai(service, use)


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """A service of random weights whose template says tools."""
    pytest.importorskip("llguidance")
    tokenizer = Tokenizer(write_tool_tokenizer(tmp_path_factory.mktemp("tools") / "c", "hermes"))
    model = random_model(vocab_size=tokenizer.vocabulary.library.get_vocab_size(),
                         eos_ids=(tokenizer.eos_id,))
    service = Service(model, tokenizer, window=3000)
    service.app = make_app(service.engine, Settings("tiny", 300, 300))
    yield service
    service.engine.stop()


def test_a_response_calls_and_goes_on_with_the_result(caller):
    tools = [{"type": "function", "name": "weather", "description": "The weather.", "strict": True,
              "parameters": {"type": "object", "properties": {"warm": {"type": "boolean"}},
                             "required": ["warm"], "additionalProperties": False}}]
    asked = dict(model="tiny", tools=tools, temperature=1.5, tool_choice="required")

    async def use(client):
        question = [{"role": "user", "content": "Is it warm?"}]
        whole = await client.responses.create(input=question, **asked)
        [call, *_] = whole.output
        assert call.type == "function_call" and call.name == "weather"
        assert json.loads(call.arguments).keys() == {"warm"}
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "Yes."}
        events = [event async for event in await client.responses.create(
            input=[*question, *whole.output, result], stream=True, **asked)]
        last = events[-1].response
        assert events[-1].type == "response.completed"
        arguments = [event.delta for event in events
                     if event.type == "response.function_call_arguments.delta"]
        assert "".join(arguments) == "".join(item.arguments for item in last.output)
        named = await client.responses.create(input=question, **{
            **asked, "tool_choice": {"type": "function", "name": "weather"}})
        assert named.output[0].name == "weather"

    with_openai(caller, use)


@pytest.mark.parametrize("change, param", [
    ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"store": True}, "store"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"), ({"input": 5}, "input"),
    ({"input": ["x"]}, "input.0"), ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"background": True}, "background"), ({"include": ["x"]}, "include"), ({"text": 5}, "text"),
    ({"reasoning": 5}, "reasoning"), ({"stream_options": {"x": 1}}, "stream_options"),
    ({"topp": 1}, "topp"), ({"input": [{"role": "wizard", "content": "x"}]}, "messages.0.role")])
def test_what_a_response_cannot_have_is_refused_by_name(service, change, param):
    body = {"model": "tiny", "input": "Hi", **change}
    assert service.post("/v1/responses", 400, **body)["error"]["param"] == param


# ------------------------------------------------------------------------------ room


def test_only_what_no_free_row_can_take_waits(loaded):
    """24 at once on an idle server of 8 rows and a queue of 16, and a request of 24 prompts."""
    engine = Engine(*loaded, batch_size=8, window=60, max_queue=16)  # not started: nothing ends

    def request(**fields):
        body = {"model": "m", "prompt": "Hi", "max_tokens": 1, **fields}
        return parse_request(json.dumps(body).encode(), False, "m", 500)

    async def fill():
        for _ in range(24):
            engine.check_room()
            engine.submit(make_jobs(engine, request(), ""))
        with pytest.raises(ApiError) as full:
            engine.check_room()
        assert full.value.status == 429
        engine.cancel(list(engine.jobs))
        engine.submit(make_jobs(engine, request(prompt=["Hi"] * 24), ""))
        engine.cancel(list(engine.jobs))
        for _ in range(2):  # four rows each
            engine.submit(make_jobs(engine, request(n=4), ""))
        for _ in range(16):
            engine.submit(make_jobs(engine, request(), ""))
        with pytest.raises(ApiError, match="queue"):
            engine.submit(make_jobs(engine, request(), ""))

    asyncio.run(fill())


# ------------------------------------------------------------------------------ kept answers


@pytest.mark.parametrize("strip", [str.strip, str.lstrip, str.rstrip])
def test_an_answer_is_found_again_without_the_blanks_at_its_ends(service, strip):
    """Those in front stay with their tokens, and those behind it are cut off."""
    for number in range(50):  # until an answer has blanks within it
        question = [{"role": "user", "content": f"Hi, strip {number}."}]
        told = choice_of(service.chat(question, max_tokens=LIMIT, logprobs=True))
        texts = [token["token"] for token in told["logprobs"]["content"]]
        ends = [n for n in range(2, LIMIT) if not texts[n].strip() and texts[n - 1].strip()]
        if ends:
            break
    for n in (5, ends[0] + 1):
        told = service.chat(question, max_tokens=n)
        answer = choice_of(told)["message"]["content"]
        talk = [*question, {"role": "assistant", "content": strip(answer)}, *HELLO]
        kept = told["usage"]["total_tokens"]
        if strip(answer).rstrip() == strip(answer) != answer.lstrip():
            kept -= sum(not "".join(texts[m:n]).strip() for m in range(n))
        assert cached(service.chat(talk)) == kept
        talk[1]["content"] = f"{answer} "
        assert not cached(service.chat(talk))


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


# ------------------------------------------------------------------------------ routes, messages


def test_text_to_ids_and_back(service, loaded):
    tokenizer = loaded[1]
    told = service.post("/tokenize", prompt="The cat", return_token_strs=True)
    assert told["tokens"] == tokenizer.encode("The cat") and told["count"] == len(told["tokens"])
    assert told["token_strs"][-1] == " cat"
    assert service.post("/tokenize", prompt="The cat", add_special_tokens=False)[
        "tokens"] == tokenizer.encode("The cat")[1:]
    assert service.post("/tokenize", messages=HELLO)["tokens"] == tokenizer.conversation(HELLO)
    for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": 5}),
                       ("/tokenize", {"prompt": "a", "messages": HELLO}),
                       ("/detokenize", {"tokens": [4096]}), ("/detokenize", {"tokens": "a"})):
        service.refused(path=path, **body)


def test_a_request_has_the_clients_name_or_one_of_ours(service):
    given = service.http("GET", "/v1/models", headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    ids = {service.http("GET", path, headers={"X-Request-Id": "a b"}).headers["x-request-id"]
           for path in ("/v1/models", "/v1/nothing", "/version")}
    assert len(ids) == 3 and "a b" not in ids


@pytest.mark.parametrize("path, naming", [
    ("/v1/embeddings", "embeddings"), ("/v1/messages", "hosted_vllm/tiny"),
    ("/v1/messages/count_tokens", "litellm"), ("/api/chat", "hosted_vllm/tiny"),
    ("/api/generate", "Ollama"), ("/v1/audio/speech", "text"),
    ("/chat/completions", "/v1"), ("/v1/nothing", "/v1/chat/completions")])
def test_what_is_elsewhere_is_a_404_that_names_the_way(service, path, naming):
    assert naming in service.refused(404, path)


def test_unknown_paths_are_counted(service):
    service.refused(404, "/v1/nothing")
    metrics = service.http("GET", "/metrics").text
    assert 'gpt_stream_requests_total{path="other",status="404"}' in metrics
    assert "nothing" not in metrics


@pytest.mark.parametrize("message, naming", [
    ({"role": "user", "content": None}, "is null"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'image_url'"),
    ({"role": "user", "content": [{"type": "text", "text": "a", "colour": 1}]}, "'colour'"),
    ({"role": "user", "content": [{"type": "text"}]}, "'text'"),
    ({"role": "user", "content": ["a"]}, "every part")])
def test_messages_say_what_is_wrong(service, message, naming):
    assert naming in service.refused(model="tiny", messages=[message])


def test_headers_that_do_not_fit_are_named(service):
    body = json.dumps({"model": "tiny", "messages": HELLO}).encode()
    for headers, naming in (({}, "curl"), ({"Content-Type": "text/plain"}, "text/plain"),
                            ({"Content-Type": "application/json", "Content-Encoding": "gzip"},
                             "gzip")):
        response = service.http("POST", "/v1/chat/completions", headers=headers, content=body)
        assert response.status_code == 415
        assert naming in response.json()["error"]["message"]
    assert service.http("GET", "/v1/models/").json() == service.http("GET", "/v1/models").json()
    assert service.http("GET", "/version").json()["version"]
