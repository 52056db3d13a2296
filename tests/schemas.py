"""Random JSON Schemas, for tests of structured output. Strings and arrays in them are bounded, so
that a model with random weights comes to an end."""

import json
import random

import jsonschema

from grammar import Grammar
from sample import Sampling
from streams import Prompt, generate_batch

WORDS = ["name", "Größe", "naïve", "数量", "a b", 'say "hi"', "back\\slash", "line\nbreak", "",
         "🎈"]
PATTERNS = ["^[a-z]{2,8}$", "^[A-Z][a-z]*[0-9]{1,3}$", "^é+x?$", "^#[0-9a-fA-F]{6}$", "^a|b$",
            "^(red|green|blue)(, (red|green|blue)){0,2}$", "^\\d{3}-\\d{4}$", "^[^\"]{0,3}$",
            "^[^\"\\\\aeiou]{1,6}$"]
FORMATS = ["date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "duration",
           "uri"]


def random_schema(seed: int) -> dict:
    """A schema with a few of the features below, whose $defs are referred to from within."""
    choose = random.Random(seed)
    schema = an_object(choose, 3)
    schema["$defs"] = {
        "word": {"type": "string", "enum": choose.sample(WORDS, 3)},
        "pair": {"type": "array", "prefixItems": [a_number(choose, 0), a_string(choose, 0)],
                 "items": False, "minItems": 2},
        "chain": {"type": "object", "additionalProperties": False, "required": ["n", "next"],
                  "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99},
                                 "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/chain"}]}}}}
    return schema


def any_schema(choose: random.Random, depth: int) -> dict:
    leaves = [a_string, a_pattern, a_format, a_number, a_range, a_multiple, an_enum, a_const,
              a_type]
    inner = [an_object, an_array, a_tuple, an_any_of, an_all_of, a_one_of, a_map, an_open_map,
             a_ref]
    return choose.choice(leaves if depth <= 0 else leaves + 2 * inner)(choose, depth)


def an_object(choose, depth):
    names = choose.sample(WORDS + ["id", "type", "$ref", "format", "enum"], choose.randint(1, 4))
    return {"type": "object", "title": "An object", "additionalProperties": False,
            "properties": {name: any_schema(choose, depth - 1) for name in names},
            "required": choose.sample(names, choose.randint(0, len(names)))}


def a_map(choose, depth):
    """Names that no list holds."""
    return {"type": "object", "maxProperties": choose.randint(1, 3), "additionalProperties": False,
            "patternProperties": {"^[a-z]{1,4}$": any_schema(choose, depth - 2)},
            "minProperties": choose.randint(0, 1)}


def an_open_map(choose, depth):
    """Any names, beside the listed ones."""
    listed = choose.sample(WORDS, choose.randint(0, 2))
    return {"type": "object", "additionalProperties": any_schema(choose, depth - 2),
            "properties": {name: a_number(choose, 0) for name in listed}, "required": listed,
            "maxProperties": len(listed) + 1}


def an_array(choose, depth):
    least = choose.randint(0, 2)
    return {"type": "array", "items": any_schema(choose, depth - 1), "minItems": least,
            "maxItems": least + choose.randint(0, 2)}


def a_tuple(choose, depth):
    items = [any_schema(choose, depth - 1) for _ in range(choose.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def an_any_of(choose, depth):
    return {"anyOf": [any_schema(choose, depth - 1) for _ in range(choose.randint(2, 3))]}


def a_one_of(choose, depth):
    return {"oneOf": [{"type": "object", "additionalProperties": False, "required": ["kind", "of"],
                       "properties": {"kind": {"const": kind}, "of": any_schema(choose, depth - 1)}}
                      for kind in ("this", "that")]}


def an_all_of(choose, depth):
    low = choose.randint(-50, 50)
    return {"allOf": [{"type": "integer"}, {"minimum": low}, {"maximum": low + 30}]}


def a_ref(choose, depth):
    return {"$ref": "#/$defs/" + choose.choice(["word", "pair", "chain"]), "description": "one"}


def a_string(choose, depth):
    least = choose.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + choose.randint(0, 9)}


def a_pattern(choose, depth):
    schema = {"type": "string", "pattern": choose.choice(PATTERNS)}
    return {**schema, "maxLength": 9}


def a_format(choose, depth):
    kind = choose.choice(FORMATS)
    unbounded = kind in ("email", "hostname", "duration", "uri")
    return {"type": "string", "format": kind, **({"maxLength": 20} if unbounded else {})}


def a_number(choose, depth):
    return {"type": choose.choice(["integer", "number"]), "format": "int32", "default": 0}


def a_range(choose, depth):
    low = choose.choice([choose.randint(-1000, 1000), round(choose.uniform(-9, 9), 2), -0.5, 1e-3])
    high = low + choose.choice([1, 7, 100.5])
    kind = choose.choice(["integer", "number"])
    names = choose.choice([("minimum", "maximum"), ("exclusiveMinimum", "maximum"),
                           ("minimum", "exclusiveMaximum")])
    return {"type": kind, names[0]: low, names[1]: high + 2}


def a_multiple(choose, depth):
    return {"type": "integer", "multipleOf": choose.choice([2, 3, 7, 10, 25]), "minimum": -500,
            "maximum": 5000}


def an_enum(choose, depth):
    values = [*WORDS, 0, -1.5, 1e15, 9007199254740991, True, None, ["a", {"b": 1}], {"é": []}]
    return {"enum": choose.sample(values, choose.randint(1, 4))}


def a_const(choose, depth):
    return {"const": choose.choice([*WORDS, 3.25, 0.1, -7, False, None, {"k": ["v", 1.0]}])}


def a_type(choose, depth):
    return {"type": choose.choice(["null", "boolean", ["boolean", "null"], ["integer", "null"]])}


def check_answers(model, tokenizer, seeds, max_new_tokens=1500):
    """Answer with a model at temperature 1.5, a random schema a seed. Returns how many ended by
    themselves; each of those parses and validates, as jsonschema reads its schema."""
    schemas = [random_schema(seed) for seed in seeds]
    prompts = [Prompt([1], Sampling(1.5, seed=seed, grammar=Grammar(
        tokenizer, model.config.vocab_size, schema=schema)), max_new_tokens)
        for seed, schema in zip(seeds, schemas, strict=True)]
    ids, ended = [[] for _ in seeds], 0
    for stream, token_id in generate_batch(model, prompts, 8, 4, 60):
        if token_id is not None:
            ids[stream.index].append(token_id)
        else:
            assert not stream.error, (seeds[stream.index], stream.error)
    for seed, schema, answer in zip(seeds, schemas, ids, strict=True):
        if answer[-1] not in model.config.eos_ids:
            continue
        text, ended = tokenizer.decode(answer[:-1]), ended + 1
        try:
            jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator,
                                format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        except ValueError as error:  # of JSON, or what jsonschema found
            raise AssertionError(f"seed {seed}: {text!r}: {error}") from None
        except jsonschema.ValidationError as error:
            raise AssertionError(f"seed {seed}: {text!r}: {error.message}") from None
    return ended
