"""Replicas on Ray Serve. Skipped without Ray, which is too big for every test run."""

import asyncio
import json
import subprocess
import sys

import pytest

pytest.importorskip("ray", reason="needs pip install -r requirements-ray.txt")
pytest.importorskip("openai", reason="needs pip install openai")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from ray.exceptions import ActorDiedError  # noqa: E402

from helpers import TINY  # noqa: E402
from server.ray_app import Relay, conversation_key, merge_metrics, read_arguments  # noqa: E402

pytestmark = pytest.mark.slow


def body(*turns, system=None, **labels):
    messages = [{"role": ("user", "assistant")[at % 2], "content": turn}
                for at, turn in enumerate(turns)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return json.dumps({"model": "m", "messages": messages, **labels}).encode()


def test_all_requests_of_a_conversation_have_one_name():
    name = conversation_key("me", body("Hi", system="Be kind."))
    assert name == conversation_key("me", body("Hi", "Hello!", "Why?", system="Be kind."))
    parts = body(*[[{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]],
                 system="Be kind.", max_tokens=5)
    assert name == conversation_key("me", parts)
    others = [conversation_key("you", body("Hi", system="Be kind.")),
              conversation_key("me", body("Hi")),
              conversation_key("me", body("Ho", system="Be kind.")),
              conversation_key("me", body("Hi", system="Be kind.", prompt_cache_key="a")),
              conversation_key("me", body("Hi", system="Be kind.", user="a"))]
    assert len({name, *others}) == 6 and None not in others


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"5", b"\xff", b"[" * 100_000, b'{"prompt": "Hi"}', b'{"messages": 5}',
    b'{"messages": [5]}', b'{"messages": [{"role": "user", "content": 5}]}',
    b'{"messages": [{"role": "system", "content": "x"}]}', b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": [], "content": "x"}]}'])
def test_what_is_no_conversation_has_no_name(text):
    assert conversation_key("me", text) is None


def relayed(*messages, error=None):
    """(status, body) that a client gets of a replica that says this much."""
    class Answer:
        async def __aiter__(self):
            for message in messages:
                yield message
            if error:
                raise error

        def cancel(self):
            self.cancelled = True

    sent, answer = [], Answer()

    async def send(message):
        sent.append(message)

    asyncio.run(Relay(answer)({"type": "http"}, None, send))
    assert answer.cancelled and not sent[-1].get("more_body")
    assert [m["type"] == "http.response.start" for m in sent] == [True] + [False] * (len(sent) - 1)
    return sent[0]["status"], b"".join(m["body"] for m in sent[1:])


START = {"type": "http.response.start", "status": 200, "headers": []}


def test_a_replica_that_dies_is_a_503_or_ends_the_stream_with_an_error():
    first = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
    last = {"type": "http.response.body", "body": b"", "more_body": False}
    assert relayed(START, first, last) == (200, b"data: {}\n\n")
    for unbegun in ((), (START,)):
        status, said = relayed(*unbegun, error=ActorDiedError())
        assert status == 503 and json.loads(said)["error"]["type"] == "server_error"
    status, said = relayed(START, first, error=ActorDiedError())
    event = said.removeprefix(b"data: {}\n\ndata: ")
    assert status == 200 and json.loads(event)["error"]["type"] == "server_error"
    assert event.endswith(b"}\n\n")
    assert relayed(START, error=ZeroDivisionError())[0] == 500


def test_flags_are_those_of_the_server():
    args = read_arguments({"checkpoint": "x", "batch": "4", "compile": "true", "replicas": 3,
                           "allow-host": ["a", "b"], "keep_gb": 0.5, "no_auth": False})
    assert (args.checkpoint, args.batch, args.compile, args.replicas) == ("x", 4, True, 3)
    assert (args.allow_host, args.keep_gb, args.no_auth) == (["a", "b"], 0.5, False)
    for given, naming in (({"batch": 0}, "--batch"), ({"hosts": "x"}, "--hosts"),
                          ({"batc": 1}, "--batc"), ({"port": 80}, "port"), ({"grace": 1}, "grace"),
                          ({"replicas": "many"}, "--replicas"),
                          ({"pin_system": "x", "sink": 3}, "--pin-system"),
                          ({"api_key_file": "x", "no_auth": True}, "--no-auth")):
        with pytest.raises(ValueError, match=naming):
            read_arguments(given)


def test_figures_of_all_replicas_are_told_apart():
    text = ('# HELP n_total of a\n# TYPE n_total counter\nn_total{kind="x"} 3.0\n'
            '# HELP t time\n# TYPE t histogram\nt_bucket{le="+Inf"} 2.0\nt_count 2.0\nt_sum 5.0\n')
    merged = merge_metrics([("r1", text), ("r2", text.replace(" 3.0", " 4.0"))]).decode()
    assert merged.count("# TYPE") == 2
    values = {(sample.name, sample.labels["replica"]): sample.value for family in
              text_string_to_metric_families(merged) for sample in family.samples}
    assert values["n_total", "r1"] == 3 and values["n_total", "r2"] == 4
    assert values["t_sum", "r1"] == values["t_sum", "r2"] == 5


def test_clients_hardly_notice_that_a_replica_is_killed():
    done = subprocess.run([sys.executable, "tests/stress/ray_replicas.py", "--json", "--turns",
                           "2"], cwd=TINY.parent.parent, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for part in ("before", "killed", "after"):
        assert found[part]["answered"] == found[part]["requests"] == 32, found
        assert found[part]["given_up"] == 0
        assert set(found[part]["statuses"]) <= {"200", "500", "503"}, found
    assert found["killed"]["stream_errors"] or found["killed"]["statuses"].get("503")
    assert found["same_replicas"] == 1  # the other one lived, and a new one came
    assert set(found["before"]["statuses"]) == set(found["after"]["statuses"]) == {"200"}
    assert found["before"]["kept"] == "16 of 16"
