"""Kills a replica while clients hold conversations, and prints what they notice.

    python tests/stress/ray_replicas.py                                   # the embedded model
    python tests/stress/ray_replicas.py --checkpoint smollm2 --json

It needs requirements-ray.txt and openai. Sixteen of OpenAI's clients hold conversations of several
turns, half of them streamed. One replica's process is killed in the middle of the second third; the
last third begins when Serve has started it anew.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

import openai  # noqa: E402
import ray  # noqa: E402
from ray import serve  # noqa: E402

from server.ray_app import app  # noqa: E402

NAME = f"gpt-stream-{os.getpid()}"
TURNS = ["Tell me about {}, please.", "And what else?", "Why is that so?", "Go on.",
        "Who told you?", "What happened then?"]


def pids(deployment: str) -> list[int]:
    """The processes of this application's replicas, as Ray names them."""
    title = f"ray::ServeReplica:{NAME}:{deployment}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title):
                found.append(int(path.parent.name))
        except OSError:  # the process has ended meanwhile
            continue
    return sorted(found)


def running() -> int:
    """Replicas that Serve calls running."""
    replicas = serve.status().applications[NAME].deployments["Replica"].replica_states
    return replicas.get("RUNNING", 0)


class Figures:
    def __init__(self):
        self.requests = self.answered = self.given_up = 0
        self.statuses, self.stream_errors = collections.Counter(), collections.Counter()
        self.followed = self.kept = 0  # turns after the first; of these, with all before it kept
        self.seconds = []

    def as_dict(self) -> dict:
        return dict(requests=self.requests, answered=self.answered, given_up=self.given_up,
                    statuses=dict(self.statuses), stream_errors=dict(self.stream_errors),
                    kept=f"{self.kept} of {self.followed}",
                    p50_s=round(sorted(self.seconds)[len(self.seconds) // 2], 3))


class Conversation:
    """One client and its conversation."""

    def __init__(self, url: str, model: str, number: int, max_tokens: int):
        self.figures, self.before = None, 0  # before: tokens of the turns that are answered
        self.client = openai.AsyncOpenAI(
            base_url=url, api_key="none", timeout=120, max_retries=6,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [self.count]}))
        self.options, self.max_tokens = {"model": model, "temperature": 0}, max_tokens
        self.number, self.stream, self.messages = number, number % 2 == 1, []
        self.random = random.Random(number)

    async def count(self, response) -> None:
        self.figures.statuses[response.status_code] += 1

    async def turn(self, figures: Figures) -> None:
        self.figures = figures
        self.options["max_tokens"] = self.random.randint(self.max_tokens // 4, self.max_tokens)
        question = TURNS[len(self.messages) // 2 % len(TURNS)].format(f"cat number {self.number}")
        self.messages.append({"role": "user", "content": question})
        figures.requests += 1
        began = time.perf_counter()
        for _ in range(10):
            try:
                text, usage = await (self.streamed() if self.stream else self.whole())
                break
            except openai.APIStatusError:  # after all its retries
                continue
            except Exception as error:  # within a stream: an error event, or the connection's end
                figures.stream_errors[str(error)] += 1
        else:
            figures.given_up += 1
            self.messages.pop()
            return
        figures.answered += 1
        figures.seconds.append(time.perf_counter() - began)
        if self.before:
            figures.followed += 1
            figures.kept += usage.prompt_tokens_details.cached_tokens >= self.before
        self.before = usage.total_tokens
        self.messages.append({"role": "assistant", "content": text})

    async def whole(self):
        answer = await self.client.chat.completions.create(messages=self.messages, **self.options)
        assert answer.choices[0].finish_reason
        return answer.choices[0].message.content, answer.usage

    async def streamed(self):
        text, usage, finish = "", None, None
        async for chunk in await self.client.chat.completions.create(
                messages=self.messages, stream=True, stream_options={"include_usage": True},
                **self.options):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
        if not (finish and usage):
            raise OSError("the stream ended without its last events")
        return text, usage


async def third(talks: list[Conversation], turns: int, during=None) -> dict:
    """Every conversation goes on for so many turns; `during` is called in the middle."""
    figures = Figures()

    async def one(talk: Conversation) -> None:
        for _ in range(turns):
            await asyncio.sleep(talk.random.uniform(0, 0.5))  # so that rows change clients
            await talk.turn(figures)

    async def interrupt() -> None:
        while figures.requests < len(talks) * turns // 2:
            await asyncio.sleep(0.01)
        during()

    began = time.perf_counter()
    await asyncio.gather(*map(one, talks), *([interrupt()] if during else []))
    return {**figures.as_dict(), "wall_s": round(time.perf_counter() - began, 2)}


async def converse(talks: list[Conversation], turns: int, replicas: int, kill: str) -> dict:
    """Three thirds of so many turns; in the second, a process of each deployment in `kill` is
    killed."""
    before = pids("Replica")
    found = {"replicas": len(before), "before": await third(talks, turns)}
    killed = {}

    def kill_one_each() -> None:
        for deployment in kill.split(","):
            killed[deployment] = pids(deployment)[0]
            os.kill(killed[deployment], signal.SIGKILL)
        killed["at"] = time.perf_counter()

    found["killed"] = await third(talks, turns, kill_one_each)
    while len(set(pids("Replica")) - set(killed.values())) < replicas or running() < replicas:
        await asyncio.sleep(0.1)
        assert time.perf_counter() - killed["at"] < 120, "the replica does not come back"
    found["back_after_s"] = round(time.perf_counter() - killed["at"], 1)
    found["same_replicas"] = len(set(before) & set(pids("Replica")))
    found["after"] = await third(talks, turns)
    return found


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", default=str(ROOT / "checkpoints" / "tiny"), metavar="NAME")
    add("--clients", type=int, default=16, metavar="N")
    add("--turns", type=int, default=3, metavar="N", help="of each third; default 3")
    add("--replicas", type=int, default=2, metavar="N")
    add("--max-new-tokens", type=int, default=40, metavar="N")
    add("--kill", default="Replica", help="Replica, Ingress or Replica,Ingress")
    add("--json", action="store_true")
    args = parser.parse_args()
    ray.init(num_cpus=args.replicas, object_store_memory=100 << 20, include_dashboard=False,
             log_to_driver=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(app({"checkpoint": args.checkpoint, "replicas": args.replicas, "batch": 8,
                       "device": "cpu"}), name=NAME, route_prefix="/")
        model = Path(args.checkpoint).name
        talks = [Conversation(f"http://127.0.0.1:{port}/v1", model, number, args.max_new_tokens)
                 for number in range(args.clients)]
        found = asyncio.run(converse(talks, args.turns, args.replicas, args.kill))
    finally:
        serve.shutdown()
        ray.shutdown()
    if args.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
