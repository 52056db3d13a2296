"""Random clients that join, go on, cancel, stall and send invalid fields, for a given time.

    python -m server.soak --url http://127.0.0.1:8000/v1 --model smollm2 --seconds 600

Every response must be a completion, or OpenAI's error object with a status below 500 (429 when the
queue is full). At the end no row may be busy. With --pid it reads the server's memory, on Linux.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import time
from pathlib import Path
from urllib.parse import urlsplit

from cli import number, plain_parser
from server.measure import post
from terminal import user_errors

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "said", "<|im_end|>", "\u00e9t\u00e9",
         "\u65e5\u672c", "\U0001f642", "</s>"]


async def client(url: str, model: str, numbers: random.Random, until: float,
                 count: collections.Counter) -> None:
    """Conversations of a few turns, one after the other."""
    while time.time() < until:
        messages = []
        for _ in range(numbers.randrange(1, 6)):
            if time.time() >= until:
                return
            text = " ".join(numbers.choices(WORDS, k=numbers.choice([1, 5, 20, 400])))
            messages.append({"role": "user", "content": text})
            content = {"model": model, "messages": messages, "stream": numbers.random() < 0.7,
                       "max_tokens": numbers.randrange(1, 60), "temperature": numbers.random(),
                       "top_p": numbers.choice([1, 0.9]), "n": numbers.choice([1, 1, 1, 3])}
            if numbers.random() < 0.2:
                content["stop"] = [" the", "\n"]
            if numbers.random() < 0.15:
                name = numbers.choice([*content, "x"])
                content[name] = numbers.choice([None, -1, "x", [], {}, 1e9, [[]]])
            answer = await one_request(url, content, numbers, count)
            if answer is None:
                break
            messages.append({"role": "assistant", "content": answer})


async def one_request(url: str, content: dict, numbers: random.Random,
                      count: collections.Counter) -> str | None:
    """One request. Returns the answer, or the part that came before the client cancelled; None for
    an error."""
    leaves_after = numbers.choice([None, None, None, 0, 1, 5, 20])
    texts, lines = [], post(url + "/chat/completions", content)
    try:
        async for line in lines:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                texts += [c["delta"].get("content") or "" for c in chunk["choices"]
                          if c["index"] == 0]
            elif line.startswith(b"{"):
                texts.append(json.loads(line)["choices"][0]["message"]["content"])
            if numbers.random() < 0.001:
                await asyncio.sleep(2)  # a client that stalls
            if leaves_after is not None and len(texts) > leaves_after:
                count["left"] += 1
                return "".join(texts)
        count["answered"] += 1
        return "".join(texts)
    except OSError as error:
        status = str(error).partition("HTTP/1.1 ")[2][:3]
        count[status or "lost"] += 1
        assert "error" in str(error), error
        await asyncio.sleep(numbers.random() if status == "429" else 0)
        return None
    finally:
        await lines.aclose()


def memory(pid: int | None) -> float | None:
    """A process's resident memory, in megabytes."""
    if pid is None:
        return None
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def soak(url: str, model: str, n_clients: int, seconds: float, pid: int | None) -> int:
    """The exit status: 1 if any request failed, or a row is busy at the end."""
    count, until = collections.Counter(), time.time() + seconds
    clients = [asyncio.ensure_future(client(url, model, random.Random(n), until, count))
               for n in range(n_clients)]
    while time.time() < until:
        await asyncio.sleep(min(30, max(0.1, until - time.time())))
        print(json.dumps({"left_s": round(until - time.time()), **count,
                          "memory_mb": memory(pid)}), flush=True)
    await asyncio.gather(*clients)
    await asyncio.sleep(1)
    at = urlsplit(url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    writer.write(f"GET /metrics HTTP/1.1\r\nHost: {at.netloc}\r\n"
                 "Connection: close\r\n\r\n".encode())
    figures = (await reader.read()).decode()
    busy = [line for line in figures.splitlines() if line.startswith((
        "gpt_stream_rows_busy ", "gpt_stream_queue "))]
    print(json.dumps({"end": busy, **count, "memory_mb": memory(pid)}), flush=True)
    bad = any(name.startswith("5") or name == "lost" for name in count)
    return int(bad or not all(line.endswith(" 0.0") for line in busy))


def main():
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000/v1", help="where the server is")
    add("--model", default="smollm2", metavar="NAME", help="as the server calls it")
    add("--clients", type=number(int, 1), default=24, metavar="N", help="clients at once")
    add("--seconds", type=number(float, 0), default=600, metavar="SECONDS", help="how long")
    add("--pid", type=number(int, 1), metavar="N", help="the server's, to read its memory")
    with user_errors(parser):
        args = parser.parse_args()
        raise SystemExit(asyncio.run(soak(args.url, args.model, args.clients, args.seconds,
                                          args.pid)))


if __name__ == "__main__":
    main()
