"""The programs as people start them: on a pseudo-terminal, typed at as a person would, and with
standard streams that are closed, full or read no more."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from formats.config import config_from_hf
from formats.session import read_session
from helpers import TINY, run
from quantize import empty_model, stored_shapes
from tokenizer import Tokenizer

pexpect = pytest.importorskip("pexpect")
pytestmark = pytest.mark.slow
# What the model of `parrot` says for ever: a character of one token, one of three and one of four.
SAYING = " Caf\u00e9, \u65e5 and\U0001f642."
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }} A:"
            "{% else %}{{ m.content }} {% endif %}{% endfor %}")
ROOT = TINY.parent.parent
# One thread: two wait for each other long where other programs keep the cores busy.
PLAIN = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
for name in ("PYTHONUNBUFFERED", "NO_COLOR", "FORCE_COLOR"):
    PLAIN.pop(name, None)


def on_terminal(program, *argv, columns=80, **env):
    child = pexpect.spawn(sys.executable, [program, "--device", "cpu", *map(str, argv)], cwd=ROOT,
                          env={**PLAIN, **env}, encoding="utf-8", timeout=60,
                          dimensions=(24, columns))
    child.logfile_read = io.StringIO()  # everything it ever writes
    return child


def spawn(*argv, **env):
    """chat.py, greedy, with its prompt on the screen."""
    child = on_terminal("chat.py", "--temperature", "0", "--checkpoint", TINY, *argv,
                        **{"TERM": "dumb", **env})
    child.expect_exact("/reset")
    child.expect_exact("\n> ")
    return child


def leave(child):
    """The exit status and the last words, after Ctrl-D. No escape sequence was among all words, and
    no warning."""
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert not re.search(r"\x1b|[Ww]arning", child.logfile_read.getvalue())
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
    shapes = stored_shapes(empty_model(config_from_hf(raw)))
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
    child = spawn("--checkpoint", folder, "--max-new-tokens", 8, "--window", 20, "--json",
                  TERM="xterm-256color", NO_COLOR="1")

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


# ------------------------------------------------------------------------------ progress


def test_on_a_narrow_terminal_progress_is_one_line_and_results_are_whole(prompts):
    child = on_terminal("batch.py", "--prompts", prompts, "--max-new-tokens", 40, columns=20,
                        TERM="xterm-256color")
    child.expect(pexpect.EOF)
    child.close()
    lines = child.before.split("\r\n")
    assert child.exitstatus == 0 and "\x1b" not in child.before
    shown = [line.split("\r")[-1] for line in lines]
    assert sorted(json.loads(line)["index"] for line in shown if line[:1] == "{") == [0, 1]
    moving = [part for line in lines for part in line.split("\r")[1:] if part[:1] != "{"]
    assert moving and all(len(part) <= 20 for part in moving)


# ------------------------------------------------------------------------------ broken streams


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text('{"prompt": "One"}\n{"prompt": "Two"}\n')
    return path


SHORT = "--device cpu --seed 1 --max-new-tokens 5"
COMMANDS = {
    "nowhere": "quantize.py --checkpoint {tiny} --quantize int8 --out {out} <&- >&- 2>&-",
    "full": f"generate.py --compile {SHORT} > /dev/full",
    "full_help": "generate.py --help > /dev/full",
    "full_stderr": f"batch.py --prompts {{prompts}} {SHORT} 2> /dev/full",
    "unread": f"generate.py {SHORT} | true",
    "no_stdout": f"batch.py --prompts {{prompts}} {SHORT} >&-",
    "chat_no_stdout": f"chat.py --checkpoint {{tiny}} {SHORT} < {{turns}} >&-",
    "chat_no_stdin": f"chat.py --checkpoint {{tiny}} {SHORT} <&-"}
if not os.path.exists("/dev/full"):  # a device of Linux
    COMMANDS = {name: command for name, command in COMMANDS.items() if "full" not in name}
on_linux = pytest.mark.skipif("full" not in COMMANDS, reason="no /dev/full")


@pytest.fixture(scope="module")
def ends(prompts, tmp_path_factory):
    """{name: (exit status, stdout, lines of stderr, the folder that it may have made)}."""
    folder = tmp_path_factory.mktemp("ends")
    (folder / "turns").write_text("Who are you?\n")

    def end(name):
        out, status = folder / name, folder / f"{name}.status"
        command, *into = COMMANDS[name].format(
            tiny=TINY, out=out, prompts=prompts, turns=folder / "turns").split("|")
        script = " | ".join((f"( {sys.executable} {command}; echo $? > {status} )", *into))
        done = subprocess.run(["sh", "-c", script], cwd=ROOT, env=PLAIN, capture_output=True,
                              text=True, timeout=600)
        return int(status.read_text()), done.stdout, done.stderr.splitlines(), out

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(COMMANDS, pool.map(end, COMMANDS)))


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_said_twice_or_by_others(ends, name):
    """No warning of a library or of the compiler, nothing of Python's own at its end."""
    lines = ends[name][2]
    assert len(set(lines)) == len(lines)
    assert not re.search("Traceback|Exception|[Ww]arning", "\n".join(lines))


def test_with_every_stream_closed_the_work_is_done_and_whole(ends, tmp_path):
    status, out, err, made = ends["nowhere"]
    assert (status, out, err) == (0, "", [])
    run("quantize", "--checkpoint", TINY, "--quantize", "int8", "--out", tmp_path / "made")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}


@on_linux
def test_a_full_stdout_is_one_line(ends):
    line = "generate.py: error: stdout: No space left on device"
    status, _, err, _ = ends["full"]
    assert status == 2 and [said.split()[0] for said in err[:-1]] == [
        "loading", "compiling:", "graph", "It"]
    assert err[-1] == line
    assert ends["full_help"][0] == 2 and ends["full_help"][2] == [line]


@on_linux
def test_a_full_stderr_costs_no_result(ends):
    status, out, _, _ = ends["full_stderr"]
    assert status == 0 and [json.loads(line)["index"] for line in out.splitlines()] == [0, 1]


def test_a_stdout_that_nobody_reads_ends_the_run_quietly(ends):
    status, _, err, _ = ends["unread"]
    assert status == 1 and [line.split()[0] for line in err] == ["loading", "It"]


def test_a_closed_stdout_is_done_without(ends):
    status, out, err, _ = ends["no_stdout"]
    assert (status, out) == (0, "") and err[-1].startswith("2 of 2 prompts, 10 new tokens")
    status, out, err, _ = ends["chat_no_stdout"]
    assert (status, out) == (0, "") and err[-1].startswith("1 turns, ")


def test_a_closed_stdin_ends_a_conversation_as_ctrl_d_does(ends):
    status, out, err, _ = ends["chat_no_stdin"]
    assert (status, out) == (0, "") and [line.split()[0] for line in err] == ["loading"]
