"""A checkpoint's chat template, and the text of a conversation's turns.

Everything here is text; tokenizer.py encodes it. The template runs in jinja2's sandbox.

A conversation is rendered piece by piece, as it goes on: `conversation` renders its beginning, and
`next_turn` renders only what the template puts between one answer and the next. The cache holds the
tokens of everything before. A message can't contain special tokens: where a user types the name of
one, the name is escaped here, and its characters are encoded as ordinary text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

# Vicuna's prompt format. A checkpoint without a template gets this one.
VICUNA_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }} "
    "{% elif m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}")
# These mark a message's place in rendered text. Nobody types their private-use characters.
USER_MARK, ANSWER_MARK = "\ue000user\ue001", "\ue000answer\ue001"
# A name is escaped by this character after its first one. Where a message contains the character
# itself, it is doubled.
ESCAPE = "\ue002"


@dataclass
class ChatTemplate:
    """A chat template, and the names that no message may turn into tokens.

    A message is {"role": ..., "content": text}. The methods return rendered text in which the
    special tokens' names are escaped wherever they come from a message. It is for
    Tokenizer.encode_rendered. The methods raise ValueError for what the template refuses."""

    source: str
    special_names: set[str]
    added_words: set[str]  # added to the vocabulary as words, such as <think>; they aren't special
    bos_token: str
    eos_token: str

    # -------------------------------------------------------------------------- turns

    def system_turn(self, system: str) -> str:
        """What opens a conversation, before the user's turn."""
        system = system.strip()  # many templates strip it
        turns = [{"role": "system", "content": system}]
        escaped = self._escape(system)
        with_user = self._render([*turns, {"role": "user", "content": USER_MARK}])
        opening, mark, _ = with_user.partition(USER_MARK)
        if not mark or escaped not in opening:
            raise ValueError("the chat template does not render a system turn")
        try:
            alone = self._render(turns, add_generation_prompt=False)
        except ValueError:
            # Some templates refuse a conversation without a user's turn. The header of the user's
            # turn then belongs to the opening.
            return opening
        return alone if escaped in alone and opening.startswith(alone) else opening

    def conversation(self, messages: list[dict]) -> tuple[str, str]:
        """The beginning of a conversation, up to where an answer begins: (opening, rest).

        The opening is what system_turn returns. It is "" without a system turn, and where the
        template renders the system turn otherwise in this conversation."""
        opening = ""
        if messages[0]["role"] == "system" and messages[0]["content"].strip():
            system = messages[0]["content"].strip()
            messages = [{"role": "system", "content": system}, *messages[1:]]
            opening = self.system_turn(system)
        text = self._render(messages)
        if not text.startswith(opening):
            opening = ""
        return opening, text.removeprefix(opening)

    def next_turn(self, user: str) -> str:
        """What stands between the end of an answer and the beginning of the next one."""
        return self.turns_after([{"role": "user", "content": USER_MARK},
                                 {"role": "assistant", "content": ANSWER_MARK},
                                 {"role": "user", "content": user}], 1)

    def turns_after(self, messages: list[dict], answer: int) -> str:
        """What follows the answer messages[answer], up to where the next one begins."""
        messages = [*messages]
        messages[answer] = {"role": "assistant", "content": ANSWER_MARK}
        _, mark, rest = self._render(messages).partition(ANSWER_MARK)
        if not mark or ANSWER_MARK in rest:
            raise ValueError("the chat template does not render the assistant's turns")
        return rest

    # -------------------------------------------------------------------------- rendering

    def _render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The template's text for these messages, whose contents are escaped first."""
        escaped = [{**turn, "content": self._escape(turn["content"])} for turn in messages]
        return self._run_template(escaped, add_generation_prompt)

    def _run_template(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        try:
            return self._program.render(
                messages=messages, add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token, eos_token=self.eos_token)
        except Exception as error:  # a template is a program, which can raise anything
            raise ValueError(f"the chat template cannot render this: {error}") from None

    @functools.cached_property
    def _program(self):
        """The template, compiled by jinja2 at its first use."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = to_json
        environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
        return environment.from_string(self.source)

    # -------------------------------------------------------------------------- escaping

    @functools.cached_property
    def reserved(self) -> set[str]:
        """Names that are escaped in messages: the special tokens', and those of added words that
        the template marks turns with.

        Other added words may stand in a message. <think>, for one, is part of an answer, and
        clients send answers back as messages. Whitespace (an added word in Gemma's vocabulary) is
        in every message and marks no turn. A name of one character can't be cut."""
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        names = any_of(self.special_names | self.added_words)
        try:
            marks = set(names.findall(self._run_template(turns)))
        except ValueError:
            marks = set()
        marks = {mark for mark in marks if not mark.isspace()}
        return {name for name in self.special_names | marks if len(name) > 1}

    @functools.cached_property
    def _reserved_pattern(self) -> re.Pattern:
        return any_of(self.reserved)

    def _escape(self, content: str) -> str:
        """A message's content with every reserved name escaped. `unescape` undoes it."""
        escaped = content.replace(ESCAPE, 2 * ESCAPE)
        # Names can overlap. Each pass escapes one of those that do.
        while self._reserved_pattern.search(escaped):
            escaped = self._reserved_pattern.sub(escape_name, escaped)
        return escaped


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


# ------------------------------------------------------------------------------ what templates call


def raise_exception(message):
    raise ValueError(message)


def strftime_now(form: str) -> str:
    from datetime import datetime
    return datetime.now().strftime(form)


def to_json(value, **options) -> str:
    return json.dumps(value, ensure_ascii=False, **options)
