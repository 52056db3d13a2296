"""Tools as clients of the server see them: what is called, streamed, sent back and refused."""

import asyncio
import json
import shutil

import pytest

from helpers import TINY, random_model
from test_tools import call
from tokenizer import Tokenizer
from tool_forms import CLOCK, HERMES, TEMPLATES, TOOLS, WEATHER, write_tool_tokenizer

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
import jsonschema  # noqa: E402
import pydantic  # noqa: E402

from server.engine import Engine  # noqa: E402
from server.grammars import check_tools, compile_now, prepare  # noqa: E402
from server.jobs import make_jobs  # noqa: E402
from server.protocol import ApiError, parse_request  # noqa: E402
from server.responses import ResponseWriter  # noqa: E402
from test_server import Server, user  # noqa: E402

pytestmark = pytest.mark.slow  # threads and processes
FORMS = list(TEMPLATES)
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """An engine of each form, with random weights."""
    root, made = tmp_path_factory.mktemp("engines"), {}
    for form in (*FORMS, "none", "xml"):
        tokenizer = Tokenizer(write_tool_tokenizer(root / form, form))
        model = random_model(vocab_size=tokenizer.vocabulary.library.get_vocab_size(),
                             eos_ids=(tokenizer.eos_id,))
        made[form] = Engine(model, tokenizer, 2, 4, 3000).start()
    yield made
    for engine in made.values():
        engine.stop()
        assert engine.ended.wait(20)


def ask(engine, messages, **options):
    """(the completion, the deltas of its stream) as the HTTP side makes them."""
    body = {"model": "m", "messages": messages, "temperature": 1.5, "seed": 1, "max_tokens": 300,
            **options}
    request = parse_request(json.dumps(body).encode(), True, "m", 500)
    check_tools(engine, request)
    if request.grammar_field:
        prepare(engine)
        compile_now(engine, request)
    whole, stream = ResponseWriter(request, "m", ""), ResponseWriter(request, "m", "")
    chunks = []

    async def run():
        jobs = make_jobs(engine, request, "")
        async for events in engine.submit(jobs):
            whole.add(events)
            text = stream.chunks(events, jobs).decode()
            chunks.extend(json.loads(line[6:]) for line in text.split("\n\n") if line)
        engine.cancel(jobs)
        return whole.completion(jobs)

    return asyncio.run(run()), [chunk["choices"][0] for chunk in chunks]


def message_of(completion):
    return completion["choices"][0]["message"]


def cached(completion):
    return completion["usage"]["prompt_tokens_details"]["cached_tokens"]


# ------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_streamed_as_openai_streams_it(engines, form):
    completion, choices = ask(engines[form], user("Is it warm?"), tools=TOOLS,
                              tool_choice="required")
    message = message_of(completion)
    assert completion["choices"][0]["finish_reason"] == choices[-1]["finish_reason"] == "tool_calls"
    assert message["content"] is None and message["tool_calls"]
    assert not any(choice["delta"].get("content") for choice in choices)
    deltas = [one for choice in choices for one in choice["delta"].get("tool_calls", ())]
    calls = []
    for delta in deltas:
        if "id" in delta:  # the first of a call
            assert delta["index"] == len(calls) and delta["type"] == "function"
            assert delta["function"]["arguments"] == ""
            calls.append({**delta, "function": {**delta["function"]}})
        else:
            assert delta.keys() == {"index", "function"} and delta["index"] == len(calls) - 1
            calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
    assert [{key: one[key] for key in one if key != "index"} for one in calls] == \
        message["tool_calls"]
    assert len(deltas) > 2 * len(calls) or calls[0]["function"]["name"] == "clock"


@pytest.mark.parametrize("form", FORMS)
def test_calls_and_results_that_come_back_are_cached(engines, form):
    """The next request reads its new turns only, though a client writes the arguments anew."""
    engine, tokenizer = engines[form], engines[form].tokenizer
    talk, args = user("Is it warm in Paris?"), {"tools": TOOLS}
    held = 0
    for turn in range(3):
        completion, _ = ask(engine, talk, tools=TOOLS, tool_choice=NAMED, seed=turn)
        message = message_of(completion)
        [called] = message["tool_calls"]
        jsonschema.validate(json.loads(called["function"]["arguments"]),
                            WEATHER["function"]["parameters"])
        assert cached(completion) == held, turn
        held = completion["usage"]["prompt_tokens"] + completion["usage"]["completion_tokens"]
        anew = json.dumps(json.loads(called["function"]["arguments"]), indent=2)
        called = {**called, "function": {**called["function"], "arguments": anew}}
        talk += [{"role": "assistant", "content": None, "tool_calls": [called]},
                 {"role": "tool", "tool_call_id": called["id"], "content": f"{turn} degrees"}]
    completion, _ = ask(engine, talk, tools=TOOLS, max_tokens=5)
    request = parse_request(json.dumps({"model": "m", "messages": talk, "tools": TOOLS}).encode(),
                            True, "m", 500)
    # The model ends its turn with any of the tokens that end one; the template's own comes once.
    new = [len(tokenizer.turns_after(request.messages, len(talk) - 2, last_id, args))
           for last_id in (tokenizer.eos_id, None)]
    assert cached(completion) == held and completion["usage"]["prompt_tokens"] - held in new
    # whatever else is said of tools is another conversation
    for changed in (dict(tools=[WEATHER]), dict(tools=TOOLS, tool_choice="none")):
        assert cached(ask(engine, talk, max_tokens=1, **changed)[0]) == 0
    other = json.loads(json.dumps(talk))
    other[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "x", "days": 1}'
    assert cached(ask(engine, other, tools=TOOLS, max_tokens=1)[0]) < held


