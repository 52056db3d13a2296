"""The walls of the house: what imports what, and what the bare command needs."""

import ast
import importlib.metadata
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from helpers import TINY

ROOT = TINY.parent.parent
# A file imports only what stands before it. The engine ends where the command line begins.
ORDER = ["tp", "kv_cache", "linear", "attention", "model", "tokenizer", "sample", "convert_hf",
         "quantize", "gguf_tokenizer", "convert_gguf", "published", "hub", "load", "speculate",
         "session", "cli", "generate", "chat", "batch", "eval", "gptq"]


def imported(path):
    """The first names of what a file imports at its top level."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", ORDER)
def test_no_import_runs_back_up(name):
    later = {*ORDER[ORDER.index(name):], "bench", "examples", "server"}
    assert not imported(ROOT / f"{name}.py") & later


def test_every_file_at_the_root_has_its_place():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(ORDER) and len(ORDER) <= 22


@pytest.mark.parametrize("folder, most", [("bench", 280), ("server", 280), ("examples", 100)])
def test_files_of_folders_are_short(folder, most):
    for path in ROOT.glob(f"{folder}/*.py"):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(lines) < most, path


def closure(*names):
    """These distributions and all that they require."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.mark.slow
def test_the_bare_command_needs_four_packages():
    """Every other package that is installed here is hidden from it."""
    needed = closure("torch", "sentencepiece", "safetensors", "numpy")
    hidden = [name for name, owners in importlib.metadata.packages_distributions().items()
              if not {owner.lower().replace("_", "-") for owner in owners} & needed]
    assert {"tokenizers", "tqdm", "transformers"} <= set(hidden)
    script = ("import runpy, sys\n"
              "for name in sys.argv.pop(1).split(','): sys.modules[name] = None\n"
              "sys.argv[0] = 'generate.py'; runpy.run_path('generate.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", script, ",".join(hidden), "--max-new-tokens", "5",
                           "--device", "cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "5 new tokens" in done.stderr, done.stderr
