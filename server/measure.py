"""How fast a server answers: clients that send one prompt after the other, over real sockets.

    python -m server.measure --prompts mt_bench.jsonl --clients 1,8,32 --stream
    python -m server.measure --prompts mt_bench.jsonl --clients 4 --stream --beside 50000
    python -m server.measure --prompts mt_bench.jsonl --turns 50

Works with any server that speaks OpenAI's chat completions. It has a small HTTP client of its own:
on the server's machine a slow client would take the server's time. Its share of a core is printed.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from urllib.parse import urlsplit

from cli import number, plain_parser, read_prompts
from eval import check_plot
from terminal import user_errors


async def post(url: str, content: dict, key: str = "none"):
    """Yield each line of the response's body as it comes. Raises OSError for a status other than
    200."""
    at = urlsplit(url)
    body = json.dumps(content).encode()
    reader, writer = await asyncio.open_connection(at.hostname, at.port, limit=1 << 20)
    try:
        writer.write(f"POST {at.path} HTTP/1.1\r\nHost: {at.netloc}\r\nConnection: close\r\n"
                     f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if " 200 " not in head.splitlines()[0]:
            raise OSError(f"{url}: {head.splitlines()[0]}: {(await reader.read(500)).decode()}")
        chunked = "transfer-encoding: chunked" in head.lower()
        held = b""
        while True:
            if chunked:
                size = int(await reader.readline(), 16)
                piece = (await reader.readexactly(size + 2))[:size]
            else:
                piece = await reader.read(1 << 16)
            if not piece:
                break
            *lines, held = (held + piece).split(b"\n")
            for line in lines:
                yield line
        if held:
            yield held
    finally:
        writer.close()


async def measure(url: str, content: dict) -> dict:
    """One request: when it began, when each piece of text came, its usage and its text."""
    began, times, usage, texts = time.perf_counter(), [], None, []
    async for line in post(url, content):
        if not content["stream"]:
            usage = json.loads(line)["usage"]
        elif line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            if chunk["choices"] and (text := chunk["choices"][0]["delta"].get("content")):
                times.append(time.perf_counter())
                texts.append(text)
    usage = usage or {"completion_tokens": len(times)}  # of a server that sends no usage
    return dict(began=began, times=times, usage=usage, text="".join(texts))


async def run_clients(url: str, contents: list[dict], n_clients: int,
                      beside: dict | None = None) -> tuple[list[dict], float]:
    """All requests, by so many clients, and the seconds that they took together. Meanwhile another
    client repeats the request `beside`."""
    waiting, done = list(reversed(contents)), []

    async def repeat() -> None:
        n = 0
        while True:  # with other words each time, or the server would have it cached
            first, *others = beside["messages"]
            first = {**first, "content": f"{n} {first['content']}"}
            await measure(url, {**beside, "messages": [first, *others]})
            n += 1

    async def client() -> None:
        while waiting:
            done.append(await measure(url, waiting.pop()))

    other = asyncio.ensure_future(repeat()) if beside else None
    await asyncio.sleep(1 if beside else 0)
    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(n_clients)))
    took = time.perf_counter() - began
    if other:
        other.cancel()
    return done, took


async def converse(url: str, prompts: list[str], content: dict) -> list[dict]:
    """One conversation. At some lengths it is also sent with another first word, so that no server
    has it cached. A record of each of these."""
    messages, records = [], []
    for turn in range(1, len(prompts) + 1):
        messages.append({"role": "user", "content": prompts[turn - 1]})
        answer = await measure(url, {**content, "messages": messages})
        if turn in (2, 5, 10, 20, 30, 40) or turn == len(prompts):
            other = [{**messages[0], "content": "Well: " + messages[0]["content"]}, *messages[1:]]
            unknown = await measure(url, {**content, "messages": other, "max_tokens": 1})
            records.append({"turn": turn, **answer["usage"], "first_kept_s": first_token_s(answer),
                            "first_not_kept_s": first_token_s(unknown)})
            print(json.dumps(records[-1]), flush=True)
        messages.append({"role": "assistant", "content": answer["text"]})
    return records


def plot_first_tokens(path: str, records: list[dict]) -> None:
    """Seconds to the first token by the length of the history, kept and not kept."""
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 4))
    for name, key in (("read anew", "first_not_kept_s"), ("kept", "first_kept_s")):
        axes.plot([r["prompt_tokens"] for r in records], [r[key] for r in records], "o-",
                  label=name)
    axes.set(xlabel="tokens of history", ylabel="seconds to the first token", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")


def first_token_s(one: dict) -> float | None:
    """None for an answer without text."""
    return one["times"][0] - one["began"] if one["times"] else None


def quantile(values: list[float], q: float) -> float | None:
    """The value that a share q of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else None


