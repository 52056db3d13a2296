"""The walls of the house: what imports what, and what the bare command needs."""

import ast
import importlib.metadata
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from helpers import TINY

ROOT = TINY.parent.parent
ENGINE = {"kv_cache", "linear", "model", "sample", "tp", "tokenizer", "quantize", "speculate",
          "convert_hf", "load"}
PROGRAMS = {path.stem for path in ROOT.glob("*.py")} - ENGINE


def imported(path, everywhere=True):
    """The first names of what a file imports: everywhere, or at its top level."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", sorted(ENGINE))
def test_the_engine_imports_no_program_and_no_command_line(name):
    assert not imported(ROOT / f"{name}.py", everywhere=False) & PROGRAMS


def test_nothing_imports_bench():
    for path in ROOT.glob("*.py"):
        assert "bench" not in imported(path), path


def test_files_at_the_root_are_few_and_those_of_bench_short():
    assert len(list(ROOT.glob("*.py"))) <= 22
    for path in ROOT.glob("bench/*.py"):
        assert len(path.read_text().splitlines()) < 250, path


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
