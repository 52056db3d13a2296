"""The walls of the house: what imports what, and what the bare command needs."""

import ast
import importlib.metadata
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from helpers import TINY

ROOT = TINY.parent.parent
# There is one order of files: each imports only earlier ones, at its top and inside its functions.
ORDER = ["tp", "threads", "kv_cache", "linear", "layers", "attention", "model", "formats.files",
         "formats.tokenizer_config", "formats.chat_template", "formats.added_tokens",
         "formats.tokenizer_model", "formats.tokenizer_json", "tokenizer", "grammar",
         "formats.tool_calls", "formats.tools", "sample", "draw", "terminal", "cli",
         "formats.rope", "formats.config", "quantize", "formats.checkpoint", "formats.published",
         "formats.folder",
         "formats.gguf_file", "formats.gguf_tokenizer", "formats.gguf", "formats.adapters",
         "formats.hub", "load", "speculate", "formats.session", "generate", "chat", "streams",
         "batch", "evaluation.harness", "eval", "convert_hf", "gptq"]
FOLDERS = ("bench", "examples", "server", "tests")  # which the engine never imports
# Its command quantizes what later files read: the one exception.
EXCEPTION = ("quantize", "main")


def imported(name):
    """(function, module) of everything that a file of ours imports, wherever in it; the function is
    None at its top."""
    path = ROOT / (name.replace(".", "/") + ".py")
    found = []

    def walk(node, function):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((function, alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                found.extend((function, n if n in ORDER else child.module) for n in names)
            inside = function or getattr(child, "name", None)
            walk(child, inside if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else
                 function)

    walk(ast.parse(path.read_text()), None)
    return found


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_earlier_ones(name):
    later = ORDER[ORDER.index(name):]
    for function, module in imported(name):
        if (name, function) != EXCEPTION:
            assert module not in later and module.split(".")[0] not in FOLDERS, (function, module)


def test_every_file_has_its_place():
    there = [path.stem for path in ROOT.glob("*.py")]
    there += [f"{folder}.{path.stem}" for folder in ("formats", "evaluation")
              for path in (ROOT / folder).glob("[a-z]*.py")]
    assert sorted(there) == sorted(ORDER) and len([n for n in ORDER if "." not in n]) <= 23


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
def test_the_bare_command_needs_four_packages_and_no_compiler():
    """Every other package that is installed here is hidden from it. PyTorch's compiler takes as
    long to import as all the rest of PyTorch."""
    needed = closure("torch", "sentencepiece", "safetensors", "numpy")
    hidden = [name for name, owners in importlib.metadata.packages_distributions().items()
              if not {owner.lower().replace("_", "-") for owner in owners} & needed]
    assert {"tokenizers", "tqdm", "transformers"} <= set(hidden)
    script = ("import runpy, sys\n"
              "for name in sys.argv.pop(1).split(','): sys.modules[name] = None\n"
              "sys.argv[0] = 'generate.py'; runpy.run_path('generate.py', run_name='__main__')\n"
              "assert 'torch._dynamo' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", script, ",".join(hidden), "--max-new-tokens", "5",
                           "--device", "cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "5 new tokens" in done.stderr, done.stderr
