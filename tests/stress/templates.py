"""Chat templates in a folder, rendered by transformers and here: the texts must be equal.

    python tests/stress/templates.py path/to/llama.cpp
    python tests/stress/templates.py path/to/hub_folders --verbose

Reads every .jinja file below the folder, the chat_template of every .json file, and the templates
that llama.cpp's tests/test-chat-template.cpp holds as C++ strings. Each renders a number of
conversations, with and without a generation prompt and with template arguments. A conversation that
one side refuses must be refused by the other, too. What chat.py feeds after an answer is compared
with the end of the whole, too. It can't be equal for templates whose latest turn depends on those
before it (they put the system turn before the last question, or number the turns), which are named.
Prints a JSON object. Exits with 1 where a text differs.
"""

from __future__ import annotations

import collections
import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

STRESS = Path(__file__).parent
sys.path[:0] = [str(STRESS.parent.parent), str(STRESS.parent), str(STRESS)]

from transformers.utils import chat_template_utils  # noqa: E402

from cli import plain_parser  # noqa: E402
from formats.chat_template import ChatTemplate, unescape  # noqa: E402

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# How the names of marks look in the templates of released models.
MARKS = re.compile(r"<[|\uff5c][^<>|\uff5c]{1,40}[|\uff5c]>|\[/?[A-Z_]{3,}\]|</?[a-z_]{1,20}>")
USERS = ["Hi there, cat.", " Is it <late>?\n", "So </s> long<|im_end|>"]
ANSWERS = ["Hello.", "It sat on\nthe mat", "<think>\nwhy\n</think>\n\nBecause."]
TOOLS = [{"type": "function", "function": {
    "name": name, "description": "Tells </s> it", "parameters": {
        "type": "object", "properties": {"of": {"type": "string", "description": "Where"}}}}}
    for name in ("get_weather", "get_time")]
ARGS = [{}, {"tools": TOOLS}, {"enable_thinking": False},
        {"enable_thinking": True, "reasoning_effort": "low"},
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
    for n in (1, 2):  # calls of functions
        calls = [{"id": f"call0000{i}", "type": "function", "function": {
            "name": TOOLS[i]["function"]["name"], "arguments": {"of": "a </s> <city>", "n": [1.5]}}}
            for i in range(n)]
        asked = [{"role": "user", "content": USERS[0]},
                 {"role": "assistant", "content": "", "tool_calls": calls}]
        results = [{"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"],
                    "content": "5 <|im_end|>"} for call in calls]
        yield asked
        yield [*asked, *results]
        yield [*asked, *results, {"role": "assistant", "content": "So."},
               {"role": "user", "content": "Ah."}]


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
    return chat_template_utils.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=prompt,
        **{**TOKENS, **args})[0][0]


def next_turn_is_the_wholes(template: ChatTemplate, messages: list[dict], args: dict,
                            whole: str) -> bool:
    """Whether the whole conversation's text ends with what is fed after the latest answer."""
    fed = unescape(template.next_turn(messages[-1]["content"], args))
    before = whole.removesuffix(fed)
    return whole.endswith(fed) and before.rstrip().endswith(messages[-2]["content"].rstrip())


def compare(name: str, source: str, counts: collections.Counter, verbose: bool) -> None:
    """Count how one template's texts compare."""
    template = ChatTemplate({"default": source}, set(MARKS.findall(source)) | {*TOKENS.values()},
                            set(), TOKENS)
    for messages in conversations():
        has_answer = [message["role"] for message in messages[-2:]] == ["assistant", "user"] and (
            len(messages) > 2)
        for args in ARGS:
            for prompt in (True, False):
                ours = rendered(template.render, messages, prompt, args)
                expected = rendered(theirs, source, messages, prompt, args)
                if ours is None and expected is None:
                    counts["refused by both"] += 1
                elif ours is None or expected is None or unescape(ours) != expected:
                    counts["differ"] += 1
                    counts[f"differ: {name}"] += 1
                    if verbose:
                        print(name, messages, prompt, args, ours, expected, sep="\n    ",
                              file=sys.stderr)
                else:
                    counts["equal"] += 1
                    if prompt and has_answer:
                        same = rendered(next_turn_is_the_wholes, template, messages, args, expected)
                        counts["next turn equal" if same else "next turn otherwise"] += 1
                        if not same:
                            counts[f"otherwise: {name}"] += 1


def main():
    parser = plain_parser(__doc__)
    parser.add_argument("folder", type=Path, help="a checkout, or any folder with templates")
    parser.add_argument("--verbose", action="store_true", help="show the texts that differ")
    args = parser.parse_args()
    # transformers compiles a template anew at every call.
    chat_template_utils._compile_jinja_template = functools.cache(
        chat_template_utils._compile_jinja_template)
    found, counts = templates_below(args.folder), collections.Counter()
    if not found:
        parser.error(f"{args.folder}: no templates below it")
    for name, source in found.items():
        compare(name, source, counts, args.verbose)
    print(json.dumps({"templates": len(found), **counts}, indent=1))
    sys.exit(1 if counts["differ"] else 0)


if __name__ == "__main__":
    main()
