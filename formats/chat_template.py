"""A checkpoint's chat template, and the text of a conversation's turns.

Everything here is text; tokenizer.py encodes it. The template runs in jinja2's sandbox, with the
context that transformers gives it.

A conversation is rendered piece by piece, as it goes on: `conversation` renders its beginning, and
`next_turn` renders only what the template puts between one answer and the next. The cache holds the
tokens of everything before. A message can't contain special tokens: where a user types the name of
one, the name is escaped here, and its characters are encoded as ordinary text.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Vicuna's prompt format. A checkpoint without a template gets this one.
VICUNA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }} "
    "{% elif m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}")
# These mark a message's place in rendered text. Nobody types their private-use characters.
USER_MARK, ANSWER_MARK = "\ue000user\ue001", "\ue000answer\ue001"
# A name is escaped by this character after its first one. Where a message contains the character
# itself, it is doubled.
ESCAPE = "\ue002"
# A conversation with two tools, which shows how a template writes them and calls of them.
PROBE_TOOLS = [{"type": "function", "function": {
    "name": f"probe_{letter}", "description": "d", "parameters": {
        "type": "object", "properties": {"x": {"type": "string", "description": "d"}}}}}
    for letter in "ab"]
# What the engine itself gives a template. Template arguments can't replace these.
ENGINE_ARGS = ("messages", "add_generation_prompt")


@dataclass
class ChatTemplate:
    """A checkpoint's chat templates, and the names that no message may turn into tokens.

    A message is {"role": ..., "content": text}. The methods return rendered text in which the
    special tokens' names are escaped wherever they come from a message. It is for
    Tokenizer.encode_rendered. `args` is what else a template is given, by name, such as
    {"enable_thinking": False}. The methods raise ValueError for what the template refuses."""

    sources: dict[str, str]  # by name: "default", and maybe "tool_use" for calls with tools
    special_names: set[str]
    added_words: set[str]  # added to the vocabulary as words, such as <think>; they aren't special
    special_tokens: dict[str, str]  # by their names in a template, such as bos_token

    # -------------------------------------------------------------------------- turns

    def system_turn(self, system: str, args: dict | None = None) -> tuple[str, str]:
        """What opens a conversation, and what the template puts between that and the user's text.
        """
        turns = [{"role": "system", "content": system}]
        escaped = self._escape(system, self._reserved_pattern).strip()  # many templates strip it
        with_user = self.render([*turns, {"role": "user", "content": USER_MARK}], args=args)
        opening, mark, _ = with_user.partition(USER_MARK)
        if not mark or escaped not in opening:
            raise ValueError("the chat template does not render a system turn")
        try:
            alone = self.render(turns, False, args)
        except ValueError:
            # Some templates refuse a conversation without a user's turn. The header of the user's
            # turn then belongs to the opening.
            return opening, ""
        if escaped in alone and opening.startswith(alone):
            return alone, opening.removeprefix(alone)
        return opening, ""

    def conversation(self, messages: list[dict], args: dict | None = None,
                     ends_with: str = "answer") -> tuple[str, str]:
        """The beginning of a conversation, up to where an answer begins: (opening, rest). With
        ends_with "turn" it ends after the last message, with "message" within it, where its text
        goes on.

        The opening is the first that system_turn returns. It is "" without a system turn, and where
        the template renders the system turn otherwise in this conversation."""
        text, opening = self._ending(messages, args, ends_with), ""
        if messages[0]["role"] == "system" and messages[0]["content"].strip():
            opening, _ = self.system_turn(messages[0]["content"], args)
        if not text.startswith(opening):
            opening = ""
        return opening, text.removeprefix(opening)

    def _ending(self, messages: list[dict], args: dict | None, ends_with: str) -> str:
        if ends_with != "message":
            return self.render(messages, ends_with == "answer", args)
        last = {**messages[-1], "content": messages[-1]["content"] + ANSWER_MARK}
        text, mark, _ = self.render([*messages[:-1], last], False, args).partition(ANSWER_MARK)
        if not mark:
            raise ValueError("the chat template does not render the last message")
        return text

    def next_turn(self, user: str, args: dict | None = None) -> str:
        """What stands between the end of an answer and the beginning of the next one."""
        return self.turns_after([{"role": "user", "content": USER_MARK},
                                 {"role": "assistant", "content": ANSWER_MARK},
                                 {"role": "user", "content": user}], 1, args)

    def turns_after(self, messages: list[dict], answer: int, args: dict | None = None) -> str:
        """What follows the answer messages[answer], up to where the next one begins."""
        messages = [*messages]
        messages[answer] = {"role": "assistant", "content": ANSWER_MARK}
        _, mark, rest = self.render(messages, args=args).partition(ANSWER_MARK)
        if not mark or ANSWER_MARK in rest:
            raise ValueError("the chat template does not render the assistant's turns")
        return rest

    # -------------------------------------------------------------------------- rendering

    def render(self, messages: list[dict], add_generation_prompt: bool = True,
               args: dict | None = None) -> str:
        """The template's text for these messages. All that they and the arguments say is escaped
        first, but for the roles."""
        escaped = []
        for turn in messages:
            names = self._answers_pattern if turn["role"] == "assistant" else self._reserved_pattern
            escaped.append({"role": turn["role"], **{
                key: self._escape(turn[key], names) for key in turn if key != "role"}})
        try:
            check_args(args or {})
            args = self._escape(args, self._reserved_pattern)
        except RecursionError:
            raise ValueError("the chat template's arguments are nested too deeply") from None
        return self._run(escaped, add_generation_prompt, args or {})

    def _run(self, messages: list[dict], add_generation_prompt: bool, args: dict) -> str:
        """The text for messages and arguments that are escaped already."""
        tools = args.get("tools")
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        context = {"tools": None, "documents": None, **self.special_tokens, **args}
        try:
            return compile_template(self.sources[name]).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **context)
        except Exception as error:  # a template is a program, which can raise anything
            raise ValueError(f"the chat template cannot render this: {error}") from None

    # -------------------------------------------------------------------------- marks

    @functools.cached_property
    def reserved(self) -> set[str]:
        """Names that are escaped in messages: the special tokens', and those of added words that
        the template marks turns, tools, calls and results with.

        Other added words may stand in a message. <think>, for one, is part of an answer, and
        clients send answers back as messages. Whitespace (an added word in Gemma's vocabulary) is
        in every message and marks no turn. A name of one character can't be cut."""
        names = self.special_names | self._turn_marks | self._tool_marks
        return {name for name in names if len(name) > 1}

    @functools.cached_property
    def _turn_marks(self) -> set[str]:
        roles = ("system", "user", "assistant", "user")
        turns = [{"role": role, "content": "a"} for role in roles]
        return self._names_in((turns, {}), (turns[1:], {}))  # some refuse a system turn

    @functools.cached_property
    def _tool_marks(self) -> set[str]:
        """What the template writes around tools, calls and results only, such as <tool_call>. An
        answer may hold added words of these: the model says them."""
        calls = probe_turns(1)
        return self._names_in((calls, {}), (calls, {"tools": PROBE_TOOLS})) - self._turn_marks

    def _names_in(self, *conversations: tuple[list[dict], dict]) -> set[str]:
        """The names that the template itself writes in these conversations, each with its
        arguments."""
        names, found = any_of(self.special_names | self.added_words), set()
        for turns, args in conversations:
            with contextlib.suppress(ValueError):
                found.update(names.findall(self._run(turns, False, args)))
        return {name for name in found if not name.isspace()}

    @functools.cached_property
    def _reserved_pattern(self) -> re.Pattern:
        return any_of(self.reserved)

    @functools.cached_property
    def _answers_pattern(self) -> re.Pattern:
        """Names that are escaped in an answer that comes back as a message: all but the words at
        which the template itself takes an answer apart, such as </think>."""
        names = self.reserved - (self._tool_marks & self.added_words)
        return any_of(name for name in names if not self._takes_apart(name))

    def _takes_apart(self, name: str) -> bool:
        """Whether the template changes an answer because this name is in it."""
        if not any(name in source for source in self.sources.values()):
            return False
        tag = re.fullmatch(r"</?(\w+)>", name)
        names = [f"<{tag[1]}>", f"</{tag[1]}>"] if tag else [name]
        answer = f"a{'b'.join(names)}c"
        try:
            return (self._keeps(any_of(names).sub(escape_name, answer))
                    and not self._keeps(answer))
        except ValueError:
            return False

    def _keeps(self, answer: str) -> bool:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer},
                 {"role": "user", "content": "a"}]
        return answer in self._run(turns, False, {})

    @functools.cached_property
    def turn_end(self) -> str:
        """The name that the template puts after an answer, "" where it puts text there."""
        try:
            found = self._reserved_pattern.match(self.next_turn("a").lstrip())
        except ValueError:
            return ""
        return found[0] if found else ""

    # -------------------------------------------------------------------------- escaping

    def _escape(self, value: Any, names: re.Pattern) -> Any:
        """A text, or all texts in lists and objects, with every name escaped. `unescape` undoes
        it."""
        if isinstance(value, dict):
            return {self._escape(key, names): self._escape(item, names)
                    for key, item in value.items()}
        if isinstance(value, list):
            return [self._escape(item, names) for item in value]
        if not isinstance(value, str):
            return value
        escaped = value.replace(ESCAPE, 2 * ESCAPE)
        # Names can overlap. Each pass escapes one of those that do.
        while names.search(escaped):
            escaped = names.sub(escape_name, escaped)
        return escaped


