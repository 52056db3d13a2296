"""The server's engine by itself: what it keeps, what it forgets, and who comes first."""

import asyncio
import json
import shutil
import time

import pytest
import torch

pytest.importorskip("fastapi")
from generate import generate, load, make_cache, prefill  # noqa: E402
from helpers import TINY, random_model  # noqa: E402
from kv_cache import KVCache  # noqa: E402
from server.engine import Engine  # noqa: E402
from server.jobs import make_jobs  # noqa: E402
from server.metrics import Metrics  # noqa: E402
from server.prefix_cache import (  # noqa: E402
    CachedPrefix,
    PrefixCache,
    copy_from_row,
    copy_to_row,
    prefix_keys,
)
from server.protocol import ApiError, parse_request  # noqa: E402
from server.responses import ResponseWriter  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded():
    return load(TINY, device="cpu", dtype=torch.float32)


@pytest.fixture
def engine(loaded):
    engines = []

    def make(**sizes):
        engines.append(Engine(*loaded, **{"batch_size": 2, "window": 60, **sizes}).start())
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()
        assert engine.ended.wait(20)


async def ask(engine, *turns, client="", **options):
    """The whole answer to a conversation's turns, as the HTTP side asks for it."""
    messages = [{"role": ("user", "assistant")[at % 2], "content": turn}
                for at, turn in enumerate(turns)]
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 12, **options}
    request = parse_request(json.dumps(body).encode(), True, "m", 500)
    jobs, writer = make_jobs(engine, request, client), ResponseWriter(request, "m", "")
    async for events in engine.submit(jobs):
        writer.add(events)
    engine.cancel(jobs)
    return writer.completion(jobs)


def run(engine, *turns, **options):
    return asyncio.run(ask(engine, *turns, **options))


def rest(engine):
    """Until nothing runs any more: the last event is told before its row is cleared."""
    deadline = time.time() + 20
    while not (engine.batch.idle and engine.idle()):
        assert time.time() < deadline
        time.sleep(0.001)
    return engine


def logprobs(answer):
    return [(token["token"], token["logprob"], [t["logprob"] for t in token["top_logprobs"]])
            for token in answer["choices"][0]["logprobs"]["content"]]


def test_after_a_secret_an_answer_is_a_fresh_servers_to_the_bit(engine):
    """Rows and staging rows were full of it, past the window, stopped by a text, or abandoned."""
    fresh, used = engine(), engine()
    for n in range(3):
        run(used, f"The secret is {n}! " * 60, n=3, max_tokens=40)
        run(used, f"A short secret {n}.", stop="the")
    question = dict(logprobs=True, top_logprobs=5, max_tokens=30)
    assert logprobs(run(used, "What is it?", **question)) == logprobs(
        run(fresh, "What is it?", **question))


def test_of_what_has_ended_nothing_is_left_in_a_row(engine):
    secret = engine(cache_bytes=0)
    run(secret, "The secret is in here! " * 40, n=3, max_tokens=40)
    run(secret, "Another. " * 9)
    rest(secret)
    for cache in (secret.batch.cache, *secret.batch.staging):
        for layer in (*cache.k, *cache.v):
            assert not layer[:, :, 1:].any()  # idle rows step at position 0


def test_short_prompts_overtake_long_ones(engine):
    async def both():
        one = engine(batch_size=4)
        long = [asyncio.ensure_future(ask(one, f"{n} is long. " * 4000, max_tokens=1))
                for n in range(3)]
        while not one.batch.prefills:
            await asyncio.sleep(0.001)
        for n in range(5):
            await ask(one, f"Short {n}", max_tokens=2)
        assert not any(answer.done() for answer in long)
        one.cancel(list(one.jobs))
        for answer in long:
            answer.cancel()

    asyncio.run(both())


def test_a_cancelled_prompt_is_not_prefilled_on(engine):
    async def leave():
        one = engine()
        answer = asyncio.ensure_future(ask(one, "Long. " * 20_000))
        while not one.batch.prefills:
            await asyncio.sleep(0.001)
        one.cancel(list(one.jobs))
        answer.cancel()
        await ask(one, "Short")
        return one

    assert not rest(asyncio.run(leave())).answers


