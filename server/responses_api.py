"""OpenAI's /v1/responses: text and calls of functions, whole or streamed, and nothing is stored.

A body becomes one of /v1/chat/completions, which is validated and answered as any other. So a field
that the chat refuses is refused here, by the chat's name for it.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from server.answers import Event, Job
from server.fields import LABELS, asks_for_nothing
from server.protocol import ApiError, Request, read_object
from server.responses import usage

# Fields that mean the same there, and those that have another name there.
SAME = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", "service_tier", *LABELS)
RENAMED = {"max_output_tokens": "max_completion_tokens"}
NEUTRAL = {
    "store": (False,), "background": (False,), "previous_response_id": (), "conversation": (),
    "prompt": (), "truncation": ("auto", "disabled"), "max_tool_calls": (), "top_logprobs": (0,),
    "context_management": (), "include": ([], ["reasoning.encrypted_content"])}


# ------------------------------------------------------------------------------ requests


def chat_body(body: bytes) -> bytes:
    """The body of the chat that a body of /v1/responses asks for. Raises ApiError."""
    fields = {name: value for name, value in read_object(body).items() if value is not None}
    chat: dict[str, Any] = {"messages": messages_of(fields)}
    options = fields.pop("stream_options", {})
    if not (isinstance(options, dict) and options.keys() <= {"include_obfuscation"}):
        raise refusal("stream_options")
    for name, value in fields.items():
        if name in SAME:
            chat[name] = value
        elif name in RENAMED:
            chat[RENAMED[name]] = value
        elif name in NEUTRAL:
            if not asks_for_nothing(value, NEUTRAL[name]):
                raise refusal(name, " It stores nothing: send the whole conversation as input."
                              if name in ("store", "previous_response_id", "conversation") else "")
        elif name == "tools":
            chat["tools"] = [tool_of(tool, at) for at, tool in enumerate(as_objects(value, name))]
        elif name == "tool_choice":
            named = isinstance(value, dict) and value.get("type") == "function"
            chat[name] = {"type": "function", "function": {"name": value.get("name")}} if (
                named) else value
        elif name == "text":
            chat |= format_of(value)
        elif name == "reasoning":
            chat["reasoning_effort"] = as_object(value, name).get("effort")
        elif name not in ("input", "instructions"):
            raise ApiError(400, f"Unrecognized field: {name[:100]!r}.", name[:100],
                           "unknown_parameter")
    if not chat.get("tools"):
        chat = {name: value for name, value in chat.items() if name != "parallel_tool_calls"}
    return json.dumps(chat).encode()


def refusal(name: str, why: str = "") -> ApiError:
    return ApiError(400, f"{name} is not supported by this server.{why}", name,
                    "unsupported_parameter")


def as_object(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        raise ApiError(400, f"Invalid {where!r}: it must be an object.", where, "invalid_value")
    return value


def as_objects(value: Any, where: str) -> list[dict]:
    if not isinstance(value, list):
        raise ApiError(400, f"Invalid {where!r}: it must be a list.", where, "invalid_value")
    return [as_object(one, f"{where}.{at}") for at, one in enumerate(value)]


def tool_of(tool: dict, at: int) -> dict:
    """A tool in the chat's form, which has the function in an object of its own."""
    if tool.get("type") != "function":
        raise ApiError(400, f"tools.{at}.type: only functions are supported.", f"tools.{at}.type",
                       "unsupported_parameter")
    return {"type": "function", "function": {
        name: value for name, value in tool.items() if name != "type" and value is not None}}


def format_of(text: Any) -> dict:
    """The chat's response_format and verbosity, of `text`."""
    text, found = as_object(text, "text"), {}
    if text.get("verbosity") is not None:
        found["verbosity"] = text["verbosity"]
    if text.get("format") is not None:
        given = as_object(text["format"], "text.format")
        schema = {name: value for name, value in given.items() if name != "type"}
        found["response_format"] = {"type": given.get("type"),
                                    **({"json_schema": schema} if schema else {})}
    return found


def messages_of(fields: dict) -> list[dict]:
    """The chat's messages, of `instructions` and `input`. Raises ApiError."""
    given, messages = fields.get("input"), []
    if fields.get("instructions") is not None:
        messages.append({"role": "system", "content": fields["instructions"]})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for at, item in enumerate(as_objects(given, "input")):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            call = {"id": item.get("call_id"), "type": "function", "function": {
                "name": item.get("name"), "arguments": item.get("arguments")}}
            if not (messages and messages[-1]["role"] == "assistant"):
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"),
                             "content": item.get("output")})
        elif kind != "reasoning":  # which this server never sends, and a model does not read
            raise ApiError(400, f"input.{at}.type: {str(kind)[:40]!r} is not supported; a message, "
                                "a function_call or a function_call_output is.", f"input.{at}.type",
                           "unsupported_parameter")
    return messages


# ------------------------------------------------------------------------------ responses


