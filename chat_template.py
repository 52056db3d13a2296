"""A checkpoint's chat template, and the text of a conversation's turns.

The template runs in jinja2's sandbox. All here is text; tokenizer.py makes ids of it.

A conversation is never rendered twice: `conversation` renders its opening, and `next_turn` only
what the template puts between an answer and the next one. The cache holds the rest. What stands in
a message is text: a special token's name, typed by a user, becomes its characters.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

# The form that Vicuna was trained on, for checkpoints without a template.
VICUNA_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }} "
    "{% elif m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}")
USER_MARK, ANSWER_MARK = "\ue000user\ue001", "\ue000answer\ue001"  # private-use: no one types them
BREAK = "\ue002"  # after the first character of a special token's name that is only text


@dataclass
class ChatTemplate:
    """A chat template, and the tokens that no message can say.

    Its methods return rendered text, in which the names of special tokens that stand in a message
    are broken up; Tokenizer.encode_rendered takes it. A message is {"role": ..., "content": text}.
    They raise ValueError for what the template refuses."""

    source: str
    special: set[str]  # the special tokens' names
    ordinary: set[str]  # words that were added to the vocabulary
    bos_token: str
    eos_token: str

    def system_turn(self, system: str) -> str:
        """What opens a conversation, before the user's turn."""
        turns = [{"role": "system", "content": system.strip()}]  # as many templates do
        system = self._as_text(system.strip())
        opening, mark, _ = self._render(turns + [{"role": "user", "content": USER_MARK}]).partition(
            USER_MARK)
        if not mark or system not in opening:
            raise ValueError("the chat template does not render a system turn")
        try:
            alone = self._render(turns, add_generation_prompt=False)
        except ValueError:  # some templates insist on a user's turn: then its header is pinned too
            return opening
        return alone if system in alone and opening.startswith(alone) else opening

    def conversation(self, messages: list[dict]) -> tuple[str, str]:
        """(the system turn as system_turn renders it, or "", and the rest), up to where an answer
        begins."""
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

    @functools.cached_property
    def reserved(self) -> set[str]:
        """What no message can say: special tokens, and words that the template marks turns with.
        (Others, as a model's <think>, are said in answers, which come back as messages.)"""
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        try:
            marks = set(any_of(self.ordinary | self.special).findall(self._fill(turns)))
        except ValueError:
            marks = set()
        # Whitespace is in every message and marks no turn; a name of one character cannot be cut.
        marks = {mark for mark in marks if not mark.isspace()}
        return {name for name in self.special | marks if len(name) > 1}

    @functools.cached_property
    def _reserved_pattern(self) -> re.Pattern:
        return any_of(self.reserved)

    def _as_text(self, content: str) -> str:
        """A message's content for the template: names of special tokens are broken up, which
        `whole` undoes."""
        content = content.replace(BREAK, 2 * BREAK)
        while (broken := self._reserved_pattern.sub(break_up, content)) != content:
            content = broken
        return content

    def _render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        return self._fill([{**turn, "content": self._as_text(turn["content"])}
                           for turn in messages], add_generation_prompt)

    def _fill(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token, eos_token=self.eos_token)
        except Exception as error:  # a template is a program: anything may go wrong in it
            raise ValueError(f"the chat template cannot render this: {error}") from None

    @functools.cached_property
    def _compiled(self):
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = to_json
        environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
        return environment.from_string(self.source)


# ------------------------------------------------------------------------------ names that are text


def any_of(texts: Iterable[str]) -> re.Pattern:
    """Finds any of these texts, the longest first; in a group, as re.split keeps it."""
    longest_first = sorted(map(re.escape, filter(None, texts)), key=len, reverse=True)
    return re.compile("(" + ("|".join(longest_first) or "(?!)") + ")")


def break_up(name: re.Match) -> str:
    return name[0][0] + BREAK + name[0][1:]


def whole(text: str) -> str:
    """Text whose names were broken up, as it was."""
    return re.sub(f"{BREAK}({BREAK}?)", r"\1", text)


def pieces_of(text: str) -> list[str]:
    """Text whose names were broken up, as it was, cut inside of each name."""
    return [whole(piece) for piece in re.split(f"(?<!{BREAK}){BREAK}(?!{BREAK})", text)]


# ------------------------------------------------------------------------------ what templates call


def raise_exception(message):
    raise ValueError(message)


def strftime_now(form: str) -> str:
    from datetime import datetime
    return datetime.now().strftime(form)


def to_json(value, **options) -> str:
    return json.dumps(value, ensure_ascii=False, **options)
