"""The graphs for a GPU that tests/test_cuda_graphs.py leaves out, for a person to run.

    python -m pytest tests/stress/cuda_graphs.py
"""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
from test_cuda_graphs import check_graph, facts_of  # noqa: E402


@pytest.mark.parametrize("kind, rows, tokens, kernels, library_calls, copies", [
    ("int4", 1, 1, 14, 4, 0),  # PyTorch's int4 kernel
    ("bf16", 8, 1, 11, 4, 0), ("int8", 8, 1, 14, 0, 0), ("int4", 8, 1, 12, 4, 0),
    ("bf16", 1, 6, 12, 7, 0), ("int8", 1, 6, 14, 7, 4),  # whose weights are copied
    ("bf16", 1, 128, 12, 7, 0),
    ("int4", 1, 128, 16, 7, 4)])  # which are dequantized
def test_graph(kind, rows, tokens, kernels, library_calls, copies):
    check_graph(kind, rows, tokens, kernels, library_calls, copies)


@pytest.mark.parametrize("kind, rows, steps", [("fp32", 2, [16, 1, 1, 5] * 3),
                                               ("int8", 1, [1] * 9), ("mixed", 1, [1] * 10)])
def test_kernels_compute_what_the_cpu_does(kind, rows, steps):
    facts = facts_of(kind, rows, steps, interpret=True)[kind]
    assert facts["logits"] < 1e-4 and facts["cached"] < 1e-5