def probe_turns(n_calls: int) -> list[dict]:
    """A question, and an answer that calls so many of PROBE_TOOLS, with their results."""
    calls = [{"id": f"probe000{letter}", "type": "function", "function": {
        "name": f"probe_{letter}", "arguments": {"x": f"said_{letter}"}}}
        for letter in "ab"[:n_calls]]
    turns = [{"role": "user", "content": "a"}]
    if calls:
        turns.append({"role": "assistant", "content": "", "tool_calls": calls})
    return turns + [{"role": "tool", "tool_call_id": call["id"], "content": "probe_result"}
                    for call in calls]


def check_args(args: dict) -> None:
    """Raises ValueError for a template argument that the engine itself gives."""
    for name in ENGINE_ARGS:
        if name in args:
            raise ValueError(f"{name} is no template argument; the engine gives it")


def any_of(texts: Iterable[str]) -> re.Pattern:
    """A pattern that finds any of these texts, the longest first. Without texts it finds nothing.

    It is one group, so that re.split keeps what it finds."""
    longest_first = sorted(map(re.escape, filter(None, texts)), key=len, reverse=True)
    nothing = "(?!)"
    return re.compile("(" + ("|".join(longest_first) or nothing) + ")")


def escape_name(found: re.Match) -> str:
    name = found[0]
    return name[0] + ESCAPE + name[1:]


