"""The functions that a request lets a model call, and the grammar of an answer that calls them.

Tools are in OpenAI's form: {"type": "function", "function": {"name": ..., "description": ...,
"parameters": a JSON Schema}}. A template gets them as they are.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass

from formats.tool_calls import ARGUMENTS_MARK, PYTHON_TAG, Form, strict_json
from grammar import Grammar, lark_of_schema, special_texts
from tokenizer import Tokenizer

NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


@dataclass(frozen=True)
class Tools:
    """The functions that an answer may call."""

    tools: tuple[dict, ...]  # as a request gives them, and the template gets them
    forced: tuple[str, ...] = ()  # the answer must call one of these
    parallel: bool = True  # it may hold more than one call

    @functools.cached_property
    def functions(self) -> dict[str, dict]:
        return {tool["function"]["name"]: tool["function"] for tool in self.tools}

    @property
    def strict(self) -> bool:
        return any(function.get("strict") for function in self.functions.values())


# ------------------------------------------------------------------------------ what a client says


def check_tools(tools) -> None:
    """Raises ValueError, beginning with the place, where this is no list of tools in OpenAI's form:
    {"type": "function", "function": {"name": ..., "description": ..., "parameters": schema}}."""
    if not isinstance(tools, list):
        raise ValueError("tools: must be a list")
    names = set()
    for at, tool in enumerate(tools):
        where = f"tools.{at}"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise ValueError(f'{where}.type: a tool is {{"type": "function", "function": ...}}')
        if not isinstance(function := tool.get("function"), dict):
            raise ValueError(f"{where}.function: must be an object with a name")
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{where}.function.name: must be 1 to 128 letters, digits, or _ . : / "
                             "-")
        if name in names:
            raise ValueError(f"{where}.function.name: {name} is the name of another one, too")
        names.add(name)
        check_function(f"{where}.function", function)


def check_function(where: str, function: dict) -> None:
    """Raises ValueError where a function's description, parameters or strict cannot be."""
    if not isinstance(function.get("description"), str | None):
        raise ValueError(f"{where}.description: must be a text")
    if not isinstance(function.get("strict"), bool | None):
        raise ValueError(f"{where}.strict: must be true or false")
    parameters = function.get("parameters")
    if not isinstance(parameters, dict | None):
        raise ValueError(f"{where}.parameters: must be a JSON Schema, which is an object")
    if parameters and parameters.get("type", "object") != "object":
        raise ValueError(f"{where}.parameters.type: must be object")


def tools_of(tools, choice, parallel: bool | None) -> Tools | None:
    """What tools, tool_choice and parallel_tool_calls of a request ask for; None where nothing may
    be called. Raises ValueError that begins with the field."""
    check_tools(tools or [])
    names = [tool["function"]["name"] for tool in tools or []]
    if isinstance(choice, dict):
        named = choice.get("function")
        named = named.get("name") if isinstance(named, dict) else None
        if choice.get("type") != "function" or not isinstance(named, str):
            raise ValueError('tool_choice: must be none, auto, required, or {"type": "function", '
                             '"function": {"name": ...}}')
        if named not in names:
            raise ValueError(f"tool_choice: no tool has the name {named[:128]!r}")
        return Tools(tuple(tools), (named,), False)
    if choice not in (None, "none", "auto", "required"):
        raise ValueError("tool_choice: must be none, auto, required, or an object that names a "
                         "function")
    if choice == "required" and not names:
        raise ValueError("tool_choice: required goes with tools")
    if choice == "none" or not names:
        return None
    return Tools(tuple(tools), tuple(names) if choice == "required" else (), parallel is not False)


def calls_for_template(calls, where: str) -> list[dict]:
    """An assistant message's tool_calls, with arguments as objects: templates write those. Raises
    ValueError that begins with the place of what cannot be."""
    if not isinstance(calls, list):
        raise ValueError(f"{where}: must be a list")
    found = []
    for at, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise ValueError(f'{where}.{at}: a call is {{"id": ..., "type": "function", '
                             '"function": {"name": ..., "arguments": ...}}')
        name, arguments, call_id = function.get("name"), function.get("arguments"), call.get("id")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{where}.{at}.function.name: must be a function's name")
        if not isinstance(call_id, str):
            raise ValueError(f"{where}.{at}.id: must be a text")
        found.append({"id": call_id, "type": "function", "function": {
            "name": name, "arguments": read_arguments(arguments, f"{where}.{at}")}})
    return found


def read_arguments(text, where: str) -> dict:
    arguments = strict_json(text) if isinstance(text, str) else None
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}.function.arguments: must be a JSON object, as a text")
    return arguments


# ------------------------------------------------------------------------------ grammars