def test_when_the_model_fails_everyone_is_told_and_it_goes_on(engine, monkeypatch):
    one = engine()
    before = run(one, "Hello")["choices"]
    step, calls = one.model.step, []

    def fail(*args):  # as prompts are half read, and then as rows are at work
        calls.append(args)
        if len(calls) in (3, 20):
            raise RuntimeError("not enough memory, and a quoted prompt")
        return step(*args)

    monkeypatch.setattr(one.model, "step", fail)
    for prompt in ("Hello there. " * 300, "Well"):
        with pytest.raises(Exception, match="The engine failed") as caught:
            run(one, prompt, max_tokens=100)
        assert caught.value.status == 500 and "prompt" not in str(caught.value)
        assert run(one, "Hello")["choices"] == before
    assert len(calls) > 20


def test_an_end_is_no_token_to_the_histograms(engine):
    """Of N tokens one is the first, and N - 1 come after another."""
    async def watched(one):
        metrics, body = Metrics(one), {"model": "m", "prompt": "Hello", "max_tokens": 9}
        jobs = make_jobs(one, parse_request(json.dumps(body).encode(), False, "m", 500), "")
        async for _ in metrics.watch(one.submit(jobs), jobs):
            pass
        return metrics.text().decode(), sum(job.new_tokens for job in jobs)

    text, n = asyncio.run(watched(engine()))
    assert n > 2
    for name, count in (("first", 1), ("next", n - 1)):
        assert f"gpt_stream_{name}_token_seconds_count {float(count)}" in text


# ------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("n_tokens, undo", [(9, 0), (40, 3), (200, 0), (200, 16), (200, 17),
                                            (9, 9)])