class ItemWriter:
    """Writes one response from the events of its one answer: a message with text, and calls, in the
    order in which they come. It has the methods of responses.ResponseWriter."""

    def __init__(self, request: Request, model: str, body: bytes):
        asked = read_object(body)
        self.items: list[dict] = []
        self.n_sent, self.finish, self.begun = 0, "stop", False
        self.head = {
            "id": f"resp_{secrets.token_hex(16)}", "object": "response",
            "created_at": int(time.time()), "model": model, "status": "in_progress",
            "error": None, "incomplete_details": None, "output": [], "usage": None,
            "instructions": asked.get("instructions"), "metadata": asked.get("metadata") or {},
            "max_output_tokens": request.max_new_tokens, "previous_response_id": None,
            "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
            "temperature": request.sampling.temperature, "top_p": request.sampling.top_p,
            "tools": asked.get("tools") or [], "tool_choice": asked.get("tool_choice") or "auto",
            "text": asked.get("text") or {"format": {"type": "text"}}, "truncation": "disabled",
            "reasoning": {"effort": None, "summary": None}, "store": False, "background": False}

    def add(self, events: list[Event]) -> None:
        self.take(events)

    def completion(self, jobs: list[Job]) -> dict:
        self.close()
        cut = self.finish == "length"
        why = {"reason": "max_output_tokens"} if cut else None
        return {**self.head, "status": "incomplete" if cut else "completed", "output": self.items,
                "incomplete_details": why, "usage": usage_of(jobs)}

    def chunks(self, events: list[Event], jobs: list[Job]) -> bytes:
        return self.begin() + self.take(events)

    def last_chunks(self, jobs: list[Job]) -> bytes:
        last = self.begin() + self.close()
        response = self.completion(jobs)
        return last + self.event(f"response.{response['status']}", response=response)

    def error_chunk(self, error: ApiError) -> bytes:
        said = error.body["error"]
        failed = {**self.head, "status": "failed", "error": {
            "code": said["code"] or "server_error", "message": said["message"]}}
        return self.event("response.failed", response=failed)

    def event(self, kind: str, **fields) -> bytes:
        """A server-sent event, which has its kind and its number."""
        content = {"type": kind, "sequence_number": self.n_sent, **fields}
        self.n_sent += 1
        return f"event: {kind}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n".encode()

    def begin(self) -> bytes:
        if self.begun:
            return b""
        self.begun = True
        return (self.event("response.created", response=self.head)
                + self.event("response.in_progress", response=self.head))

    def take(self, events: list[Event]) -> bytes:
        """Add to the items. Returns what a stream says of it."""
        parts = []
        for event in events:
            if event.text:
                parts.append(self.add_text(event.text))
            parts += [self.add_call(delta) for delta in event.calls]
            if event.finish:
                self.finish = event.finish
        return b"".join(parts)

    def of_open_item(self) -> dict:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def is_open(self, kind: str) -> bool:
        return bool(self.items) and self.items[-1]["type"] == kind and (
            self.items[-1]["status"] == "in_progress")

    def add_text(self, text: str) -> bytes:
        said = b""
        if not self.is_open("message"):
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            said = self.open({"id": f"msg_{secrets.token_hex(12)}", "type": "message",
                              "role": "assistant", "content": []})
            said += self.event("response.content_part.added", **self.of_open_item(),
                               content_index=0, part=part)
            self.items[-1]["content"] = [dict(part)]
        self.items[-1]["content"][0]["text"] += text
        return said + self.event("response.output_text.delta", **self.of_open_item(),
                                 content_index=0, delta=text, logprobs=[])

    def add_call(self, delta: dict) -> bytes:
        """Take what the chat's stream says of a call; its first piece has the call's id."""
        said, arguments = b"", delta["function"].get("arguments", "")
        if "id" in delta:
            said = self.open({"id": f"fc_{secrets.token_hex(12)}", "type": "function_call",
                              "call_id": delta["id"], "name": delta["function"]["name"],
                              "arguments": ""})
        self.items[-1]["arguments"] += arguments
        if not arguments:
            return said
        return said + self.event("response.function_call_arguments.delta", **self.of_open_item(),
                                 delta=arguments)

    def open(self, item: dict) -> bytes:
        """Begin an item, after the one before it is closed."""
        said = self.close()
        self.items.append({**item, "status": "in_progress"})
        return said + self.event("response.output_item.added", output_index=len(self.items) - 1,
                                 item=self.items[-1])

    def close(self) -> bytes:
        """End the item that is open, if one is."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return b""
        item, at = self.items[-1], self.of_open_item()
        item["status"] = "incomplete" if self.finish == "length" else "completed"
        if item["type"] == "function_call":
            said = self.event("response.function_call_arguments.done", **at, name=item["name"],
                              arguments=item["arguments"])
        else:
            [part] = item["content"]
            said = self.event("response.output_text.done", **at, content_index=0,
                              text=part["text"], logprobs=[])
            said += self.event("response.content_part.done", **at, content_index=0, part=part)
        return said + self.event("response.output_item.done", output_index=at["output_index"],
                                 item=item)


def usage_of(jobs: list[Job]) -> dict:
    counts = usage(jobs)
    return {"input_tokens": counts["prompt_tokens"], "output_tokens": counts["completion_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"]}