def test_a_call_that_is_cut_ends_with_length(engines):
    for n in range(16, 60, 6):
        completion, choices = ask(engines["hermes"], user("Hi"), tools=TOOLS, tool_choice=NAMED,
                                  max_tokens=n)
        [cut] = message_of(completion).get("tool_calls", [{"function": {"arguments": ""}}])
        if len(cut["function"]["arguments"]) > 4:
            break
    assert completion["choices"][0]["finish_reason"] == choices[-1]["finish_reason"] == "length"
    assert cut["function"]["name"] == "get_weather"
    assert cut["function"]["arguments"].startswith("{")
    with pytest.raises(ValueError):
        json.loads(cut["function"]["arguments"])


def test_auto_leaves_the_model_free_and_none_leaves_the_tools_out(engines):
    engine = engines["hermes"]
    free = ask(engine, user("Hi"), max_tokens=30)[0]
    none = ask(engine, user("Hi"), tools=TOOLS, tool_choice="none", max_tokens=30)[0]
    assert message_of(none) == message_of(free) and "tool_calls" not in message_of(free)
    assert none["usage"]["prompt_tokens"] == free["usage"]["prompt_tokens"]
    auto = ask(engine, user("Hi"), tools=[CLOCK], max_tokens=30)[0]
    assert auto["usage"]["prompt_tokens"] > free["usage"]["prompt_tokens"]
    assert "tool_calls" not in message_of(auto) and message_of(auto)["content"]


def test_every_choice_has_calls_of_its_own(engines):
    completion, _ = ask(engines["mistral-v7"], user("Hi"), tools=[WEATHER], tool_choice="required",
                        parallel_tool_calls=False, n=4)
    calls = [choice["message"]["tool_calls"] for choice in completion["choices"]]
    assert [len(one) for one in calls] == [1] * 4
    assert len({one["id"] for [one] in calls}) == 4
    assert len({one["function"]["arguments"] for [one] in calls}) > 1


# ------------------------------------------------------------------------------ refusals


def tool(**changes):
    return {"type": "function", "function": {"name": "f", **changes}}


CALLED = {"role": "assistant", "tool_calls": [call("clock", {})]}
RESULT = {"role": "tool", "tool_call_id": "abcdefgh1", "content": "5"}


