"""What an answer may say: a JSON Schema, a regular expression or a grammar, obeyed token by token.

The optional package `llguidance` reads a grammar over the bytes of the vocabulary's tokens, and
tells before each token which ones go on with it. draw.py masks the others, and the tokens that end
an answer until the grammar allows its end. So an answer that ends by itself fits the grammar, and
one that max_new_tokens or a stop text cuts is the beginning of one that does.
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
import types
from collections.abc import Callable, Collection
from decimal import Decimal

import numpy as np
import torch
from torch import Tensor

from formats.files import import_optional
from formats.tokenizer_model import TokenizerModel
from tokenizer import Tokenizer

MAX_CHARS = 1 << 17  # of a schema or a grammar: reading more takes longer than a client waits
# A mask that needs more of these makes the other rows of a batch wait for it.
LIMITS = dict(max_grammar_size=10_000, max_lexer_states=50_000, step_lexer_fuel=50_000,
              step_max_items=10_000, verbose_errors=False)
TRIAL_TOKENS = 64  # a new grammar is tried on so many: some explode only there
# Where JSON may have white space, some models go on with it for ever: so it is one line, with a
# space after a colon or comma or none.
ON_ONE_LINE = dict(key_separator=": ?", item_separator=", ?", whitespace_flexible=False)
NO_FORCING = '\n%llguidance {"no_forcing": true}'  # the model chooses how text is cut into tokens


class Grammar:
    """A grammar over the tokens of one vocabulary, for `Sampling.grammar`. It never changes, so
    answers share it, and each has a Matcher of its own."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, schema: dict | bool | None = None,
                 regex: str | None = None, lark: str | None = None):
        """One of: a JSON Schema, a regular expression that the whole answer matches, a grammar in
        llguidance's kind of Lark, or in llama.cpp's GBNF. vocab_size is the model's.

        Raises ValueError naming what is wrong with it, or what llguidance cannot do of it."""
        given = {"schema": schema, "regex": regex, "lark": lark}
        given = {kind: source for kind, source in given.items() if source is not None}
        if len(given) != 1:
            raise ValueError("a grammar takes one of schema, regex and lark")
        [(self.kind, source)] = given.items()
        llguidance = import_optional("llguidance", "a grammar")
        self.vocab_size = vocab_size
        try:
            text = lark_of_schema(source) if self.kind == "schema" else source
            if self.kind == "lark" and "::=" in text:
                text = lark_of_gbnf(text)
            if len(text) > MAX_CHARS:
                raise ValueError(f"it has {len(text)} characters; at most {MAX_CHARS} are read")
            if self.kind == "regex":
                text = f"start: /{llguidance.regex_to_lark(text)}/"
            self._make = functools.partial(
                llguidance.LLMatcher, vocabulary(tokenizer, vocab_size), text + NO_FORCING,
                log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
            self._start = self._make()
            if error := self._start.get_error() or self._try():
                raise ValueError(in_one_line(error))
        except ValueError as error:
            raise ValueError(f"{self.kind}: {error}") from None

    def matcher(self, stop_ids: Collection[int]) -> Matcher:
        """The state of a new answer, which one of stop_ids ends."""
        stop_ids = [token_id for token_id in stop_ids if token_id < self.vocab_size]
        return Matcher(self._start.deep_copy(), stop_ids, self._make)

    def check_fits(self, vocab_size: int, stop_ids: Collection[int]) -> None:
        """Raises ValueError where an answer could not end, or the model is another one."""
        if self.vocab_size != vocab_size:
            raise ValueError(f"the grammar is for {self.vocab_size} tokens, and the model has "
                             f"{vocab_size}")
        if not any(token_id < vocab_size for token_id in stop_ids):
            raise ValueError("an answer with a grammar needs a token that ends it, and stop_ids "
                             "has none")

    def _try(self) -> str:
        """Walk through the grammar at random. Returns the error that this ran into, if any."""
        matcher, choose = Matcher(self._start.deep_copy(), ()), random.Random(0)
        mask = new_masks(1, self.vocab_size)[0]
        for _ in range(TRIAL_TOKENS):
            matcher.allow_next(mask)
            bits = np.unpackbits(mask.numpy(), bitorder="little")[:self.vocab_size]
            if matcher.error or not bits.any():
                break
            matcher.accept(choose.choice(np.flatnonzero(bits)).item())
        return matcher.error


class Matcher:
    """How far one answer has come in its grammar. Nothing here raises: see `error`."""

    def __init__(self, matcher, stop_ids: Collection[int], make: Callable | None = None):
        """matcher is llguidance's, a copy. Copies share a lexer, and with it LIMITS: when those are
        reached, make() is a matcher of this answer alone, and only its own fault ends it."""
        self._matcher, self.stop_ids, self.ended = matcher, tuple(stop_ids), False
        self._make, self._accepted = make, []

    @property
    def error(self) -> str:
        """Why the answer cannot go on; none while it can. Then only its end is allowed."""
        return in_one_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def accept(self, token_id: int) -> None:
        """Take the token that was drawn."""
        if token_id in self.stop_ids:
            self.ended = True
        elif token_id >= 0 and not self.ended:
            self._matcher.consume_token(token_id)
            self._accepted.append(token_id)

    def allow_next(self, mask: Tensor) -> None:
        """Write into mask (n_bytes,), a row of `new_masks`, which tokens may come next."""
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), len(mask))
        if self._matcher.is_error() and self._make:
            self._matcher, self._make = self._make(), None
            self._matcher.consume_tokens(self._accepted)
            self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), len(mask))
        over = self.ended or self._matcher.is_error()
        if over:
            mask.zero_()
        may_end = over or self._matcher.is_accepting()
        row = mask.numpy()
        for token_id in self.stop_ids:
            bit = 1 << token_id % 8
            if may_end:
                row[token_id // 8] |= bit
            else:
                row[token_id // 8] &= 255 - bit


def lark_of_gbnf(text: str) -> str:
    """A grammar in llama.cpp's form, as Lark. Raises ValueError where it is none."""
    gbnf = import_optional("llguidance.gbnf_to_lark", "a grammar")
    try:
        return gbnf.gbnf_to_lark(text)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(in_one_line(str(error))) from None


def in_one_line(error: str) -> str:
    """llguidance's message without the grammar that it quotes, and without where in it, which
    counts our own words."""
    lines = [line for line in error.splitlines() if line.strip()] or ["unknown error"]
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    for prefix in ("error: ", "at 1(8): ", "failed to compile JSON schema: "):
        line = line.removeprefix(prefix)
    return "no token goes on with it" if line == "NoExtensionBias" else line[:300]


# ------------------------------------------------------------------------------ masks


def new_masks(n_rows: int, vocab_size: int, pin_memory: bool = False) -> Tensor:
    """(B, n_bytes) uint8 on the host: a bit for each token, all set. llguidance counts in words of
    32 bits, and one token beyond the vocabulary, its own end of the text."""
    n_bytes = 4 * (vocab_size // 32 + 1)
    return torch.full((n_rows, n_bytes), 255, dtype=torch.uint8, pin_memory=pin_memory)


def forbidden_by(masks: Tensor, vocab_size: int, on_cpu: bool) -> Tensor:
    """(..., V) bool: where a token is not allowed, of masks (..., n_bytes)."""
    if on_cpu:  # after a step, each first call of a PyTorch operator is slow there
        bits = np.unpackbits(~masks.numpy(), axis=-1, count=vocab_size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    bits = 2 ** torch.arange(8, dtype=torch.uint8, device=masks.device)
    return (masks[..., None] & bits).flatten(-2)[..., :vocab_size] == 0


# ------------------------------------------------------------------------------ tokens


@functools.lru_cache(maxsize=2)
def vocabulary(tokenizer: Tokenizer, vocab_size: int):
    """llguidance's table of a tokenizer's tokens, which takes a while to make. Grammars that name a
    special token spell it <name>, and no text in an answer can be one."""
    llguidance = import_optional("llguidance", "a grammar")
    texts, special = token_bytes(tokenizer, vocab_size), special_texts(tokenizer, vocab_size)
    for token_id, text in special.items():
        texts[token_id] = text.encode(errors="replace")
    return llguidance.LLTokenizer(types.SimpleNamespace(
        is_tokenizer_wrapper=True, tokens=texts, special_token_ids=list(special),
        eos_token_id=None, bos_token_id=None))


def special_texts(tokenizer: Tokenizer, vocab_size: int) -> dict[int, str]:
    """The tokens that no text in an answer can be, by id: those that are not shown, and words such
    as <think>."""
    return {token_id: text for text, token_id in tokenizer.named_ids.items()
            if token_id < vocab_size
            and (token_id in tokenizer.hidden_ids or text[:1] + text[-1:] == "<>")}


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """What each token adds to an answer. Nothing for one that is not there, or has no text."""
    vocabulary, hidden_ids = tokenizer.vocabulary, tokenizer.hidden_ids
    if isinstance(vocabulary, TokenizerModel):
        sp, bytes_of = vocabulary.sp, vocabulary.stream(hidden_ids).bytes_of
        silent = {i for i in range(sp.get_piece_size()) if sp.is_unknown(i) or sp.is_unused(i)}
        return [b"" if i in silent else bytes_of(i) for i in range(vocab_size)]
    texts, to_bytes = [b""] * vocab_size, bytes_by_decoder(vocabulary.library.decoder)
    for text, token_id in vocabulary.library.get_vocab(with_added_tokens=True).items():
        if token_id < vocab_size and token_id not in hidden_ids:
            texts[token_id] = to_bytes(text)
    return texts


def bytes_by_decoder(decoder) -> Callable[[str], bytes]:
    """A function from a token of tokenizer.json to its bytes, as the file's decoder makes them.
    Raises ValueError naming a decoder that is not known here."""
    steps = json.loads(decoder.__getstate__()) if decoder else {}
    steps = {step.get("type"): step for step in steps.get("decoders", [steps])}
    if "ByteLevel" in steps:
        alphabet = byte_alphabet()
        return lambda text: (bytes(alphabet[c] for c in text) if alphabet.keys() >= set(text)
                             else text.encode(errors="replace"))
    if not steps.keys() & {"ByteFallback", "Metaspace"}:
        raise ValueError(f"tokenizer.json has the decoder {next(iter(steps))}; a grammar needs "
                         "ByteLevel, ByteFallback or Metaspace")
    space = steps.get("Metaspace", {}).get("replacement", "\u2581")

    def with_spaces(text: str) -> bytes:
        if "ByteFallback" in steps and len(text) == 6 and text.startswith("<0x"):
            return bytes([int(text[3:5], 16)])
        return text.replace(space, " ").encode(errors="replace")

    return with_spaces


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it is printable in Latin-1, else the
    next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)}


# ------------------------------------------------------------------------------ JSON Schema

# Where a schema holds others: by name, in a list, or as the value itself.
BY_NAME = "properties", "patternProperties", "$defs", "definitions"
LISTS = "anyOf", "oneOf", "allOf", "prefixItems", "items"
VALUES = "items", "additionalProperties", "additionalItems"
ANNOTATIONS = "title", "description", "examples", "$comment"  # they say nothing of a value
# The formats of the standard. Any other says nothing of a value, as "int32" or "password".
FORMATS = {"date-time", "time", "date", "duration", "email", "idn-email", "hostname",
           "idn-hostname", "ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid",
           "uri-template", "json-pointer", "relative-json-pointer", "regex"}
# llguidance would allow February 29 of any year, the year 0 and a second 60 of any minute.
YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
FOURTH = "0[48]|[2468][048]|[13579][26]"  # 04 to 96 in fours
LEAP_YEAR = f"(?:[0-9]{{2}}(?:{FOURTH})|(?:{FOURTH})00)"
DATE = (f"(?:{YEAR}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)"
        f"|(?:0[13578]|1[02])-31)|{LEAP_YEAR}-02-29)")
HOUR_AND_MINUTE = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
TIME = f"{HOUR_AND_MINUTE}:[0-5][0-9](?:\\.[0-9]{{1,9}})?(?:[Zz]|[+-]{HOUR_AND_MINUTE})"
EXACT = {"date": f"^{DATE}$", "time": f"^{TIME}$", "date-time": f"^{DATE}[Tt]{TIME}$"}
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
MAX_MULTIPLE = 5000  # of multipleOf: llguidance counts remainders, and no limit of its own ends it
MAX_VISITS = 20_000  # of schemas, while looking for an end of a recursion


def lark_of_schema(schema: dict | bool) -> str:
    """A JSON Schema as a grammar. Raises ValueError where no answer could be told to fit it."""
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError("a JSON Schema is an object")
    try:
        if not has_an_end(schema, schema, [], [0]):
            raise ValueError("nothing that ends fits it: it asks for itself again and again")
        schema = {**exactly(schema), "x-guidance": ON_ONE_LINE}
        text = json.dumps(schema, allow_nan=False)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    steps = re.findall(r'"multipleOf": ([0-9.e+-]+)', text)
    if math.lcm(*map(whole_number, steps)) > MAX_MULTIPLE:
        raise ValueError(f"multipleOf {' and '.join(steps)[:100]}: the least common multiple may "
                         f"be at most {MAX_MULTIPLE}, without the point")
    return f"start: %json {text}"


def whole_number(text: str) -> int:
    """The digits of a decimal number: 25 for 0.25, and 200 for 200."""
    number = Decimal(text)
    return abs(int(number.scaleb(max(0, -number.normalize().as_tuple().exponent))))


def exactly(schema: dict | bool) -> dict | bool:
    """The same schema, so that llguidance obeys all that it says. Raises ValueError naming what
    cannot be obeyed, beside what llguidance refuses itself."""
    if not isinstance(schema, dict):
        return schema
    found = {name: value for name, value in schema.items() if name not in ANNOTATIONS}
    for name in BY_NAME:
        if isinstance(schema.get(name), dict):
            exact_name = exact_pattern if name == "patternProperties" else str
            found[name] = {exact_name(key): exactly(value) for key, value in schema[name].items()}
    for name in VALUES:
        if name in schema:
            found[name] = exactly(schema[name])
    for name in LISTS:
        if isinstance(schema.get(name), list):
            found[name] = [exactly(value) for value in schema[name]]
    check_numbers([schema.get("const"), schema.get("enum")])
    for name in BOUNDS & schema.keys():
        found[name] = exact_bound(name, schema[name])
    if isinstance(schema.get("pattern"), str):
        found["pattern"] = exact_pattern(schema["pattern"])
    # Names of properties that are not listed may come twice, and count as one then.
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if isinstance(least, int) and isinstance(required, list) and least > max(1, len(required)):
        raise ValueError(f"minProperties {least}: at most the number of required properties can "
                         "be promised, or 1")
    kind = schema.get("format")
    if kind in EXACT:
        found["allOf"] = [*found.get("allOf", []), {"pattern": EXACT[kind]}]
    if isinstance(kind, str) and (kind in EXACT or kind not in FORMATS):
        del found["format"]
    return found


def check_numbers(value) -> None:
    """Raises ValueError for a number in a value that llguidance, which has float64, would round."""
    if isinstance(value, (int, float)) and abs(value) > 2**53:
        raise ValueError(f"{str(value)[:40]} is above 2**53; greater numbers are not exact")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(
            value, list) else ():
        check_numbers(inner)


def exact_bound(name: str, bound):
    """A bound in the range in which float64 has all integers, llguidance's range for numbers."""
    if not isinstance(bound, (int, float)):
        return bound
    return min(bound, 2**53) if name.endswith("aximum") else max(bound, -2**53)


def exact_pattern(pattern: str) -> str:
    """A pattern without the character U+0000 in its negated classes. llguidance takes a class that
    holds all control characters for one that holds a quote and a backslash, too."""
    return re.sub(r"\\x00-|\\u0000-|\\.|\[\^(?!\])", lambda match: {
        "[^": r"[^\x00", r"\x00-": r"\x01-", r"\u0000-": r"\x01-"}.get(match[0], match[0]),
        pattern, flags=re.DOTALL)


def has_an_end(schema, root: dict, open_refs: list[str], visits: list[int]) -> bool:
    """Whether some value fits a schema as far as its recursion goes: whether it gets anywhere
    without the references that are followed already, open_refs. visits counts them; when there are
    many, it is taken to have one."""
    visits[0] += 1
    if not isinstance(schema, dict) or visits[0] > MAX_VISITS:
        return True

    def ends(inner) -> bool:
        return has_an_end(inner, root, open_refs, visits)

    ref = schema.get("$ref")
    if isinstance(ref, str):
        if ref in open_refs:
            return False
        if not has_an_end(pointed_at(root, ref), root, [*open_refs, ref], visits):
            return False
    for name, enough in (("allOf", all), ("anyOf", any), ("oneOf", any)):
        inner = schema.get(name)
        if isinstance(inner, list) and inner and not enough(ends(one) for one in inner):
            return False
    if schema.get("type") == "object":
        properties, required = schema.get("properties"), schema.get("required")
        if isinstance(properties, dict) and isinstance(required, list):
            return all(ends(properties[name]) for name in required
                       if isinstance(name, str) and name in properties)
    if schema.get("type") == "array" and schema.get("minItems"):
        return ends(schema.get("items"))
    return True


def pointed_at(root: dict, ref: str):
    """What a JSON pointer ("#/$defs/name") leads to in a schema; None where nothing is there."""
    if ref in ("#", "#/"):
        return root
    found = root
    for part in ref.removeprefix("#/").split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        found = found.get(part) if isinstance(found, dict) else None
    return found