def figures(done: list[dict], seconds: float) -> dict:
    waits = [first_token_s(one) for one in done if one["times"]]
    following = [b - a for one in done for a, b in zip(one["times"], one["times"][1:])]
    tokens = sum(one["usage"]["completion_tokens"] for one in done)
    return dict(requests=len(done), new_tokens=tokens, tok_s=tokens / seconds,
                first_p50_s=quantile(waits, 0.5), first_p99_s=quantile(waits, 0.99),
                next_p50_s=quantile(following, 0.5), next_p99_s=quantile(following, 0.99),
                next_mean_s=statistics.mean(following) if following else None)


def main():
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000/v1", help="where the server is")
    add("--model", default="smollm2", metavar="NAME", help="as the server calls it")
    add("--prompts", required=True, metavar="FILE",
        help="what to say, a JSON object a line; of several turns, only the first")
    add("--limit", type=number(int, 1), metavar="N",
        help="of --prompts, the first N prompts only; default: all")
    add("--clients", default="1,8,32", metavar="N,N", help="clients at once; a run for each number")
    add("--max-new-tokens", type=number(int, 1), default=128, metavar="N",
        help="an answer's tokens, at most")
    add("--temperature", type=number(float, 0), default=0.0, metavar="T",
        help="below 1, likely tokens get likelier; 0 takes the likeliest")
    add("--stream", action="store_true", help="token by token, and not whole")
    add("--beside", type=number(int, 1), metavar="N",
        help="another client meanwhile has histories of about N tokens read")
    add("--turns", type=number(int, 2), metavar="N", help="instead: one conversation of N turns")
    add("--plot", metavar="FILE.png", help="draw it")
    with user_errors(parser):
        args = parser.parse_args()
        if args.plot:
            if not args.turns:
                raise ValueError("--plot goes with --turns")
            check_plot(args.plot)
        prompts = [entry.get("prompt") or entry["turns"][0]
                   for entry in read_prompts(args.prompts)[:args.limit]]
        content = {"model": args.model, "max_tokens": args.max_new_tokens, "stream": args.stream,
                   "temperature": args.temperature}
        if args.stream or args.turns:
            content.update(stream=True, stream_options={"include_usage": True})
        contents = [{**content, "messages": [{"role": "user", "content": prompt}]}
                    for prompt in prompts]
        beside = args.beside and {**content, "max_tokens": 1, "messages": [
            {"role": "user", "content": "so it goes on and " * (args.beside // 5)}]}
        if args.turns:
            prompts = [prompts[n % len(prompts)] for n in range(args.turns)]
            records = asyncio.run(converse(args.url + "/chat/completions", prompts, content))
            if args.plot:
                plot_first_tokens(args.plot, records)
            return
        for n_clients in map(int, args.clients.split(",")):
            cpu = time.process_time()
            found = figures(*asyncio.run(run_clients(args.url + "/chat/completions", contents,
                                                     n_clients, beside)))
            cpu = time.process_time() - cpu
            seconds = found["new_tokens"] / found["tok_s"]
            print(json.dumps({"clients": n_clients, "stream": args.stream, **found,
                              "client_cpu_share": cpu / seconds}), flush=True)


if __name__ == "__main__":
    main()
