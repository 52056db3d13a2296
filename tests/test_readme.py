"""Every block of Python in README and docs runs as it stands.

A block that needs a server says so behind its language: ```python server runs against the tests'
own. Blocks of one page run one after the other, as a reader would run them.
"""

import re

import pytest

from helpers import TINY

ROOT = TINY.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    """(line, what it needs, code) of each block of Python."""
    text = page.read_text()
    for found in re.finditer(r"^```python *([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start()) + 1, found[1].split(), found[2]


def test_all_fences_are_of_a_known_kind():
    known = re.compile(r"python( server)?|sh|json|text|diff")
    for page in PAGES:
        for fence in re.findall(r"^```(.+)$", page.read_text(), re.MULTILINE):
            assert known.fullmatch(fence), f"{page.name}: ```{fence}"


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    from test_server import Server
    running = Server()
    yield running
    running.process.kill()
    running.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, monkeypatch, capsys, request):
    monkeypatch.chdir(ROOT)
    names = {"__name__": "__main__"}
    for line, needs, code in blocks(page):
        if needs == ["server"]:  # the documented one is `python -m server`, with SmolLM2
            port = request.getfixturevalue("server").port
            code = code.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("smollm2", "tiny")
        exec(compile("\n" * line + code, str(page), "exec"), names)
    if page.name == "README.md":
        assert len(capsys.readouterr().out) > 20  # it tells a story
    if page.name == "server.md":
        assert names["client"].models.list().data[0].id == "tiny"
