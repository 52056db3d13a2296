"""Every program's --help: what an option is, its real default, and examples that work."""

import argparse
import importlib
import re
import shlex
from collections import defaultdict

import pytest

from bench.__main__ import check
from bench.turns import turn_prompts
from cli import sampling_of
from generate import make_cache
from gptq import LENGTH
from helpers import TINY, random_model

ROOT = TINY.parent.parent
PROGRAMS = ["generate", "chat", "batch", "eval", "quantize", "gptq", "convert_hf",
            "formats.hub", "bench.__main__", "server.__main__", "server.measure", "server.soak",
            "bench.calls", "bench.duel", "bench.shift",
            *sorted(f"examples.{path.stem}" for path in ROOT.glob("examples/[a-z]*.py")),
            "stress.fuzz", "stress.kills", "stress.disks", "stress.endless",
            "stress.structured"]
# Options that are explained differently, each because it is another thing in one program.
OTHERWISE = {"--checkpoint": "quantize takes no .gguf", "--limit": "turns, or prompts",
             "--prompts": "all turns, or the first", "--sink": "several in eval",
             "--turns": "a file, or in server.measure a number",
             "--mode": "eval's, and an older name of quantize's --quantize",
             "--only": "a kind of damage, or a program",
             "--clients": "several runs in server.measure", "--speculate": "a measurement in bench",
             "--grammar": "a measurement in bench", "--rounds": "of --gpu in bench",
             "--max-new-tokens": "in the server, as many as may be asked for"}


class Parsed(BaseException):
    """Ends a program where it reads its command line."""


def parsers_of(names):
    """Programs' parsers by name, each taken out of its main."""
    def take(parser):
        raise Parsed(parser)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", take)
        for name in names:
            if name.startswith("server"):
                pytest.importorskip("fastapi")
                pytest.importorskip("uvicorn")
            with pytest.raises(Parsed) as parsed:
                importlib.import_module(name).main()
            found[name] = parsed.value.args[0]
    return found


@pytest.fixture(scope="module")
def parsers():
    return parsers_of(PROGRAMS)


def entries(parser):
    """{what the parser holds of an option or argument: what --help says of it}, --help left out."""
    found = re.findall(r"^  (\S.*(?:\n {4,}.*)*)", parser.format_help(), re.MULTILINE)
    said = {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in found}
    names = {action: (action.option_strings or [action.metavar])[0] for action in parser._actions}
    return {action: said[name] for action, name in names.items() if name != "-h"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_option_says_what_it_is_and_its_own_default(parsers, name):
    """In words where that is no value; what has to be given has none."""
    for action, said in entries(parsers[name]).items():
        _, found, default = said.partition("; default")
        assert action.help and bool(found) != action.required, said
        if action.required:
            continue
        if action.default is False:
            assert default == " off", said
        elif action.default in (None, [], ""):  # a number among the words: see the next test
            assert default == " none" or re.match(r": \S| \d", default), said
        else:
            values = action.default if isinstance(action.default, list) else [action.default]
            assert default.strip(' "') == " ".join(map(str, values)), said


def test_numbers_that_stand_in_words_are_the_real_ones(parsers, tmp_path):
    """Of options whose default the parser does not hold, so that it is known who gave them."""
    def numbers(name, option):
        [said] = [said for action, said in entries(parsers[name]).items()
                  if option in action.option_strings]
        return [int(word) for word in re.findall(r"\d+", said.partition("; default")[2])]

    sinks = make_cache(random_model()).n_sink
    for name in ("generate", "chat", "batch", "bench.__main__", "server.__main__"):
        assert numbers(name, "--sink") == [sinks]
    for name in ("generate", "chat", "batch"):
        needed = ["--prompts", "x"] if name == "batch" else []
        how = sampling_of(parsers[name].parse_args(needed), {})
        for option, value in (("--temperature", how.temperature), ("--top-p", how.top_p)):
            assert ".".join(map(str, numbers(name, option))) == str(value)
    bench = parsers["bench.__main__"]
    one, many = bench.parse_args([]), bench.parse_args(["--streams", "64"])
    check(one)
    check(many)
    assert numbers("bench.__main__", "--batch") == [one.batch, many.batch]
    assert numbers("bench.__main__", "--max-new-tokens") == [one.max_new_tokens]
    (tmp_path / "turns").write_text('{"prompt": "a"}\n' * 30)
    turns = turn_prompts(bench.parse_args(["--turns", str(tmp_path / "turns")]))
    assert numbers("bench.__main__", "--limit") == [len(turns)]
    assert numbers("gptq", "--length") == [LENGTH]


def test_an_option_of_several_programs_is_explained_once(parsers):
    explained = defaultdict(set)
    for parser in parsers.values():
        for action in parser._actions:
            for option in action.option_strings:
                explained[option].add(action.help.partition("; default")[0])
    assert {option for option, helps in explained.items() if len(helps) > 1} == set(OTHERWISE)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_examples_at_the_end_of_the_help_are_commands_that_work(parsers, name):
    parser = parsers[name]
    title, *lines = parser.format_help().partition("\nexamples:\n")[2].splitlines()
    assert title == "" and 1 <= len(lines) <= 4
    for line in lines:
        python, *argv = shlex.split(line, comments=True)
        program = " ".join(argv[:2] if argv[0] == "-m" else argv[:1])
        assert python == "python" and f"python {program}".endswith(parser.prog)
        assert program in (f"-m {name.removesuffix('.__main__')}", f"{name}.py",
                           f"tests/{name.replace('.', '/')}.py")
        parser.parse_args(argv[len(program.split()):])


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_fits_every_terminal_and_breaks_no_word(parsers, name, monkeypatch):
    helps = {}
    for columns in (40, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        helps[columns] = parsers[name].format_help()
        for line in helps[columns].partition("\nexamples:")[0].splitlines()[1:]:
            alone = len(line.split()) == 1 or re.match(r" +\[?-", line)
            assert len(line) <= min(columns, 100) or alone, line
    assert len({" ".join(text.split()) for text in helps.values()}) == 1
