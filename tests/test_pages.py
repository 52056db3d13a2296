"""What pages and docstrings mention exists: links and headings, files, commands and their flags."""

import ast
import re
import shlex

import pytest

from helpers import ROOT
from test_help import PROGRAMS, parsers, parsers_of  # noqa: F401  (a fixture)
from test_readme import PAGES

PAGES = [*PAGES, ROOT / "checkpoints" / "tiny" / "README.md"]
ids = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=ids)
FILES = [path for path in sorted(ROOT.glob("**/*.py"))
         if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
# Programs whose --help is not held to test_help's rules, and those that take no flags or need what
# the tests do without.
MORE = ["bench.gpu_first", "checkpoints.tiny.train", "clients.run", "stress.gemma",
        "stress.templates", "stress.vocabularies"]
UNREAD = {"pytest", "cuda_case", "stress.ray_replicas", "tokenizers.export", "export"}
# Flags of other people's programs.
OTHERS = {"--nproc", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint",
          "--interrupt_requests", "--help", "--model_args"}
FOLDERS = "docs|tests|server|bench|examples|formats"


@pytest.fixture(scope="module")
def all_parsers(parsers):  # noqa: F811
    pytest.importorskip("transformers")  # stress.templates compares with it
    return parsers | parsers_of(MORE)


def anchors(page):
    """The ids that a page's headings get on GitHub."""
    headings = re.findall(r"^#+ (.+)$", without_fences(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_fences(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code(text):
    """Every code span, and every line of a code block (indented by four, or fenced)."""
    fences = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks = [inside for kind, inside in fences if kind not in ("diff", "text", "json")]
    spans = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", without_fences(text))
    lines = re.findall(r"^ {4}(\S.*)$", without_fences(text), re.MULTILINE)
    return [*(" ".join(span.split()) for span in spans), *lines,
            *(line for block in blocks for line in block.splitlines())]


def commands(text):
    """(program as test_help names it, its arguments) of each of our commands in a page. What shows
    several ways to call one, as [--flag], is none."""
    text = re.sub(r" \\\n\s*", " ", text)
    for line in code(text):
        for part in re.split(r" && |(?<= )# | \| ", line.removeprefix("$ ").removeprefix("> ")):
            part = part.partition(" < ")[0]
            if part.startswith(("python ", "torchrun ")) and not re.search(
                    r"\.\.\.|--help|\[-|\w\|", part):
                words = shlex.split(part, comments=True)
                n = next((n for n, word in enumerate(words) if is_program(words, n)), None)
                assert n, f"no program in: {part}"
                yield module_name(words[n]), words[n + 1:]


def module_name(word):
    name = word.removesuffix(".py").replace("/", ".").removeprefix("tests.")
    return f"{name}.__main__" if f"{name}.__main__" in PROGRAMS else name


def is_program(words, n):
    return (module_name(words[n]) in {*PROGRAMS, *MORE, *UNREAD}
            and (words[n].endswith(".py") or n > 0 and words[n - 1] == "-m"))


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@every_page
def test_files_that_are_named_exist(page):
    ours = {path.name for path in ROOT.glob("**/*.py")} | {path.name for path in ROOT.glob("*")}
    for span in code(page.read_text()):
        for name in re.findall(r"(?<![\w/.\-])(?:[\w.\-]+/)*[\w\-]+\.(?:py|html|yaml)\b", span):
            assert (ROOT / name).exists() or "/" not in name and name in ours, name
        for name in re.findall(rf"(?<![\w/.\-])(?:{FOLDERS})/[\w./\-]*", span):
            assert (ROOT / name).exists(), name


@every_page
def test_commands_are_understood(page, all_parsers):
    parse_commands(page.read_text(), all_parsers)


def parse_commands(text, all_parsers):
    for program, argv in commands(text):
        if program not in UNREAD:
            all_parsers[program].parse_args(argv)


@every_page
def test_no_two_commands_of_a_page_write_one_folder(page, all_parsers):
    """The second would refuse to: a folder is written once."""
    found = [str(all_parsers[program].parse_args(argv).out)
             for program, argv in commands(page.read_text())
             if program in ("quantize", "gptq", "convert_hf")]
    assert len(found) == len(set(found)), found


def test_commands_in_docstrings_are_understood(all_parsers):
    """--help shows some of these docstrings, and a reader of a file copies from it."""
    for path in FILES:
        parse_commands(ast.get_docstring(ast.parse(path.read_text())) or "", all_parsers)


@every_page
def test_flags_in_the_text_are_those_of_a_program(page, all_parsers):
    known = {flag for parser in all_parsers.values() for flag in parser._option_string_actions}
    for span in code(page.read_text()):
        if not span.startswith(("pip ", "ruff ", "serve ", "CMAKE", "apt ")):
            for flag in re.findall(r"(?<![\w\-])--[a-z][\w\-]*", span):
                assert flag in known | OTHERS, f"{flag} in: {span}"


def test_what_is_not_there_is_found(tmp_path, all_parsers):
    page = tmp_path / "page.md"
    for text, test, needs in (("[a](no.md)", test_links_lead_somewhere, ()),
                              ("[a](#no)", test_links_lead_somewhere, ()),
                              ("`nothing.py`", test_files_that_are_named_exist, ()),
                              ("`tests/nothing`", test_files_that_are_named_exist, ()),
                              ("`--no-such-flag`",
                               test_flags_in_the_text_are_those_of_a_program, (all_parsers,))):
        page.write_text(text)
        with pytest.raises(AssertionError):
            test(page, *needs)
    convert = "    python convert_hf.py a b\n"
    page.write_text(2 * convert)
    with pytest.raises(AssertionError):
        test_no_two_commands_of_a_page_write_one_folder(page, all_parsers)
    for command, found in (("generate.py --no-such-flag 3", SystemExit),
                           ("generate.py    a story", SystemExit),
                           ("-m bench.dule", AssertionError), ("generat.py", AssertionError)):
        with pytest.raises(found):
            parse_commands(f"    python {command}\n", all_parsers)
