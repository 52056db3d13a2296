"""Calls of functions in a model's answers: how checkpoints write them, and reading them back.

A chat template shows a model its tools and the calls of earlier turns, in the form that the model
was trained on. `find_ability` recognises that form in what the template renders, and `Reader` takes
an answer apart as it comes.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass, replace

from formats.chat_template import PROBE_TOOLS, ChatTemplate, probe_turns
from tokenizer import Tokenizer

ID_LENGTH = 9  # Mistral's templates refuse any other
PYTHON_TAG = "<|python_tag|>"  # Llama 3 may begin a call with it
ARGUMENTS_MARK, ID_MARK = "[ARGS]", "[CALL_ID]"  # Mistral's, between a name and what it belongs to

# ------------------------------------------------------------------------------ a template's form


@dataclass(frozen=True)
class Form:
    """How a checkpoint writes calls. Each has `opener`, then, unless it is by_name, a JSON object
    {"name": ..., key: arguments}, and then `closer`."""

    opener: str = ""  # none: an answer that begins with the object is a call
    closer: str = ""
    key: str = "arguments"
    in_list: bool = False  # after one opener a list of objects follows
    by_name: bool = False  # a call is: opener, name, [ARGS], arguments
    parallel: bool = True  # the template can write an answer with several calls

    @property
    def marks(self) -> list[str]:
        """What the model may say as special tokens, which answers do not show otherwise."""
        more = [ARGUMENTS_MARK, ID_MARK] if self.by_name else [] if self.opener else [PYTHON_TAG]
        return [mark for mark in (self.opener, self.closer, *more) if mark]

    def before_arguments(self, name: str) -> str:
        """How a call's object begins, as the templates write it."""
        return f'{{"name": "{name}", "{self.key}": '

    @functools.cached_property
    def lead(self) -> str:
        """A pattern of what stands before a call's object."""
        if self.by_name:
            return (rf"\s*{re.escape(self.opener)}\s*(?P<name>[\w.:/-]+)\s*"
                    rf"(?:{re.escape(ID_MARK)}\s*(?P<id>\w+)\s*)?(?:{re.escape(ARGUMENTS_MARK)}\s*)?")
        if self.in_list:  # or behind another object
            return rf"(?:\s*{re.escape(self.opener)}\s*\[|,)\s*"
        return rf"\s*{re.escape(self.opener)}\s*" if self.opener else (
            rf"\s*(?:{re.escape(PYTHON_TAG)})?[\s;]*")

    @functools.cached_property
    def head(self) -> re.Pattern:
        """Matches a call up to its object."""
        return re.compile(rf"{self.lead}(?=\{{)")

    @functools.cached_property
    def whole_head(self) -> re.Pattern:
        """Matches a call that says the function's name first, up to its arguments."""
        name = "" if self.by_name else (
            r'\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
        return re.compile(rf"{self.lead}{name}(?=\{{)")

    @functools.cached_property
    def no_head(self) -> re.Pattern:
        """Matches what begins as a call does, and cannot become one."""
        opener = rf"\s*{re.escape(self.opener)}"
        if self.by_name:
            return re.compile(rf"{opener}\s*[\w.:/-]*\s*[^\w.:/\s\[{{-]")
        if self.in_list:
            return re.compile(rf"{opener}\s*(?:[^\s\[]|\[\s*[^\s{{])|,\s*[^\s{{]")
        if self.opener:
            return re.compile(rf"{self.lead}[^\s{{]")
        return re.compile(rf"{self.lead}[^\s;<{{]|\s*<(?!\|)")


# What a template writes where an answer begins, and the form that it shows.
FORMS = (
    (r"\[TOOL_CALLS\]probe_a(\[CALL_ID\]\w*)?\[ARGS\]", Form("[TOOL_CALLS]", by_name=True)),
    (r"\[TOOL_CALLS\]\s*\[\s*\{", Form("[TOOL_CALLS]", in_list=True)),
    (r'<tool_call>\s*\{\s*"name"', Form("<tool_call>", "</tool_call>")),
    (r'\{\s*"name": "probe_a",\s*"parameters"', Form(key="parameters")),
    (r'\{\s*"name": "probe_a",\s*"arguments"', Form()))


@dataclass(frozen=True)
class Ability:
    """What a checkpoint's template can say of tools."""

    shows_tools: bool
    form: Form | None  # in which the model calls; None where it is not known here
    # Whether it writes calls of earlier turns and their results: without tools, and with them.
    writes_calls: tuple[bool, bool]


def find_ability(template: ChatTemplate) -> Ability:
    """What a template can say of tools, seen by rendering conversations."""
    def text_of(tools: list | None, n_calls: int = 0) -> str:
        try:
            return template.render(probe_turns(n_calls), not n_calls, {"tools": tools})
        except ValueError:
            return ""

    question, texts = text_of(PROBE_TOOLS), [text_of(None, 1), text_of(PROBE_TOOLS, 1)]
    parallel = any("said_b" in text_of(tools, 2) for tools in (None, PROBE_TOOLS))
    # Some templates do not write calls, but tell the model how to.
    form = form_in(texts[1].removeprefix(question) if "said_a" in texts[1] else question)
    return Ability("probe_a" in question, form and replace(form, parallel=parallel), tuple(
        "said_a" in text and "probe_result" in text for text in texts))


def form_of_calls(ability: Ability, asking: str) -> Form:
    """The form in which a model calls. Raises ValueError, beginning with what asks for it, where
    its template has none."""
    if not ability.shows_tools:
        raise ValueError(f"{asking}: this model's chat template has no tools")
    if not ability.form:
        raise ValueError(f"{asking}: this model's chat template writes calls in a form that cannot "
                         "be read here")
    return ability.form


def form_in(text: str) -> Form | None:
    """The form of the calls in a text; one without an opener only where the text begins with it."""
    begins = rf"\s*(?:{re.escape(PYTHON_TAG)})?\s*"
    for pattern, form in FORMS:
        if re.search(pattern, text) if form.opener else re.match(begins + pattern, text):
            return form
    return None


def hidden_marks(form: Form, tokenizer: Tokenizer) -> dict[int, str]:
    """The marks of calls that are special tokens, by id. Answers do not show them otherwise."""
    ids = {tokenizer.named_ids.get(mark): mark for mark in form.marks}
    return {token_id: mark for token_id, mark in ids.items() if token_id in tokenizer.hidden_ids}


# ------------------------------------------------------------------------------ reading answers


class ObjectEnd:
    """Finds the end of a JSON object, whose text comes in pieces."""

    def __init__(self):
        self.depth, self.in_string, self.escaped = 0, False, False

    def find(self, text: str) -> int | None:
        """How many characters of the next piece are in the object; None where it goes on."""
        for at, character in enumerate(text):
            if self.escaped:
                self.escaped = False
            elif self.in_string:
                self.escaped, self.in_string = character == "\\", character != '"'
            elif character == '"':
                self.in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    return at + 1
        return None


class Reader:
    """Takes one answer apart, as it comes: its content, and its calls in OpenAI's form.

    A call that a grammar holds is `sure`, and told while it is written: its name, then its
    arguments in pieces. Any other is held back until it is whole. What then is no JSON, or calls a
    function that there is not, is content, as it was written."""

    def __init__(self, form: Form, names: Collection[str], sure: bool = False,
                 parallel: bool = True):
        self.content, self.calls = "", []
        self.done = False  # the answer may hold one call only, and has it
        self.overran = False  # the text went on behind that call
        self.form, self.names, self.sure = form, names, sure
        self.parallel = parallel and form.parallel
        self._held = ""  # text that is not told yet; a call that is read begins it
        self._read = self._read_text  # reads a step further in it, False where that takes more text
        self._object = ObjectEnd()  # of what is read of a call
        self._scanned = 0  # characters of _held that _object has seen
        self._marks: list[str] = []  # that may follow a call
        self._told: tuple[list[str], list[dict]] = [], []

    def add(self, text: str) -> tuple[str, list[dict]]:
        """Take the next piece. Returns what it adds to the content, and to the calls, as OpenAI
        streams them."""
        self._held += text
        while not self.done and self._read():
            pass
        return self._take_told()

    def end(self, cut: bool = False) -> tuple[str, list[dict]]:
        """The answer ended, or was cut. Returns what was held back. A call that was cut is told as
        far as it came."""
        if cut and self._read == self._read_call:
            head = self.form.whole_head.match(self._held)
            if head and head["name"] in self.names:
                self._begin_call(head["name"], head.groupdict().get("id"))
                self._add_arguments(self._held[head.end():])
                self._held = ""
        if self._ends_as_content():
            self._say(self._held)
        self.overran = self.done and bool(self._held.strip())
        self._held = ""
        return self._take_told()

    def message(self) -> dict:
        """The answer as a message of a conversation."""
        return {"role": "assistant", "content": self.content,
                **({"tool_calls": self.calls} if self.calls else {})}

    # -------------------------------------------------------------------------- steps

    def _read_text(self) -> bool:
        if not self.form.opener:
            return self._read_start()
        before, found, _ = self._held.partition(self.form.opener)
        if found:
            self._say(shown := before.rstrip())  # white space before a call belongs to neither
            self._held = self._held[len(shown):]
            return self._go_on(self._read_call)
        kept = max(n for n in range(len(self.form.opener))
                   if before.endswith(self.form.opener[:n]))
        shown = before[:len(before) - kept].rstrip()
        self._say(shown)
        self._held = before[len(shown):]
        return False

    def _read_start(self) -> bool:
        """Without an opener, a call begins the answer or follows another one."""
        start = self._held.lstrip(" \n;" if self.calls else None)
        beginnings = "{", PYTHON_TAG
        if not self.content and start.startswith(beginnings):
            return self._go_on(self._read_call)
        if self.content or not any(mark.startswith(start) for mark in beginnings):
            self._say(self._held)
            self._held = ""
        return False

    def _read_call(self) -> bool:
        head = (self.form.whole_head if self.sure else self.form.head).match(self._held)
        if not head:
            return self._cannot_be() and self._give_back(self._before_object())
        if self.sure:
            self._begin_call(head["name"], head.groupdict().get("id"))
            self._held = self._held[head.end():]
            return self._go_on(self._read_arguments)
        unseen = max(head.end(), self._scanned)
        end = self._object.find(self._held[unseen:])
        self._scanned = len(self._held)
        if end is None:
            return False
        name, arguments = read_object(head, self._held[head.end():unseen + end])
        if name not in self.names or not isinstance(arguments, dict):
            return self._give_back(unseen + end)
        self._begin_call(name, head.groupdict().get("id"))
        self._add_arguments(json.dumps(arguments, ensure_ascii=False))
        return self._end_call(unseen + end, [])

    def _before_object(self) -> int:
        """How many characters held are the opener, and white space before it; 1 without one."""
        if not self.form.opener or self._held.startswith(","):
            return 1
        return self._held.index(self.form.opener) + len(self.form.opener)

    def _ends_as_content(self) -> bool:
        """Whether what is held at the end is content: no part of a call, nor white space behind."""
        if self._read == self._read_call:  # with an opener, a sure one begins a call in any case
            return not (self.sure and self.form.opener)
        return self._read == self._read_text and not self.done and not (
            self.calls and self._held.isspace())

    def _cannot_be(self) -> bool:
        """Whether what is held is no call, whatever follows."""
        if self.sure and not self.form.opener:  # it may be an answer in JSON
            name_first = '{"name":"'
            begun = re.sub(r"\s", "", re.sub(self.form.lead, "", self._held[:99], count=1))
            return not (begun.startswith(name_first) or name_first.startswith(begun))
        return bool(self.form.no_head.match(self._held))

    def _read_arguments(self) -> bool:
        """The arguments of a sure call."""
        end = self._object.find(self._held)
        self._add_arguments(self._held[:end])
        if end is None:
            self._held = ""
            return False
        return self._end_call(end, [] if self.form.by_name else ["}"])

    def _read_after(self) -> bool:
        """What may follow a call: the marks of its end, and in a list another call."""
        self._held = self._held.lstrip()
        while self._marks:
            mark = self._marks[0]
            if mark.startswith(self._held) and self._held != mark:
                return False
            self._held = self._held.removeprefix(mark).lstrip()
            del self._marks[0]
        if self.form.in_list and not self._held:
            return False
        self.done = not (self.parallel or self.sure)  # a grammar ends the answer itself
        if self.form.in_list and self._held.startswith(","):
            return self._go_on(self._read_call)
        if self.form.in_list:
            self._held = self._held.removeprefix("]")
        return self._go_on(self._read_text)

    # -------------------------------------------------------------------------- what is told

    def _go_on(self, read) -> bool:
        self._read, self._object, self._scanned = read, ObjectEnd(), 0
        return True

    def _give_back(self, n: int) -> bool:
        """The first n characters held are no call."""
        self._say(self._held[:n])
        self._held = self._held[n:]
        return self._go_on(self._read_text)

    def _end_call(self, n: int, marks: list[str]) -> bool:
        """The call is in the first n characters held; marks come before the form's closer."""
        self._held = self._held[n:]
        self._marks = [*marks, *filter(None, [self.form.closer])]
        return self._go_on(self._read_after)

    def _say(self, text: str) -> None:
        self.content += text
        self._told[0].append(text)

    def _begin_call(self, name: str, call_id: str | None) -> None:
        call = {"id": call_id or new_call_id(), "type": "function",
                "function": {"name": name, "arguments": ""}}
        self.calls.append(call)
        self._told[1].append({"index": len(self.calls) - 1, **call,
                              "function": {**call["function"]}})

    def _add_arguments(self, text: str) -> None:
        if text:
            self.calls[-1]["function"]["arguments"] += text
            self._told[1].append({"index": len(self.calls) - 1, "function": {"arguments": text}})

    def _take_told(self) -> tuple[str, list[dict]]:
        (texts, calls), self._told = self._told, ([], [])
        return "".join(texts), calls


def read_object(head: re.Match, text: str) -> tuple[str | None, dict | None]:
    """A call's name and arguments, of its object; None for what is not there."""
    value = strict_json(text)
    if "name" in head.groupdict():
        return head["name"], value
    if not isinstance(value, dict):
        return None, None
    if isinstance(value.get("function"), dict):  # as some models nest it
        value = value["function"]
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    return (name, arguments) if isinstance(name, str) else (None, None)


def strict_json(text: str):
    """A value in JSON, of which Python's NaN and Infinity are no part; None where it is none."""
    def refuse(name: str):
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def new_call_id() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(ID_LENGTH))