def grammar_of_calls(tools: Tools, form: Form, tokenizer: Tokenizer, vocab_size: int,
                     answer: dict | bool | None = None) -> Grammar:
    """The grammar of an answer that may call: one or more calls, as the template writes them, of
    which the arguments fit their function's schema where calls are forced or the function is
    strict. Unless calls are forced, it may be any other answer, or one that fits the schema
    `answer`. Raises ValueError, beginning with the place, for a schema that cannot be obeyed."""
    try:
        return Grammar(tokenizer, vocab_size,
                       lark=lark_of_calls(tools, form, tokenizer, vocab_size, answer))
    except ValueError as error:
        for at, function in enumerate(tools.functions.values()):
            try:
                Grammar(tokenizer, vocab_size, schema=arguments_schema(function, tools))
            except ValueError as reason:
                reason = str(reason).removeprefix("schema: ")
                raise ValueError(f"tools.{at}.function.parameters: {reason}") from None
        raise ValueError(f"tools: {str(error).removeprefix('lark: ')}") from None


def arguments_schema(function: dict, tools: Tools) -> dict:
    """What the arguments of a function have to fit."""
    if not (tools.forced or function.get("strict")):
        return {"type": "object"}
    parameters = function.get("parameters")
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **parameters}


def lark_of_calls(tools: Tools, form: Form, tokenizer: Tokenizer, vocab_size: int,
                  answer: dict | bool | None) -> str:
    """grammar_of_calls in llguidance's kind of Lark."""
    if answer is not None and not (form.opener or tools.forced):
        return calls_or_answer(tools, form, answer)
    special = {text: f"<[{token_id}]>"
               for token_id, text in special_texts(tokenizer, vocab_size).items()}
    opener = special.get(form.opener) or json.dumps(form.opener) if form.opener else ""
    rules = rules_of_call(tools, form, special)
    if form.in_list:
        first, more = '"[" call', '", " call'
    elif form.closer:
        closer = special.get(form.closer) or json.dumps(form.closer)
        first = f'"\\n" call "\\n" {closer}'
        more = f'"\\n" {opener} {first}'
    else:
        first, more = "call", f"{opener} call" if opener else '"; " call'
    more = f"({more})*" if tools.parallel and form.parallel else ""
    end = '"]"' if form.in_list else ""
    rules.append(f"calls: {first} {more} {end}")
    if tools.forced:
        rules.append(f"start: {opener} calls")
    elif answer is not None:
        rules.append(lark_of_schema(answer).replace("start:", "answer:", 1))
        rules.append(f"start: answer | {opener} calls")
    else:
        rules += rules_of_free_text(form, special)
    return "\n".join(rules)


def rules_of_call(tools: Tools, form: Form, special: dict[str, str]) -> list[str]:
    """One call, without what encloses it: the rule `call`. special are special tokens, by text."""
    names = tools.forced or tuple(tools.functions)
    rules = [f"call: {' | '.join(f'call_{n}' for n in range(len(names)))}"]
    for n, name in enumerate(names):
        schema = lark_of_schema(arguments_schema(tools.functions[name], tools))
        rules.append(schema.replace("start:", f"arguments_{n}:", 1))
        if form.by_name:
            between = special.get(ARGUMENTS_MARK) or json.dumps(ARGUMENTS_MARK)
            rules.append(f"call_{n}: {json.dumps(name)} {between} arguments_{n}")
        else:
            before = json.dumps(form.before_arguments(name))
            rules.append(f'call_{n}: {before} arguments_{n} "}}"')
    return rules


def rules_of_free_text(form: Form, special: dict[str, str]) -> list[str]:
    """An answer of any text, up to where a call begins, if one does: the rule `start`."""
    opener = special.get(form.opener or PYTHON_TAG)
    others = [token for token in special.values() if token != opener]
    rest = f"(({' | '.join(others)}) TEXT?)*" if others else ""
    if not form.opener:  # a call begins the answer
        return [f"start: BEGIN? {rest} | {opener + '? ' if opener else ''}calls",
                r"BEGIN: /\s*[^\s{](?s:.*)/", "TEXT: /(?s:.+)/"]
    # No text holds the opener, be it a special token or not: nothing would hold such a call.
    text = re.escape(form.opener).replace("/", r"\/")
    rules = [f"TEXT: /(?s:.+)/ & ~/(?s:.*){text}(?s:.*)/", f"free: TEXT? {rest}"]
    if opener:
        return [*rules, f"start: free ({opener} calls)?"]
    return [*rules, "start: free | free until calls", f"until[lazy]: /(?s:.*){text}/"]


def calls_or_answer(tools: Tools, form: Form, answer: dict | bool) -> str:
    """The grammar of an answer that fits a schema or is a call, where both are bare objects: they
    can be told apart at any place, and only as one schema."""
    options = [answer]
    for function in tools.functions.values():
        options.append({"type": "object", "properties": {
            "name": {"const": function["name"]}, form.key: arguments_schema(function, tools)},
            "required": ["name", form.key], "additionalProperties": False})
    return lark_of_schema({"anyOf": [
        rerooted(option, f"#/anyOf/{at}" + (f"/properties/{form.key}" if at else ""))
        for at, option in enumerate(options)]})


def rerooted(schema, root: str):
    """A schema whose references, which begin with #, are to begin with another root."""
    if isinstance(schema, list):
        return [rerooted(inner, root) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    ref = schema.get("$ref")
    moved = {"$ref": root + ref[1:]} if isinstance(ref, str) and ref.startswith("#") else {}
    return {**{name: rerooted(inner, root) for name, inner in schema.items()}, **moved}
