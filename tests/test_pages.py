"""What the pages mention exists: links and their headings, files, commands and their flags."""

import re
import shlex

import pytest

from helpers import ROOT
from test_help import PROGRAMS, parsers  # noqa: F401  (a fixture)
from test_readme import PAGES

PAGES = [*PAGES, ROOT / "checkpoints" / "tiny" / "README.md"]
ids = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=ids)
# Flags of other people's programs, and of scripts that are not among test_help's.
OTHERS = {"--nproc", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint",
          "--interrupt_requests", "--help", "--valid", "--model_args", "--parts"}
FOLDERS = "docs|tests|server|bench|examples|formats"


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
    """(program as test_help names it, its arguments) of each of our commands in a page."""
    text = re.sub(r" \\\n\s*", " ", text)
    for line in code(text):
        for part in re.split(r" && |(?<= )# | \| ", line.removeprefix("$ ").removeprefix("> ")):
            if not part.startswith(("python ", "torchrun ")) or "..." in part or "--help" in part:
                continue
            words = shlex.split(part.partition(" < ")[0], comments=True)
            found = [n for n in range(len(words)) if module_of(words, n)]
            if found:
                yield module_of(words, found[0]), words[found[0] + 1:]


def module_of(words, n):
    """The program that a word names, if it is one of ours."""
    name = words[n].removesuffix(".py").replace("/", ".").removeprefix("tests.")
    if n and words[n - 1] == "-m" and f"{name}.__main__" in PROGRAMS:
        return f"{name}.__main__"
    return name if name in PROGRAMS and (words[n].endswith(".py") or words[n - 1] == "-m") else None


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
def test_commands_are_understood(page, parsers):  # noqa: F811
    for program, argv in commands(page.read_text()):
        parsers[program].parse_args(argv)


@every_page
def test_flags_in_the_text_are_those_of_a_program(page, parsers):  # noqa: F811
    known = {flag for parser in parsers.values() for flag in parser._option_string_actions}
    for span in code(page.read_text()):
        if not span.startswith(("pip ", "ruff ", "serve ", "CMAKE", "apt ")):
            for flag in re.findall(r"(?<![\w\-])--[a-z][\w\-]*", span):
                assert flag in known | OTHERS, f"{flag} in: {span}"


def test_what_is_not_there_is_found(tmp_path, parsers):  # noqa: F811
    page = tmp_path / "page.md"
    for text, test, needs in (("[a](no.md)", test_links_lead_somewhere, ()),
                              ("[a](#no)", test_links_lead_somewhere, ()),
                              ("`nothing.py`", test_files_that_are_named_exist, ()),
                              ("`tests/nothing`", test_files_that_are_named_exist, ()),
                              ("`--no-such-flag`",
                               test_flags_in_the_text_are_those_of_a_program, (parsers,))):
        page.write_text(text)
        with pytest.raises(AssertionError):
            test(page, *needs)
    page.write_text("    python generate.py --no-such-flag 3\n")
    with pytest.raises(SystemExit):
        test_commands_are_understood(page, parsers)
