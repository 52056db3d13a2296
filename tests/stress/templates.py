"""Chat templates in a folder, rendered by transformers and here: the texts must be equal.

    python tests/stress/templates.py path/to/llama.cpp
    python tests/stress/templates.py path/to/hub_folders --verbose

Reads every .jinja file below the folder, the chat_template of every .json file, and the templates
that llama.cpp's tests/test-chat-template.cpp holds as C++ strings. Each renders a number of
conversations, with and without a generation prompt and with template arguments. A conversation that
one side refuses must be refused by the other, too. It is also fed turn by turn, as chat.py does;
templates that write an earlier turn otherwise than the latest one (they drop its reasoning, or put
the system turn before the last question) can't be equal to the whole then, and are counted.
Prints a JSON object. Exits with 1 where a text differs.
"""

from __future__ import annotations

import collections
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

STRESS = Path(__file__).parent
sys.path[:0] = [str(STRESS.parent.parent), str(STRESS.parent), str(STRESS)]

from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402

from chat_template import ChatTemplate, unescape  # noqa: E402
from cli import plain_parser  # noqa: E402

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# How the names of marks look in the templates of released models.
MARKS = re.compile(r"<[|\uff5c][^<>|\uff5c]{1,40}[|\uff5c]>|\[/?[A-Z_]{3,}\]|</?[a-z_]{1,20}>")
USERS = ["Hi there, cat.", " Is it <late>?\n", "So </s> long<|im_end|>"]
ANSWERS = ["Hello.", "It sat on\nthe mat", "<think>\nwhy\n</think>\n\nBecause."]
ARGS = [{}, {"enable_thinking": False}, {"enable_thinking": True, "reasoning_effort": "low"},
        {"documents": [{"title": "Cats", "text": "They sit."}]}]


def conversations() -> Iterator[list[dict]]:
    for system in (None, "", "You are a cat.", " Be <kind>. \n"):
        start = [] if system is None else [{"role": "system", "content": system}]
        for n in (1, 2, 3):
            turns = [turn for user, said in zip(USERS[:n], ANSWERS)
                     for turn in ({"role": "user", "content": user},
                                  {"role": "assistant", "content": said})]
            yield [*start, *turns[:-1]]
            yield [*start, *turns]
    yield [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}]
    yield [{"role": "assistant", "content": "Me first."}, {"role": "user", "content": "Yes?"}]
    yield [{"role": "tool", "content": "5"}]


def templates_below(folder: Path) -> dict[str, str]:
    """The sources of all templates below a folder, by where they stand."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jinja":
            found[name] = path.read_text(encoding="utf-8")
        elif path.suffix == ".json" and path.stat().st_size < 10 << 20:
            for key, source in templates_in_json(path):
                found[f"{name}: {key}"] = source
        elif path.name == "test-chat-template.cpp":
            for n, source in enumerate(templates_in_cpp(path.read_text(encoding="utf-8"))):
                found[f"{name}: {n}"] = source
    return found


def templates_in_json(path: Path) -> Iterator[tuple[str, str]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    named = value if isinstance(value, list) else [{"name": "default", "template": value}]
    yield from ((entry["name"], entry["template"]) for entry in named)


def templates_in_cpp(text: str) -> Iterator[str]:
    """C++ string literals behind a comment `.template_str`, adjacent ones joined."""
    literal = r'"(?:[^"\\]|\\.)*"'
    for found in re.finditer(rf"\.template_str=? \*/ (?:U8C\()?({literal}(?:\s*{literal})*)", text):
        parts = re.findall(literal, found[1])
        yield "".join(json.loads(part.replace(r"\'", "'"), strict=False) for part in parts)


def rendered(render, *args, **kwargs) -> str | None:
    """The text, or None where the template refuses the conversation."""
    try:
        return render(*args, **kwargs)
    except Exception:
        return None


def theirs(source: str, messages: list[dict], prompt: bool, args: dict) -> str:
    return render_jinja_template([messages], chat_template=source, add_generation_prompt=prompt,
                                 **{**TOKENS, **args})[0][0]


def turn_by_turn(template: ChatTemplate, messages: list[dict], args: dict) -> str:
    """The text of a conversation that ends with a user's turn, as chat.py feeds it."""
    first = next(n for n, turn in enumerate(messages) if turn["role"] == "assistant")
    text = "".join(template.conversation(messages[:first], args))
    for answer, user in zip(messages[first::2], messages[first + 1::2]):
        text += answer["content"] + template.next_turn(user["content"], args)
    return unescape(text)


def compare(name: str, source: str, counts: collections.Counter, verbose: bool) -> None:
    """Count how one template's texts compare."""
    template = ChatTemplate({"default": source}, set(MARKS.findall(source)) | {*TOKENS.values()},
                            set(), TOKENS)
    for messages in conversations():
        for args in ARGS:
            for prompt in (True, False):
                ours = rendered(template.render, messages, prompt, args)
                expected = rendered(theirs, source, messages, prompt, args)
                end = "both refuse" if ours is None and expected is None else (
                    "equal" if None not in (ours, expected) and unescape(ours) == expected
                    else "differ")
                counts[end] += 1
                if end == "differ":
                    counts[f"differ: {name}"] += 1
                    if verbose:
                        print(name, messages, prompt, args, ours, expected, sep="\n    ",
                              file=sys.stderr)
                roles = [turn["role"] for turn in messages if turn["role"] != "system"]
                if end == "equal" and prompt and roles[:2] == ["user", "assistant"] and (
                        roles[-1] == "user"):
                    fed = rendered(turn_by_turn, template, messages, args)
                    same = fed == expected
                    counts["turn by turn equal" if same else "turn by turn otherwise"] += 1
                    if not same:
                        counts[f"otherwise: {name}"] += 1


def main():
    parser = plain_parser(__doc__)
    parser.add_argument("folder", type=Path, help="a checkout, or any folder with templates")
    parser.add_argument("--verbose", action="store_true", help="show the texts that differ")
    args = parser.parse_args()
    found, counts = templates_below(args.folder), collections.Counter()
    for name, source in found.items():
        compare(name, source, counts, args.verbose)
    print(json.dumps({"templates": len(found), **counts}, indent=1))
    sys.exit(1 if counts["differ"] or not found else 0)


if __name__ == "__main__":
    main()
