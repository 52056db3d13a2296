"""What PyTorch compiles for a GPU, read and computed without one (fake_cuda.py).

It needs the package triton beside PyTorch: a CUDA build brings it; with a CPU build, `pip install
triton` and a C++ compiler. It reaches into PyTorch, and was tried with 2.13 only. More
cases: tests/stress/cuda_graphs.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs pip install triton")
TRIED = "2.13."
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not torch.__version__.startswith(TRIED), reason=f"not tried with PyTorch {torch.__version__}")]


def facts_of(kinds, rows, tokens, interpret=False):
    """The facts that cuda_case.py finds, by kind."""
    env = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
    case = subprocess.run([sys.executable, Path(__file__).parent / "cuda_case.py", kinds, str(rows),
                           ",".join(map(str, tokens))], capture_output=True, text=True, env=env)
    assert case.returncode == 0, case.stderr[-3000:]
    return json.loads(case.stdout.splitlines()[-1])


def check_graph(kinds, rows, tokens, kernels, library_calls=0, copies=0):
    """A whole CUDA graph, of which only the tokens are no fixed addresses; in a layer at most so
    many kernels, so many calls of a library, and no copy of a weight."""
    found = facts_of(kinds, rows, [tokens])
    assert list(found) == kinds.split(",")
    for facts in found.values():
        assert not facts["skips"] and not facts["skipped"]
        assert facts["inputs"] - facts["static"] == 1 + (tokens > 8)  # the index of the last one
        assert facts["kernels"] <= kernels and facts["library_calls"] <= library_calls
        assert facts["copies_of_weights"] == copies


def test_a_token_is_one_graph_of_inductors_own_kernels():
    check_graph("bf16,int8", 1, 1, kernels=15)


@pytest.mark.parametrize("kind, rows, steps", [("fp32", 1, [1] * 9), ("int8", 3, [1, 1])])
def test_the_kernels_compute_what_the_cpu_does_and_write_it_to_the_cache(kind, rows, steps):
    facts = facts_of(kind, rows, steps, interpret=True)[kind]
    assert facts["logits"] < 1e-4 < 1 < facts["largest"]
    assert facts["cached"] < 1e-5 and facts["length"] == [sum(steps)] * rows
    assert facts["slots"] > 0 and facts["unused"] == 0
    assert facts["graphs"] == len(set(steps)) and not facts["skips"]