@pytest.mark.parametrize("fields, param", [
    ({"tools": 5}, "tools"), ({"tools": ["f"]}, "tools.0.type"),
    ({"tools": [{"type": "web"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [tool(name=None)]}, "tools.0.function.name"),
    ({"tools": [tool(name="a b")]}, "tools.0.function.name"),
    ({"tools": [tool(), tool()]}, "tools.1.function.name"),
    ({"tools": [tool(description=5)]}, "tools.0.function.description"),
    ({"tools": [tool(strict="yes")]}, "tools.0.function.strict"),
    ({"tools": [tool(parameters=[])]}, "tools.0.function.parameters"),
    ({"tools": [tool(parameters={"type": "array"})]}, "tools.0.function.parameters.type"),
    ({"tools": [tool(), tool(name="g", strict=True, parameters={"type": "object", "properties": {
        "a": {"type": "banana"}}})]}, "tools.1.function.parameters"),
    ({"tools": [tool(parameters={"uniqueItems": True})], "tool_choice": "required"},
     "tools.0.function.parameters"),
    ({"tool_choice": "required"}, "tool_choice"), ({"tool_choice": NAMED}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex"),
    ({"tools": TOOLS, "response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"type": "banana"}}}}, "response_format.json_schema.schema"),
    ({"tools": TOOLS, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ({"messages": [{**CALLED, "tool_calls": [5]}]}, "messages.0.tool_calls.0"),
    ({"messages": [{**CALLED, "tool_calls": {}, "content": "x"}, CALLED, 5]}, "messages.2"),
    ({"messages": [{**CALLED, "tool_calls": [{**CALLED["tool_calls"][0], "id": None}]}]},
     "messages.0.tool_calls.0.id"),
    ({"messages": [{**CALLED, "tool_calls": [call("clock", 5)]}]},
     "messages.0.tool_calls.0.function.arguments"),
    ({"messages": [*user("Hi"), {**CALLED, "tool_calls": [{"id": "1", "function": {
        "name": "f", "arguments": "{"}}]}]}, "messages.1.tool_calls.0.function.arguments"),
    ({"messages": [{"role": "assistant"}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "5"}]}, "messages.0.tool_call_id"),
    ({"messages": [{**RESULT, "content": None}]}, "messages.0.content"),
    ({"messages": [{**CALLED, "role": "user", "content": "x"}]}, "messages.0.tool_calls"),
    ({"messages": [{**RESULT, "role": "user"}]}, "messages.0.tool_call_id")])
def test_what_cannot_be_is_refused_by_its_place(engines, fields, param):
    with pytest.raises(ApiError) as caught:
        ask(engines["hermes"], **{"messages": user("Hi"), **fields})
    error = caught.value.body["error"]
    assert caught.value.status == 400 and error["param"] == param
    assert "\n" not in error["message"] and param in error["message"]


def test_what_a_template_cannot_say_is_refused(engines):
    for form, fields, param in (
            ("none", {"tools": TOOLS}, "tools"), ("xml", {"tools": TOOLS}, "tools"),
            ("none", {"messages": [*user("Hi"), CALLED, RESULT]}, "messages.1"),
            ("llama3", {"messages": [*user("Hi"), {**CALLED, "tool_calls": [
                call("clock", {}), call("clock", {}, "abcdefgh2")]}], "tools": TOOLS}, "messages"),
            ("mistral-v7", {"messages": [*user("Hi"), CALLED, {**RESULT, "tool_call_id": "5"}],
                            "tools": TOOLS}, "messages")):
        with pytest.raises(ApiError) as caught:
            ask(engines[form], **{"messages": user("Hi"), **fields})
        assert caught.value.status == 400 and caught.value.body["error"]["param"] == param
    for form in ("hermes", "xml"):  # without tools, calls are only a part of the history
        assert ask(engines[form], [*user("Hi"), CALLED, RESULT], max_tokens=2)
    assert ask(engines["none"], user("Hi"), tools=TOOLS, tool_choice="none", max_tokens=2)


# ------------------------------------------------------------------------------ real clients


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The embedded model, whose vocabulary has no tokens for marks, with a template for tools."""
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("server") / "tiny")
    (folder / "chat_template.jinja").write_text(HERMES)
    server = Server("--checkpoint", folder, "--max-new-tokens", 300, sizes=(
        "--batch", 4, "--window", 240))
    yield server
    assert server.end() == 0
    assert not [line for line in server.said if "Traceback" in line or "failed" in line]


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: str = pydantic.Field(max_length=9)
    days: int = pydantic.Field(ge=1, le=14)


def test_openai_calls_a_pydantic_model_whole_and_streamed(server):
    completions = server.client().chat.completions
    asked = dict(model="tiny", messages=user("Is it warm?"), temperature=1.5, seed=3,
                 tools=[openai.pydantic_function_tool(Weather)], tool_choice="required",
                 parallel_tool_calls=False)
    whole = completions.parse(**asked).choices[0]
    [called] = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    assert isinstance(called.function.parsed_arguments, Weather)
    with completions.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.done" in kinds
    assert kinds.count("tool_calls.function.arguments.delta") > 3
    assert final.message.tool_calls[0].function == called.function
    back = [*asked["messages"], whole.message.model_dump(exclude_unset=True), {
        "role": "tool", "tool_call_id": called.id, "content": "Warm."}]
    again = completions.create(**{**asked, "messages": back, "tool_choice": "auto",
                                  "max_tokens": 9})
    assert again.usage.prompt_tokens_details.cached_tokens > 100


def test_pydantic_ai_runs_an_agent_with_tools(server):
    """Its typed results are calls, too, so its model has to call one or the other."""
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider
    model = OpenAIChatModel("tiny", provider=OpenAIProvider(openai_client=openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)))
    agent, asked = pydantic_ai.Agent(model, output_type=Weather), []

    async def at_first_only(context, definition):
        return definition if context.run_step == 1 else None

    @agent.tool_plain(prepare=at_first_only)
    def days_left(days: pydantic.conint(ge=0, le=9)) -> str:
        """How many days are left."""
        asked.append(days)
        return f"{days} are left"

    for seed in range(12):
        result = agent.run_sync("Is it warm?", model_settings={
            "temperature": 1.0, "seed": seed, "max_tokens": 250, "parallel_tool_calls": False})
        assert isinstance(result.output, Weather) and 1 <= result.output.days <= 14
        if asked:
            break
    assert asked and all(0 <= days <= 9 for days in asked)

