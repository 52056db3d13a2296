"""Metrics for Prometheus: counts and times, never a word of a prompt or an answer."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.answers import Event, Job
from server.engine import Engine

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds
NEXT = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.requests = Counter("gpt_stream_requests", "answered requests",
                                ["path", "status"], registry=self.registry)
        self.tokens = Counter("gpt_stream_tokens", "tokens: read from prompts, found in kept "
                              "conversations instead, generated", ["kind"], registry=self.registry)
        self.first = Histogram("gpt_stream_first_token_seconds", "from request to first token",
                               buckets=FIRST, registry=self.registry)
        self.next = Histogram("gpt_stream_next_token_seconds", "from a token to the next",
                              buckets=NEXT, registry=self.registry)
        for name, about, value in (
                ("rows_busy", "answers in progress", engine.n_busy_rows),
                ("rows", "answers that can be in progress", lambda: len(engine.batch.rows)),
                ("queue", "requests that wait", engine.n_waiting),
                ("kept_conversations", "caches kept", lambda: len(engine.prefix_cache.entries)),
                ("kept_bytes", "memory that they take", lambda: engine.prefix_cache.nbytes)):
            Gauge(f"gpt_stream_{name}", about, registry=self.registry).set_function(value)

    def count(self, path: str, status: int) -> None:
        self.requests.labels(path, str(status)).inc()

    async def watch(self, events: AsyncIterator[list[Event]],
                    jobs: list[Job]) -> AsyncIterator[list[Event]]:
        """Pass a request's events on and observe their times; at the end, count its tokens."""
        last: dict[int, float] = {}
        began = time.perf_counter()
        try:
            async for step in events:
                now = time.perf_counter()
                for event in step:
                    if event.finish or event.echo:  # no token: the end comes with the last one
                        continue
                    (self.next if event.choice in last else self.first).observe(
                        now - last.get(event.choice, began))
                    last[event.choice] = now
                yield step
        finally:
            for kind, count in (
                    ("read", sum(job.prompt_tokens - job.cached_tokens for job in jobs)),
                    ("kept", sum(job.cached_tokens for job in jobs)),
                    ("generated", sum(job.new_tokens for job in jobs))):
                self.tokens.labels(kind).inc(count)

    def text(self) -> bytes:
        return generate_latest(self.registry)