def unescape(text: str) -> str:
    """Text as it was before ChatTemplate escaped it."""
    return re.sub(f"{ESCAPE}({ESCAPE}?)", r"\1", text)


def unescaped_pieces(text: str) -> list[str]:
    """Text as it was before ChatTemplate escaped it, cut inside each name that was escaped."""
    single_escape = f"(?<!{ESCAPE}){ESCAPE}(?!{ESCAPE})"
    return [unescape(piece) for piece in re.split(single_escape, text)]


# ------------------------------------------------------------------------------ jinja2


@functools.lru_cache(maxsize=16)
def compile_template(source: str):
    """A template as transformers compiles it: the same settings, functions and blocks."""
    from jinja2.ext import Extension
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """{% generation %} ... {% endgeneration %} marks what a model is trained on. Here it only
        renders its body, in a scope of its own."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return CallBlock(self.call_method("render_body"), [], [], body).set_lineno(line)

        def render_body(self, caller):
            return caller()

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, finalize=to_text,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.filters["string"] = lambda value: str(to_text(value))
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(source)


def raise_exception(message):
    raise ValueError(message)


def strftime_now(format: str) -> str:
    from datetime import datetime
    return datetime.now().strftime(format)


def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)
    return keep_escapes(text) if ensure_ascii else text


def to_text(value) -> Any:
    """A value as a template writes it: a list or an object as Python does."""
    return keep_escapes(str(value)) if isinstance(value, (list, tuple, dict)) else value


def keep_escapes(text: str) -> str:
    """Text with ESCAPE itself where JSON in ASCII, or Python, has spelled it: once for the escape
    of a name, and twice for the character."""
    def kept(found: re.Match) -> str:
        backslash, first, second = found.groups()
        return backslash or (first if second else ESCAPE)

    return re.sub(r"(\\\\)|(\\ue002)(\\ue002)?", kept, text)