def test_a_row_is_put_back_as_it_was(n_tokens, undo):
    model = random_model()
    sizes = dict(n_sink=4, window=28, max_chunk=16)
    ids = torch.randint(64, (n_tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    cache = KVCache(model.config, 1, **sizes)
    prefill(model, cache, ids)
    overhang = cache.overhang[0]
    kept = copy_from_row(cache, 0, ids).without_last(undo)
    if undo + overhang > 16 or undo >= n_tokens:  # deeper than the ring goes back
        assert kept is None
        return
    other = KVCache(model.config, 3, **sizes)
    prefill_of_three = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for _ in range(9):
            model(prefill_of_three, other)  # full of something else
        copy_to_row(kept, other, 1)
        if undo:
            cache.rollback(undo)
        following = torch.tensor([[7]])
        expected = model(following, cache)
        found = model(following.expand(3, 1), other)[1]
    assert other.overhang[1] == max(0, kept.overhang - 1)
    assert torch.allclose(found, expected[0], atol=1e-5) and kept.ids == ids[:n_tokens - undo]


def test_the_least_recently_used_prefix_is_evicted_first():
    def prefix(n):
        return CachedPrefix([torch.zeros(n)], [torch.zeros(n)], [], 0, 16)  # 8 bytes an n

    cache = PrefixCache(100)
    for name in "abc":
        cache.add(name, prefix(4))
    assert cache.find_longest(["a"])[0] == 0 and cache.find_longest(["x", "b", "y"])[0] == 1
    cache.add("d", prefix(4))  # c was used least recently
    assert list(cache.entries) == ["a", "b", "d"] and cache.nbytes == 96
    cache.add("e", prefix(4), parent_key="b")  # which e goes on from
    assert list(cache.entries) == ["a", "d", "e"]
    cache.add("f", prefix(13))
    assert list(cache.entries) == ["a", "d", "e"] and cache.find_longest(["f"]) == (None, None)
    cache.add("e", prefix(12))
    assert list(cache.entries) == ["e"] and cache.nbytes == 96


def test_keys_tell_messages_apart():
    def of(*pairs):
        return prefix_keys("m", [{"role": role, "content": content} for role, content in pairs])

    assert of(("user", "a"), ("assistant", "b"))[0] == of(("user", "a"))[0]
    keys = [of(("user", "a"), ("user", "b"))[-1], of(("user", "a b"))[-1], of(("user", "ab"))[-1],
            of(("user", "a user 1 b"))[-1], of(("assistant", "ab"))[-1], of(("user", "ab "))[-1],
            prefix_keys("other", [{"role": "user", "content": "ab"}])[-1]]
    assert len(set(keys)) == len(keys)


def test_a_kept_conversation_does_not_change_what_is_said_to_another(engine):
    """Two that go on from the same answer, at the same time, and in its own row again."""
    one = engine()
    first = run(one, "Hello there")["choices"][0]["message"]["content"]
    alone = [run(one, "Hello there", first, turn) for turn in ("Why?", "Who? " * 50)]

    async def together():
        return await asyncio.gather(*(ask(one, "Hello there", first, turn)
                                      for turn in ("Why?", "Who? " * 50)))

    for answers in (alone, asyncio.run(together())):
        for answer, expected in zip(answers, alone):
            assert answer["choices"] == expected["choices"]
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_an_answer_that_its_reader_stopped_goes_on_from_where_he_read(engine, loaded):
    tokenizer = loaded[1]
    one = engine()
    whole = run(one, "Hello there", max_tokens=200)["choices"][0]["message"]["content"]

    async def stop(n_events):
        text = ""
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello there."}],
                "temperature": 0, "max_tokens": 200}
        jobs = make_jobs(one, parse_request(json.dumps(body).encode(), True, "m", 500), "")
        async for events in one.submit(jobs):
            text += "".join(event.text for event in events)
            n_events -= len(events)
            if n_events <= 0:
                break
        one.cancel(jobs)
        return text

    text = asyncio.run(stop(30))
    rest(one)
    assert text and len(text) < len(whole)
    held = len(tokenizer.first_turn("Hello there."))
    for read in (text, text[:text.rindex(" ")]):  # the last piece never came
        usage = run(one, "Hello there.", read, "And?")["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > held
        found, n = usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]
        assert tokenizer.decode(tokenizer.encode(read, bos=False)).strip() == read.strip()
        assert n - found == len(tokenizer.next_turn("And?"))
    assert not run(one, "Hello there.", text[:-1] + "@", "And?")["usage"][
        "prompt_tokens_details"]["cached_tokens"]


def test_penalties_count_what_was_kept_too(engine, loaded):
    """The same as when the whole history is read."""
    one, other = engine(), engine(cache_bytes=0)
    options = dict(repetition_penalty=1.5, max_tokens=20)
    first = run(one, "Hello there, cat", **options)["choices"][0]["message"]["content"]
    turns = ("Hello there, cat", first, "And the cat?")
    kept, read = run(one, *turns, **options), run(other, *turns, **options)
    ids = loaded[1].conversation([{"role": r, "content": c} for r, c in zip(
        ("user", "assistant", "user"), turns)])
    if kept["usage"]["prompt_tokens"] == len(ids):  # the answer reads back to the same tokens
        assert kept["choices"] == read["choices"]
    assert kept["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_without_memory_for_it_nothing_is_kept(engine):
    one = engine(cache_bytes=0)
    first = run(one, "Hello there")["choices"][0]["message"]["content"]
    assert run(one, "Hello there", first, "Why?")["usage"]["prompt_tokens_details"][
        "cached_tokens"] == 0
    assert not one.prefix_cache.entries


def test_make_cache_sizes_are_refused_by_name(loaded):
    with pytest.raises(ValueError, match="window 999"):
        Engine(*loaded, window=999)
    assert make_cache(loaded[0]).window == 252


def test_nothing_is_compiled_once_it_is_warm():
    """Answers alone, side by side, past the window, gone on with, of many settings, and prompts
    whose log-probabilities are asked for."""
    # The sizes of test_compile.py, whose graphs need not be compiled anew.
    loaded = load(TINY.parent / "tiny-draft", device="cpu", dtype=torch.float32, compile=True)
    engine = Engine(*loaded, batch_size=3, window=28)
    engine.warm()
    before = dict(torch._dynamo.utils.counters["stats"])
    assert before["unique_graphs"] > 0
    engine.start()
    first = run(engine, "Hello there", max_tokens=90)["choices"][0]["message"]["content"]
    run(engine, "Hello there", first, "And? " * 60, n=3, temperature=1.0, top_p=0.9, max_tokens=40)

    async def several():
        await asyncio.gather(*(ask(engine, f"Cat {n} " * n * 9, max_tokens=10 + 9 * n, min_p=0.1,
                                   repetition_penalty=1.2, logprobs=True) for n in range(1, 7)))

    async def scored():
        body = {"model": "m", "prompt": [5] * 150, "max_tokens": 1, "echo": True, "logprobs": 2}
        jobs = make_jobs(engine, parse_request(json.dumps(body).encode(), False, "m", 500), "")
        async for _ in engine.submit(jobs):
            pass

    asyncio.run(several())
    asyncio.run(scored())
    assert dict(torch._dynamo.utils.counters["stats"]) == before
    engine.stop()


# ------------------------------------------------------------------------------ chat templates


@pytest.fixture
def moody(tmp_path):
    """An engine with a template that asks for a mood, and a tokenizer that knows an end of turn
    which the config doesn't: a word that the model says."""
    folder = shutil.copytree(TINY, tmp_path / "c")
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if mood %}{{ mood }} {% endif %}assistant:")
    engine = Engine(*load(folder, device="cpu", dtype=torch.float32), batch_size=2,
                    window=60).start()
    yield engine
    engine.stop()
    assert engine.ended.wait(20)


def test_a_templates_arguments_are_obeyed_and_conversations_are_kept_by_them(moody):
    args, conversation = {"mood": "glad"}, ["Hi there."]
    answer = asyncio.run(ask(moody, *conversation, chat_template_kwargs=args))
    ids = moody.tokenizer.first_turn("Hi there.", template_args=args)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert ids != moody.tokenizer.first_turn("Hi there.")
    conversation += [answer["choices"][0]["message"]["content"], "And you?"]
    for other in ({"mood": "sad"}, {}, None):
        told = asyncio.run(ask(moody, *conversation, chat_template_kwargs=other))
        assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    told = asyncio.run(ask(moody, *conversation, chat_template_kwargs=args))
    assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == len(ids) + 12


@pytest.mark.parametrize("args", [
    {"messages": []}, {"add_generation_prompt": False}, {"a": "\ud800"}, 5, ["a"]])
def test_template_arguments_that_cannot_be_are_refused_by_name(args):
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}],
            "chat_template_kwargs": args}
    with pytest.raises(ApiError) as refused:
        parse_request(json.dumps(body).encode(), True, "m", 500)
    assert refused.value.status == 400
    assert refused.value.body["error"]["param"] == "chat_template_kwargs"


def test_an_end_of_turn_that_only_the_tokenizer_knows_ends_a_chat(moody):
    [choice] = asyncio.run(ask(moody, "Hello"))["choices"]
    assert choice["finish_reason"] == "length"
    ids = moody.tokenizer.first_turn("Hello")
    said = list(generate(moody.model, make_cache(moody.model, 4, 60), ids, 12))
    end = said.index(said[6])
    moody.chat_stop_ids.add(said[end])
    [choice] = asyncio.run(ask(moody, "Hello", client="another"))["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == moody.tokenizer.decode(said[:end + 1])
    body = {"model": "m", "prompt": ids, "temperature": 0, "max_tokens": 12}
    request = parse_request(json.dumps(body).encode(), False, "m", 500)

    async def completion():
        jobs, writer = make_jobs(moody, request, ""), ResponseWriter(request, "m", "")
        async for events in moody.submit(jobs):
            writer.add(events)
        return writer.completion(jobs)

    [choice] = asyncio.run(completion())["choices"]
    assert choice["finish_reason"] == "length" and choice["text"] == moody.tokenizer.decode(said)
