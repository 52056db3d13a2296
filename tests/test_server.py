"""The server as its clients see it: a real process, real sockets, OpenAI's own package."""

import concurrent.futures
import contextlib
import enum
import functools
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Literal

import pytest
import torch

from generate import generate, load, make_cache
from helpers import TINY, run

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
import pydantic  # noqa: E402
from starlette.requests import Request  # noqa: E402

from server.protocol import ApiError  # noqa: E402
from server.requests import Settings, check_host  # noqa: E402

ROOT = TINY.parent.parent
WINDOW = 200
pytestmark = pytest.mark.slow  # they start processes


class Server:
    """`python -m server` on a free port, with the embedded model in float32."""

    def __init__(self, *argv, sizes=("--batch", 4, "--window", WINDOW)):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", "--checkpoint", str(TINY), "--dtype", "fp32",
             "--device", "cpu", "--port", "0", *map(str, (*sizes, *argv))], cwd=ROOT,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.said, self.port = [], None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"http://.*:(\d+) serves", line):
                self.port = int(found[1])
                break
        assert self.port, self.said
        threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True).start()

    def client(self, key="none", **options):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key,
                             max_retries=0, timeout=60, **options)

    def chat(self, messages, client=None, **options):
        messages = user(messages) if isinstance(messages, str) else messages
        options = {"model": "tiny", "temperature": 0, "max_tokens": 20, **options}
        return (client or self.client()).chat.completions.create(messages=messages, **options)

    def http(self, method, path, body=None, headers=None):
        """(status, headers, content) without any client's help."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def post(self, content, path="/v1/chat/completions", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.http("POST", path, body, {"Content-Type": "application/json", **headers})

    def figures(self):
        _, _, text = self.http("GET", "/metrics")
        lines = [line.rsplit(" ", 1) for line in text.decode().splitlines() if line[0] != "#"]
        return {name.removeprefix("gpt_stream_"): float(value) for name, value in lines}

    def until(self, name, value, seconds=20):
        deadline = time.time() + seconds
        while (found := self.figures()[name]) != value:
            assert time.time() < deadline, f"{name} is {found}"
            time.sleep(0.01)

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def user(*texts):
    """A conversation of turns, the user's and the model's one after the other."""
    return [{"role": ("user", "assistant")[at % 2], "content": text}
            for at, text in enumerate(texts)]


def said(answer):
    return answer.choices[0].message.content


def cached(answer):
    return answer.usage.prompt_tokens_details.cached_tokens


@pytest.fixture(scope="module")
def server():
    server = Server("--max-new-tokens", 300)
    yield server
    assert server.end() == 0
    assert not [line for line in server.said if "Traceback" in line or "failed" in line]


@pytest.fixture(scope="module")
def loaded():
    return load(TINY, device="cpu", dtype=torch.float32)


def alone(loaded, ids, n=20, cache=None):
    """What the model says to ids, without any server."""
    model, tokenizer = loaded
    cache = cache or make_cache(model, 4, WINDOW)
    found = list(generate(model, cache, ids, n))
    return found, tokenizer.decode([i for i in found if i not in model.config.eos_ids])


# ------------------------------------------------------------------------------ structured output


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "größer"


class Item(pydantic.BaseModel):
    size: Size
    note: Literal["plain", "fancy"] | None


class Order(pydantic.BaseModel):
    items: list[Item] = pydantic.Field(min_length=1, max_length=2)
    paid: bool


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def test_openai_parses_a_pydantic_model(server):
    answer = server.client().chat.completions.parse(
        model="tiny", messages=user("Order something."), response_format=Order, temperature=1.5,
        seed=1, max_tokens=300, n=3)
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Order)


def test_a_structured_answer_is_streamed_and_kept(server):
    schema = {"type": "object", "properties": {"a": {"enum": ["x" * 20]}, "b": {"type": "boolean"}},
              "required": ["a", "b"], "additionalProperties": False}
    pieces = [chunk.choices[0].delta.content or "" for chunk in server.chat(
        "Say.", stream=True, response_format=schema_format(schema), max_tokens=60)]
    assert len(pieces) > 5 and json.loads("".join(pieces))["a"] == "x" * 20
    again = server.chat(user("Say.", "".join(pieces), "Once more."), max_tokens=60,
                        response_format=schema_format(schema))
    assert cached(again) > 20 and json.loads(said(again)).keys() == {"a", "b"}


@pytest.mark.parametrize("fields, fits", [
    ({"structured_outputs": {"json": {"const": 5}}}, "5"),
    ({"structured_outputs": {"json": '{"const": 5}', "regex": None}}, "5"),
    ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
    ({"structured_outputs": {"choice": ['say "né"\n', "or not"]}}, '(say "né"\n|or not)'),
    ({"structured_outputs": {"grammar": 'root ::= "k" | "l"'}}, "[kl]"),
    ({"guided_json": {"type": "boolean"}}, "(true|false)"), ({"guided_regex": "é{2}"}, "éé"),
    ({"guided_choice": ["q"]}, "q"), ({"guided_grammar": 'start: "z"+ "!"'}, "z+!"),
    ({"structured_outputs": {"json_object": True}, "max_tokens": 1}, "{.*"),
    ({"response_format": {"type": "json_object"}, "max_tokens": 1}, "{.*")])
def test_what_vllm_takes_is_obeyed(server, fields, fits):
    answer = server.chat("Hi", temperature=1.2, seed=3, max_tokens=60, extra_body=fields)
    assert re.fullmatch(fits, said(answer)), said(answer)


@pytest.mark.parametrize("schema", [
    5, [], {"type": "banana"}, {"properties": 5}, {"enum": ["x" * 10**6]}, {"$ref": "#"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"pattern": "(" * 5000},
    {"type": "string", "pattern": "^(.*a){30}$", "maxLength": 1000}, {"uniqueItems": True},
    {"type": "integer", "multipleOf": 99991},
    functools.reduce(lambda inner, _: {"anyOf": [inner]}, range(400), {})])
def test_a_hostile_schema_is_one_400_and_others_go_on(server, loaded, schema):
    ids, text = alone(loaded, loaded[1].first_turn("Tell me."), 60)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        other = pool.submit(server.chat, "Tell me.", max_tokens=60)
        error = error_of(server.post({**BASE, "response_format": schema_format(schema)}), 400)
        assert said(other.result()) == text
    assert error["param"] == "response_format.json_schema.schema"


# ------------------------------------------------------------------------------ answers


def test_an_answer_is_what_the_model_says_whole_and_streamed(server, loaded):
    ids = loaded[1].first_turn("Who is the cat?", "Be kind.")
    found, text = alone(loaded, ids)
    messages = [{"role": "developer", "content": "Be kind."}, *user("Who is the cat?")]
    whole = server.chat(messages)
    assert said(whole) == text and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), len(found))
    chunks = list(server.chat(messages, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "length"]
    assert chunks[-1].usage.total_tokens == len(ids) + len(found) and not chunks[-1].choices
    assert {c.id for c in chunks} == {chunks[0].id} and chunks[0].id != whole.id
    assert len(chunks) > len(found) / 2


def test_raw_prompts_are_continued_as_generate_py_does(server, loaded):
    tokenizer = loaded[1]
    prompts = ["The cat", "Once upon a time"]
    expected = [alone(loaded, tokenizer.encode(prompt), 12)[1] for prompt in prompts]
    create = server.client().completions.create
    asked = dict(model="tiny", max_tokens=12, temperature=0)
    assert [c.text for c in create(prompt=prompts, **asked).choices] == expected
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    assert [c.text for c in create(prompt=ids, **asked).choices] == expected
    assert create(prompt=ids[0], **asked).choices[0].text == expected[0]
    pieces = {0: "", 1: ""}
    for chunk in create(prompt=prompts, stream=True, **asked):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert list(pieces.values()) == expected


def test_many_at_once_say_what_each_says_alone(server, loaded):
    def ask(n):
        return said(server.chat(f"Tell me of cat {n}. " * (1 + n % 7 * 5), max_tokens=5 + n))

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    for n, answer in enumerate(answers):
        ids = loaded[1].first_turn(f"Tell me of cat {n}. " * (1 + n % 7 * 5))
        assert answer == alone(loaded, ids, 5 + n)[1]


def test_a_seed_says_the_same_whatever_runs_beside_it(server):
    asked = dict(temperature=1.0, seed=7, top_p=0.9, max_tokens=30, presence_penalty=0.5)
    first = said(server.chat("Sing!", **asked))
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        others = [pool.submit(server.chat, f"Sing {n}!", temperature=1.0, max_tokens=60)
                  for n in range(3)]
        again = [pool.submit(server.chat, "Sing!", **asked) for _ in range(3)]
        assert {said(one.result()) for one in again} == {first}
        assert len({said(one.result()) for one in others}) == 3
    assert said(server.chat("Sing!", **{**asked, "seed": 8})) != first
    unseeded = {said(server.chat("Sing!", **{**asked, "seed": None})) for _ in range(3)}
    assert len(unseeded) == 3


def test_n_answers_differ_and_their_prompt_is_read_once(server):
    before = server.figures()['tokens_total{kind="read"}']
    answer = server.chat("Sing! " * 50, n=6, temperature=1.0, seed=3)
    read = server.figures()['tokens_total{kind="read"}'] - before
    assert read == answer.usage.prompt_tokens > 100
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 6 and [c.index for c in answer.choices] == list(range(6))
    assert answer.usage.completion_tokens == 6 * 20
    assert texts[0] == said(server.chat("Sing! " * 50, temperature=1.0, seed=3))
    assert {said(server.chat("Sing!", n=3))} == {said(server.chat("Sing!"))}  # greedy ones agree


def test_logprobs_are_those_of_a_full_pass(server, loaded):
    model, tokenizer = loaded
    ids = tokenizer.first_turn("Who?")
    found, _ = alone(loaded, ids, 8)
    with torch.no_grad():
        logits = model(torch.tensor([ids + found]))[0, len(ids) - 1:-1]
    expected = logits.log_softmax(-1)
    answer = server.chat("Who?", max_tokens=8, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [t.token for t in content] == [tokenizer.decode([i]) for i in found]
    for token, row, token_id in zip(content, expected, found, strict=True):
        assert abs(token.logprob - row[token_id].item()) < 1e-4
        assert torch.allclose(torch.tensor([t.logprob for t in token.top_logprobs]),
                              row.topk(3).values, atol=1e-4)
        assert bytes(token.bytes).decode() == token.token
    chunks = server.chat("Who?", max_tokens=8, logprobs=True, stream=True)
    streamed = [t.logprob for c in chunks if c.choices[0].logprobs
                for t in c.choices[0].logprobs.content]
    assert torch.allclose(torch.tensor(streamed), torch.tensor([t.logprob for t in content]),
                          atol=1e-5)
    old = server.client().completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0,
                                             logprobs=3).choices[0]
    assert "".join(old.logprobs.tokens) == old.text
    assert old.logprobs.token_logprobs == pytest.approx([t.logprob for t in content], abs=1e-4)
    assert [old.text[a:b] for a, b in zip(old.logprobs.text_offset, old.logprobs.text_offset[1:])
            ] == old.logprobs.tokens[:-1]


def test_a_stop_text_ends_an_answer_before_it(server):
    free = said(server.chat("Who is the cat?"))
    word = free.split()[3]
    answer = server.chat("Who is the cat?", stop=[word, "never said"])
    assert said(answer) == free.partition(word)[0] and answer.choices[0].finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or ""
                       for c in server.chat("Who is the cat?", stop=word, stream=True))
    assert streamed == said(answer)


def test_parts_of_a_text_are_one_text(server):
    parts = [{"type": "text", "text": "Who is "}, {"type": "text", "text": "the cat?"}]
    assert said(server.chat([{"role": "user", "content": parts}])) == said(
        server.chat("Who is the cat?"))


# ------------------------------------------------------------------------------ conversations


def test_a_conversation_reads_only_its_new_turns_and_is_chat_pys_far_past_the_window(
        server, loaded):
    model, tokenizer = loaded
    cache, messages, last_id, held = make_cache(model, 4, WINDOW), [], None, 0
    for turn in range(12):
        text = f"Tell me of cat {turn}. " * 4
        ids = tokenizer.next_turn(text, last_id) if turn else tokenizer.first_turn(text)
        found, expected = alone(loaded, ids, 24, cache)
        messages += user(text)
        answer = server.chat(messages, max_tokens=24, stream=turn % 2 == 1,
                             **({"stream_options": {"include_usage": True}} if turn % 2 else {}))
        if turn % 2:
            chunks = list(answer)
            reply = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            usage = chunks[-1].usage
        else:
            reply, usage = said(answer), answer.usage
        assert reply == expected, turn
        assert usage.prompt_tokens_details.cached_tokens == held
        assert usage.prompt_tokens == held + len(ids)
        held, last_id = held + len(ids) + len(found), found[-1]
        messages.append({"role": "assistant", "content": reply})
    assert held > 3 * WINDOW
    # another answer to the same, and a history that was changed, are read from the last kept turn
    again = server.chat(messages[:-1], max_tokens=24)
    assert said(again) == messages[-1]["content"] and cached(again) > 0
    changed = [*messages[:2], {"role": "user", "content": "No."}]
    assert 0 < cached(server.chat(changed)) < 200
    changed[1] = {"role": "assistant", "content": "Never said."}
    assert cached(server.chat(changed)) == 0


def test_a_miss_is_what_a_fresh_server_says(server, loaded):
    """A history that was never kept is read whole, as the template renders it."""
    messages = user("Hello there.", "I never said this.", "Who are you?")
    ids = loaded[1].conversation(messages)
    answer = server.chat(messages)
    assert cached(answer) == 0 and answer.usage.prompt_tokens == len(ids)
    assert said(answer) == alone(loaded, ids)[1]


def test_a_system_turn_that_several_share_is_read_once(server, loaded):
    system = {"role": "system", "content": "You are the keeper of the cats. " * 5}
    held = len(loaded[1].system_turn(system["content"]))
    for turn, expected in (("Hi.", 0), ("Who?", held), ("Why?", held)):
        answer = server.chat([system, *user(turn)])
        assert cached(answer) == expected
        ids = loaded[1].first_turn(turn, system["content"])
        assert said(answer) == alone(loaded, ids)[1]


def test_an_answer_that_a_stop_text_cut_is_kept_as_far_as_it_was_sent(server, loaded):
    model, tokenizer = loaded
    ids = tokenizer.first_turn("Who is the dog?")
    found, text = alone(loaded, ids)
    lengths = [len(tokenizer.decode(found[:n])) for n in range(len(found) + 1)]
    cut = 7  # tokens
    stop = text[lengths[cut]:lengths[cut + 2]]
    assert text.index(stop) == lengths[cut]
    first = server.chat("Who is the dog?", stop=stop)
    messages = user("Who is the dog?", said(first), "And why?")
    second = server.chat(messages)
    assert said(first) == text[:lengths[cut]] and cached(second) == len(ids) + cut
    cache = make_cache(model, 4, WINDOW)
    alone(loaded, ids, cut, cache)
    assert said(second) == alone(loaded, tokenizer.next_turn("And why?", found[cut - 1]),
                                 20, cache)[1]
    word = next(n for n in range(2, 19) if lengths[n + 1] - lengths[n] > 3)  # within a token
    stop = text[lengths[word] + 2:lengths[word + 1] + 4]
    first = server.chat("Who is the dog?", stop=stop)
    assert said(first) == text[:text.index(stop)]
    if text.index(stop) not in lengths:
        assert cached(server.chat(user("Who is the dog?", said(first), "And why?"))) == 0


# ------------------------------------------------------------------------------ going away


def test_a_client_that_goes_away_frees_its_row(server):
    for _ in range(6):  # more than there are rows
        answer = server.chat("Sing for ever.", stream=True, max_tokens=300)
        for _, _ in zip(range(3), answer):
            pass
        answer.close()
    server.until("rows_busy", 0)
    with pytest.raises(openai.APITimeoutError):
        server.chat("Sing for ever.", server.client().with_options(timeout=0.05), max_tokens=300)
    server.until("rows_busy", 0)
    assert server.figures()["queue"] == 0


def test_a_client_that_stops_reading_hinders_nobody(server):
    body = json.dumps({"model": "tiny", "messages": user("Sing."), "max_tokens": 300, "n": 4,
                       "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                     b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                     % (len(body), body))
        time.sleep(0.3)
        assert len(said(server.chat("Hi."))) > 0
    server.until("rows_busy", 0)


# ------------------------------------------------------------------------------ refusals

BASE = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def error_of(response, status):
    found, _, content = response
    error = json.loads(content)["error"]
    assert found == status, content
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize("change, param", [
    ({"messages": None}, "messages"), ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"), ({"messages": [5]}, "messages.0"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages.0.name"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]},
     "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages.0.content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
    ({"model": None}, "model"), ({"model": 5}, "model"), ({"temperature": -0.1}, "temperature"),
    ({"temperature": "1"}, "temperature"), ({"temperature": 2.1}, "temperature"),
    ({"temperature": True}, "temperature"), ({"top_p": 1.1}, "top_p"), ({"top_k": 1.5}, "top_k"),
    ({"min_p": -1}, "min_p"), ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"), ({"seed": 2**64}, "seed"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"n": 0}, "n"), ({"n": 17}, "n"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"), ({"min_tokens": 3}, "min_tokens"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"), ({"stop_token_ids": [4096]}, "stop_token_ids"),
    ({"ignore_eos": True, "guided_regex": "a"}, "ignore_eos"), ({"ignore_eos": 1}, "ignore_eos"),
    ({"min_tokens": 1, "guided_regex": "a"}, "min_tokens"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"stop": ""}, "stop.0"), ({"stop": ["a"] * 17}, "stop"), ({"stop": 5}, "stop"),
    ({"stream": "yes"}, "stream"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"top_logprobs": 3}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),  # of this template
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ({"guided_regex": "(a{1,1000}){1,1000}"}, "guided_regex"),
    ({"guided_json": "{"}, "guided_json"), ({"guided_grammar": "start: x"}, "guided_grammar"),
    ({"logit_bias": {"4096": 1}}, "logit_bias"), ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"), ({"logit_bias": [5]}, "logit_bias"),
    ({"store": True}, "store"), ({"echo": True}, "echo"), ({"priority": 1}, "priority"),
    ({"use_beam_search": True}, "use_beam_search"), ({"length_penalty": 2}, "length_penalty"),
    ({"cache_prompt": False}, "cache_prompt"), ({"mirostat": 2}, "mirostat"),
    ({"functions": [{}]}, "functions"), ({"topp": 1}, "topp")])
def test_what_is_not_obeyed_is_refused_by_name(server, change, param):
    error = error_of(server.post({**BASE, **change}), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_taken(server):
    neutral = dict(tools=[], tool_choice="auto", response_format={"type": "text"}, logit_bias={},
                   stop=None, seed=None, n=1, user="me", metadata={"a": "b"}, store=False,
                   presence_penalty=0, top_logprobs=None, logprobs=False, functions=None,
                   parallel_tool_calls=True, service_tier="auto", modalities=["text"],
                   temperature=0, top_k=-1, stream=None, stream_options=None)
    answer = json.loads(server.post({**BASE, **neutral})[2])
    again = [*BASE["messages"], answer["choices"][0]["message"], *user("Go on.")]
    assert error_free(server.post({**BASE, "messages": again}))
    assert error_free(server.post({"model": "tiny", "prompt": "Hi", "max_tokens": 1, "echo": False,
                                   "suffix": None, "best_of": 2, "n": 2}, "/v1/completions"))


def error_free(response):
    return response[0] == 200 and "error" not in json.loads(response[2])


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"5", b'"x"', b"\xff\xfe{}", b"null", b"[" * 100_000, b'{"a":' * 50_000,
    b'{"model": "tiny", "max_tokens": ' + b"9" * 5000 + b"}", b'{"\\ud800": 1}',
    b'{"model": "\\ud800", "messages": [{"\\udfff": "\\ud800"}]}'])
def test_a_body_that_is_no_object_is_refused(server, body):
    assert error_of(server.post(body), 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", [None, "", [], [""], [[]], [5, "x"], [[5, "x"]], 5, ["a"] * 65,
                                    [-1], [10**9], [2**70], [True], {"a": 1}, ["a", [1]] * 40])
def test_prompts_that_are_none(server, prompt):
    error = error_of(server.post({"model": "tiny", "prompt": prompt}, "/v1/completions"), 400)
    assert error["param"] == "prompt"


def test_models_paths_methods_and_types(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "gpt-stream"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.NotFoundError) as caught:
        server.chat("Hi", model="gpt-5")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    error_of(server.http("GET", "/v1/nothing"), 404)
    error_of(server.http("GET", "/v1/chat/completions"), 405)
    body = json.dumps(BASE).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        error_of(server.http("POST", "/v1/chat/completions", body, {"Content-Type": kind}), 415)
    assert server.post(BASE, **{"Content-Type": "application/json; charset=utf-8"})[0] == 200


def test_large_and_slow_bodies(server, monkeypatch):
    error_of(server.post(b" " * (5 << 20)), 413)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:  # chunked: no length is said
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                     b"application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                sock.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        assert b" 413 " in sock.recv(100)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:  # half a body, then gone
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                     b"application/json\r\nContent-Length: 100\r\n\r\n{")
    assert server.post(BASE)[0] == 200


def test_a_thousand_random_bodies_are_answered_or_refused(server):
    rng = random.Random(0)
    values = [None, True, -1, 0, 1, 2, 1e308, 2**64, "", "x", "\ud800", "tiny", [], {}, [[]], ["a"],
              [1, 2], {"a": {}}, [None], "\x00<|im_end|></s>", [{"role": "user", "content": "x"}],
              [{"role": "assistant", "content": ""}], {"type": "text"}, float("inf"), float("nan")]
    fields = ["model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature",
              "top_p", "top_k", "min_p", "stop", "seed", "n", "logprobs", "top_logprobs", "stream",
              "stream_options", "tools", "presence_penalty", "frequency_penalty", "user", "x",
              "repetition_penalty", "response_format", "logit_bias", "echo", "suffix", "best_of"]

    def body():
        content = {**BASE, "prompt": "Hi", "max_tokens": rng.randrange(1, 4)}
        content.pop(rng.choice(["messages", "prompt"]))
        for field in rng.sample(fields, rng.randrange(4)):
            content[field] = rng.choice(values)
        if rng.random() < 0.3 and isinstance(content.get("messages"), list):
            content["messages"] = [{rng.choice(["role", "content", "name", "x"]): rng.choice(values)
                                    for _ in range(3)} for _ in range(rng.randrange(3))]
        if isinstance(content.get("n"), int):
            content["max_tokens"] = 1
        text = bytearray(json.dumps(content).encode())
        if rng.random() < 0.3:
            for _ in range(rng.randrange(1, 5)):
                text[rng.randrange(len(text))] = rng.randrange(256)
        return bytes(text)

    def ask(job):
        path, text = job
        status, headers, content = server.post(text, path)
        assert status in (200, 400, 404, 413, 429), (text, status, content)
        if status != 200:
            assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
        return status

    jobs = [(rng.choice(["/v1/chat/completions", "/v1/completions"]), body()) for _ in range(1000)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, jobs))
    assert found.count(200) > 50 and found.count(400) > 300
    server.until("rows_busy", 0)


def test_a_client_that_leaves_while_it_sends_is_no_fault_of_the_server(server):
    def refused():
        _, _, text = server.http("GET", "/metrics")
        return {line.rsplit(" ", 1)[0] for line in text.decode().splitlines() if '"499"' in line}

    before = len(server.said)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                           b"application/json\r\nContent-Length: 1000\r\n\r\n{")
    deadline = time.time() + 20
    while not refused():
        assert time.time() < deadline
        time.sleep(0.01)
    assert len(server.said) == before


def test_a_client_that_leaves_before_its_whole_answer_is_no_fault_either(server):
    def counted(status):
        _, _, text = server.http("GET", "/metrics")
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.decode().splitlines()
                   if f'"{status}"' in line)

    before, gone = len(server.said), counted(499)
    body = json.dumps({"model": "tiny", "messages": user("Sing."), "temperature": 0,
                       "max_tokens": 300}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
                           b" application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        server.until("rows_busy", 1)
    deadline = time.time() + 20
    while counted(499) == gone:
        assert time.time() < deadline
        time.sleep(0.01)
    server.until("rows_busy", 0)
    assert len(server.said) == before and not counted(500)


def test_no_word_of_what_is_said_is_told(server):
    server.chat("Abracadabra, my secret!", max_tokens=5)
    server.post({**BASE, "messages": [{"role": "user", "content": ["Abracadabra"]}]})
    _, _, figures = server.http("GET", "/metrics")
    assert b"bracadabra" not in figures and "bracadabra" not in "".join(server.said)
    assert server.http("GET", "/health")[0] == 200


# ------------------------------------------------------------------------------ who may ask


def test_an_allowed_name_is_one_in_any_case():
    request = Request({"type": "http", "headers": [(b"host", b"gpu-box.LOCAL:80")]})
    check_host(request, Settings("tiny", hosts=("GPU-Box.local",)))
    with pytest.raises(ApiError):
        check_host(request, Settings("tiny", hosts=("gpu-box",)))


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200),
    ("evil.example", 421), ("evil.example:8000", 421), ("", 421), ("127.0.0.1.evil.example", 421),
    ("LocalHost", 200), ("localhost.evil.example", 421)])
def test_other_sites_names_are_refused(server, host, status):
    for method, path, body in (("GET", "/v1/models", None), ("GET", "/", None),
                               ("POST", "/v1/chat/completions", json.dumps(BASE).encode())):
        response = server.http(method, path, body, {"Host": host,
                                                    "Content-Type": "application/json"})
        assert response[0] == status
        if status != 200:
            error = error_of(response, status)
            assert f"--allow-host {host.partition(':')[0] or 'NAME'}." in error["message"]
    for path in ("/health", "/v1/health", "/metrics"):  # which say nothing that is secret
        assert server.http("GET", path, headers={"Host": host})[0] == 200


def test_no_page_of_another_site_may_ask(server):
    for method in ("OPTIONS", "POST"):
        _, headers, _ = server.http(method, "/v1/chat/completions", json.dumps(BASE).encode(), {
            "Origin": "https://evil.example", "Content-Type": "application/json",
            "Access-Control-Request-Method": "POST"})
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_keys_pins_names_and_origins(tmp_path, loaded):
    """A server with all of them. Who has another key finds nothing that was kept for the first."""
    keys = tmp_path / "keys"
    keys.write_text("first-key\n\n  second-key \nschl\u00fcssel\n", encoding="utf-8")
    server = Server("--api-key-file", keys, "--allow-origin", "https://good.example",
                    "--pin-system", "Be a cat.", sizes=("--batch", 1, "--window", 100))
    try:
        for key in ("none", "\u00fc", "first-ke", "first-key ", "FIRST-KEY", ""):
            error = error_of(server.post(BASE, Authorization=f"Bearer x{key}"), 401)
            assert error["code"] == "invalid_api_key"
        error_of(server.post(BASE), 401)
        error_of(server.http("GET", "/v1/models"), 401)
        key = "Bearer schl\u00fcssel".encode()
        assert server.http("GET", "/v1/models", headers={"Authorization": key})[0] == 200
        assert server.http("GET", "/metrics")[0] == server.http("GET", "/health")[0] == 200
        first, second = server.client("first-key"), server.client("second-key")
        _, tokenizer = loaded
        n_sink = len(tokenizer.system_turn("Be a cat."))
        cache = make_cache(loaded[0], n_sink, 100)
        ids = tokenizer.first_turn("Who?", "Be a cat.")
        found, text = alone(loaded, ids, 100, cache)
        answer = server.chat("Who?", first, max_tokens=100)
        assert said(answer) == text and answer.usage.prompt_tokens == len(ids)
        talk = user("Who?", text, "Why?")
        stranger = server.chat(talk, second)
        assert cached(stranger) <= n_sink
        went_on = server.chat(talk, first)
        assert cached(went_on) == len(ids) + 100
        assert said(went_on) == alone(loaded, tokenizer.next_turn("Why?", found[-1]), 20, cache)[1]
        with pytest.raises(openai.BadRequestError, match="pin-system"):
            server.chat([{"role": "system", "content": "Be a dog."}, *user("Hi")], first)
        _, headers, _ = server.http("OPTIONS", "/v1/chat/completions", headers={
            "Origin": "https://good.example", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type"})
        assert headers["Access-Control-Allow-Origin"] == "https://good.example"
        assert not [line for line in server.said if "key" in line]
    finally:
        assert server.end() == 0


@pytest.mark.parametrize("argv, naming", [
    (["--host", "0.0.0.0"], ["0.0.0.0", "--api-key-file", "--no-auth"]),
    (["--host", "::"], ["--api-key-file"]), (["--api-key-file", "/no/such"], ["/no/such"]),
    (["--api-key-file", os.devnull], [os.devnull, "no key"]), (["--port", "65536"], ["65536"]),
    (["--checkpoint", "/no/such"], ["/no/such"]), (["--batch", "0"], ["--batch", "0"]),
    (["--pin-system", "x", "--sink", "3"], ["--pin-system", "--sink"]),
    (["--json"], ["--json"]), (["--compile-prefill"], ["goes with --compile"]),
    (["--window", "999"], ["999"]), (["--keep-gb", "-1"], ["--keep-gb"]),
    (["--pin-system", ""], ["--pin-system", "empty"]),
    (["--host", "203.0.113.7", "--no-auth"], ["203.0.113.7"]),
    (["--api-key-file", __file__, "--no-auth"], ["--api-key-file", "--no-auth"])])
def test_a_command_line_that_cannot_be_is_one_line(argv, naming):
    if "--checkpoint" not in argv:
        argv = ["--checkpoint", TINY, *argv]
    status, out, err = run("server", "--port", "0", *argv)
    last = err.strip().splitlines()[-1]
    assert status == 2 and not out and "Traceback" not in err
    assert last.startswith("python -m server: error: "), last
    assert all(str(name) in last for name in naming), last


def test_a_port_that_is_taken_is_one_line(server):
    status, _, err = run("server", "--checkpoint", TINY, "--port", server.port)
    assert status == 2 and f"--port {server.port}" in err.splitlines()[-1]


# ------------------------------------------------------------------------------ the end


def test_when_the_queue_is_full_clients_are_asked_to_come_again():
    server = Server("--queue", 2, sizes=("--batch", 1, "--window", WINDOW))
    try:
        error = error_of(server.post({"model": "tiny", "prompt": ["a", "b", "c", "d"]},
                                     "/v1/completions"), 400)
        assert "4 prompts" in error["message"] and "--queue" in error["message"]  # for good
        streams = [server.chat("Sing.", stream=True, max_tokens=500) for _ in range(2)]
        next(iter(streams[0]))
        pool = concurrent.futures.ThreadPoolExecutor(12)
        asked = [pool.submit(server.post, {**BASE, "max_tokens": 1}) for _ in range(12)]
        done = [one.result() for one in asked[:0]]
        deadline = time.time() + 20
        while not done and time.time() < deadline:
            done = [one.result() for one in asked if one.done() and one.result()[0] == 429]
            time.sleep(0.01)
        status, headers, content = done[0]
        assert int(headers["Retry-After"]) >= 1
        assert json.loads(content)["error"]["code"] == "queue_full"
        for stream in streams:
            stream.close()
        assert {one.result()[0] for one in asked} == {200, 429}
    finally:
        assert server.end() == 0


def test_sigterm_lets_running_answers_end_and_takes_no_more():
    server = Server()
    stream = iter(server.chat("Sing.", stream=True, max_tokens=400))
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    while server.http("GET", "/health")[0] == 200:
        time.sleep(0.01)
    error = error_of(server.post(BASE), 503)
    assert error["type"] == "server_error"
    assert [c.choices[0].finish_reason for c in stream][-1] == "length"
    assert server.process.wait(20) == 0


def test_after_the_grace_answers_are_cut_with_an_error():
    server = Server("--grace", 0.1)
    stream = iter(server.chat("Sing.", stream=True, max_tokens=500))
    next(stream)
    whole = concurrent.futures.ThreadPoolExecutor(1).submit(
        server.post, {**BASE, "max_tokens": 500})
    server.until("rows_busy", 2)
    server.process.send_signal(signal.SIGHUP)  # as SIGTERM
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    assert whole.result()[0] == 503
    assert server.process.wait(20) == 0


# ------------------------------------------------------------------------------ its own clients


def test_random_clients_that_join_leave_and_send_rubbish_leave_nothing_behind(server):
    status, out, err = run("server.soak", "--url", f"http://127.0.0.1:{server.port}/v1", "--model",
                           "tiny", "--seconds", 2, "--pid", server.process.pid)
    end = json.loads(out.splitlines()[-1])
    assert status == 0, out + err
    assert end["answered"] > 10 and end["left"] > 5 and end["400"] > 3 and end["memory_mb"] > 50
    assert end["end"] == ["gpt_stream_rows_busy 0.0", "gpt_stream_queue 0.0"]


def test_the_measuring_client_counts_what_the_server_counts(server, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello there"}\n{"turns": ["Who?", "Why?"]}\n')
    argv = ["--url", f"http://127.0.0.1:{server.port}/v1", "--model", "tiny", "--prompts",
            tmp_path / "p.jsonl", "--max-new-tokens", 9]
    for more in (["--clients", "1,2"], ["--clients", "2", "--stream"],
                 ["--turns", "4", "--plot", str(tmp_path / "kept.png")],
                 ["--clients", "1", "--stream", "--beside", "500"]):
        before = server.figures()['tokens_total{kind="generated"}']
        status, out, err = run("server.measure", *argv, *more)
        lines = [json.loads(line) for line in out.splitlines()]
        assert status == 0, err
        generated = server.figures()['tokens_total{kind="generated"}'] - before
        if "--turns" in more:
            assert [line["turn"] for line in lines] == [2, 4]
            assert lines[1]["prompt_tokens_details"]["cached_tokens"] > 50
            assert all(line["first_kept_s"] > 0 < line["first_not_kept_s"] for line in lines)
            assert (tmp_path / "kept.png").stat().st_size > 5000
            continue
        assert all(line["new_tokens"] == 18 and line["tok_s"] > 0 for line in lines)
        assert "--beside" in more or generated == 18 * len(lines)
        assert ("--stream" in more) == (lines[0]["first_p50_s"] is not None)


def test_a_replicas_engine_is_warmed_in_the_thread_that_runs_it(monkeypatch):
    """CUDA graphs belong to the thread that records them."""
    from server.__main__ import engine_arguments, make_server_parser, start_engine
    from server.engine import Engine
    threads = {}
    for name in ("warm", "run"):
        method = getattr(Engine, name)
        monkeypatch.setattr(Engine, name, lambda engine, name=name, method=method: (
            threads.update({name: threading.get_ident()}), method(engine)))
    argv = ["--checkpoint", str(TINY), "--device", "cpu", "--batch", "1", "--window", "60"]
    engine = start_engine(**engine_arguments(make_server_parser().parse_args(argv)))
    assert engine.state() == "ok"
    engine.stop()
    assert engine.ended.wait(20)
    assert threads["warm"] == threads["run"] != threading.get_ident()
    with pytest.raises(ValueError, match="window 99999"):
        start_engine(**engine_arguments(make_server_parser().parse_args(
            [*argv[:-1], "99999"])))
