"""What a request's answers must fit: its grammar, read in time, and the calls of its tools."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from formats.tool_calls import form_of_calls
from formats.tools import grammar_of_calls
from grammar import Grammar, vocabulary
from server.engine import Engine
from server.protocol import ApiError, Request, refused

GRAMMAR_TIMEOUT = 0.9  # seconds that reading a grammar may take


def prepare(engine: Engine) -> None:
    """Make the table of tokens that grammars need, once. Raises ApiError where it cannot be."""
    try:
        vocabulary(engine.tokenizer, engine.model.config.vocab_size)
    except ValueError as error:
        raise ApiError(400, f"{error}.", code="unsupported_parameter") from None


def compile_now(engine: Engine, request: Request) -> None:
    """Compile what a request's answers must fit. Raises ApiError naming the field."""
    (field, source), vocab_size = request.grammar or ("tools", {}), engine.model.config.vocab_size
    try:
        if source:
            grammar = Grammar(engine.tokenizer, vocab_size, **source)
        if request.tools:
            grammar = grammar_of_calls(request.tools, engine.ability.form, engine.tokenizer,
                                       vocab_size, source.get("schema"))
        grammar.check_fits(vocab_size, engine.stop_ids_of(request))
    except ValueError as error:
        raise refused(error, field) from None
    request.sampling = replace(request.sampling, grammar=grammar)


async def compile_grammar(engine: Engine, request: Request) -> None:
    """Compile what a request's answers must fit, in another thread. Raises ApiError when that takes
    too long: the thread goes on, within the limits of grammar.py, and nobody waits for it."""
    await asyncio.to_thread(prepare, engine)
    try:
        await asyncio.wait_for(asyncio.to_thread(compile_now, engine, request), GRAMMAR_TIMEOUT)
    except asyncio.TimeoutError:
        field = request.grammar_field
        raise ApiError(400, f"Invalid {field!r}: it takes too long to read; ask for less.", field,
                       "invalid_value") from None


def check_tools(engine: Engine, request: Request) -> None:
    """Raises ApiError where the chat template cannot say a request's tools, or calls and
    results in its messages."""
    try:
        if request.tools:
            form_of_calls(engine.ability, "tools")
    except ValueError as error:
        raise refused(error) from None
    for at, message in enumerate(request.messages):
        of_call = message["role"] == "tool" or "tool_calls" in message
        if of_call and not engine.ability.writes_calls[bool(request.tools)]:
            raise ApiError(400, "The chat template of this model cannot say calls and their "
                                f"results{'' if request.tools else ' without tools'}.",
                           f"messages.{at}", "unsupported_parameter")
