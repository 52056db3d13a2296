"""chat.py in a real terminal: a process on a pseudo-terminal, typed at as a person would."""

import json
import os
import re
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file

from helpers import TINY
from model import ModelConfig
from quantize import empty_model, stored_shapes
from session import read_session
from tokenizer import Tokenizer

pexpect = pytest.importorskip("pexpect")
pytestmark = pytest.mark.slow
# What the model of `parrot` says for ever: a character of one token, one of three and one of four.
SAYING = " Caf\u00e9, \u65e5 and\U0001f642."
TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }} A:"
            "{% else %}{{ m.content }} {% endif %}{% endfor %}")


def spawn(*argv):
    """chat.py, greedy, with its prompt on the screen. One thread: two wait for each other long
    where other programs keep the cores busy."""
    env = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    child = pexpect.spawn(sys.executable, ["chat.py", "--device", "cpu", "--temperature", "0",
                                           "--checkpoint", str(TINY), *map(str, argv)],
                          cwd=TINY.parent.parent, env=env, encoding="utf-8", timeout=60)
    child.expect_exact("/reset")
    child.expect_exact("\n> ")
    return child


def leave(child):
    """The exit status and the last words, after Ctrl-D."""
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus, child.before


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """A conversation with a model that says SAYING over and over, a billion tokens an answer.

    Every token of it has a dimension of its own, which the output turns into the next token; the
    layer in between adds nothing."""
    folder = tmp_path_factory.mktemp("parrot")
    ids = Tokenizer(TINY).encode(SAYING, bos=False)
    colon = Tokenizer(TINY).encode("ASSISTANT:")[-1]
    assert len({colon, *ids}) == len(ids) + 1
    raw = json.loads((TINY / "config.json").read_text())
    raw.update(num_hidden_layers=1, hidden_size=64, intermediate_size=64, tie_word_embeddings=False)
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = stored_shapes(empty_model(ModelConfig.from_hf(raw)))
    weights = {name: torch.full(shape, float("norm" in name)) for name, shape in shapes.items()}
    for dimension, (token, following) in enumerate(zip([colon, *ids], [*ids, ids[0]])):
        weights["embed.weight"][token, dimension] = 1
        weights["output.weight"][following, dimension] = 1
    save_file(weights, folder / "model.safetensors")
    shutil.copy(TINY / "tokenizer.model", folder)
    child = spawn("--checkpoint", folder, "--max-new-tokens", 10**9)
    yield child
    assert leave(child)[0] == 0


def interrupt(child):
    """Stop an answer with Ctrl-C; the line of its figures, with the prompt back on the screen."""
    child.sendintr()
    child.expect(r"turn \d+: ([^\r\n]*)\r\n> ")
    return child.match[1]


def test_an_answer_streams_and_its_characters_are_whole(parrot):
    parrot.sendline("Speak!")
    parrot.expect_exact(SAYING)  # the answer is not over: it has a billion tokens
    assert "turn" not in parrot.before
    for _ in range(3):
        parrot.expect_exact(SAYING * 10)
        assert SAYING.startswith(parrot.before[len(SAYING):]) and "\ufffd" not in parrot.before
    interrupt(parrot)


def test_ctrl_c_ends_the_answer_and_not_the_conversation(parrot):
    for _ in range(2):
        parrot.sendline("Speak!")
        parrot.expect_exact(SAYING)
        assert "(interrupt)" in interrupt(parrot)


def test_ctrl_c_at_the_prompt_says_how_to_leave(parrot):
    for _ in range(2):
        parrot.sendintr()
        parrot.expect_exact("/quit or Ctrl-D leaves")
        parrot.expect_exact("\n> ")


def test_reset_begins_anew(parrot):
    def prompt_tokens(line):
        parrot.sendline(line)
        parrot.expect_exact(SAYING)
        return int(re.match(r"(\d+) prompt", interrupt(parrot))[1])

    def reset():
        parrot.sendline("/reset")
        parrot.expect_exact("/reset")
        parrot.expect_exact("\n> ")

    reset()
    tokenizer = Tokenizer(TINY)
    assert prompt_tokens("Hello there") == len(tokenizer.first_turn("Hello there"))
    assert prompt_tokens("Hello there") == len(tokenizer.next_turn("Hello there"))
    reset()
    assert prompt_tokens("Hello there") == len(tokenizer.first_turn("Hello there"))


def test_a_template_a_session_and_the_end_of_input(tmp_path):
    """The embedded model, with a chat template of its own, saved and taken back."""
    folder, session = shutil.copytree(TINY, tmp_path / "templated"), tmp_path / "s"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    child = spawn("--checkpoint", folder, "--max-new-tokens", 8, "--window", 20, "--json")

    def ask(text):
        child.sendline(text)
        child.expect(r'(\{"turn".*?\})\r\n')
        record = json.loads(child.match[1])
        child.expect_exact("\n> ")
        return record

    def command(line, answer):
        child.sendline(line)
        child.expect_exact(answer)
        child.expect_exact("\n> ")

    first = ask("Who are you?")
    assert first["prompt_tokens"] == len(Tokenizer(TINY).encode("Q Who are you? A:"))
    command(f"/save {session}", f"\nsaved {session}: ")
    then = ask("And your cat?")
    command(f"/load {session}-none", f"\n{session}-none: no such session file")
    assert ask("And your cat?")["evicted"] > then["evicted"] > 0
    command(f"/load {session}", f"\nloaded {session}: ")
    again = ask("And your cat?")
    assert (again["token_ids"], again["evicted"]) == (then["token_ids"], then["evicted"])
    status, last_words = leave(child)
    assert status == 0 and "4 turns, " in last_words and "new tokens, decode" in last_words


@pytest.mark.parametrize("way, status", [("SIGTERM at the prompt", 143),
                                         ("the terminal closes", 129)])
def test_what_was_said_is_saved_before_a_signal_ends_the_program(tmp_path, way, status):
    child = spawn("--max-new-tokens", 10**9, "--ignore-eos", "--save-session", tmp_path / "s")
    child.sendline("Who are you?")
    child.expect(r"(\w+\s+){9}")  # in the middle of the answer
    if "closes" in way:
        os.close(child.child_fd)
        _, ended = os.waitpid(child.pid, 0)
        assert os.waitstatus_to_exitcode(ended) == status
        child.closed, child.terminated = True, True
    else:
        interrupt(child)
        child.kill(signal.SIGTERM)
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == status and f"saved {tmp_path / 's'}: " in child.before
        assert "Traceback" not in child.before
    assert os.listdir(tmp_path) == ["s"]
    facts, _ = read_session(tmp_path / "s")
    assert facts["model"]["length"][0] > 20 and facts["last_id"] is not None
