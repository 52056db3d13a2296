import gc
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
# A shell's background jobs begin with Ctrl-C ignored, and so would the programs tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # and under nohup with this one ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# `pytest -n 2` tests two files at a time, each on one thread: more would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
# Where triton is installed, every process that compiles would start others to compile GPU kernels.
os.environ.setdefault("TORCH_WARM_POOL", "0")
# The files that take most of the time, longest first.
LONGEST = [f"test_{name}" for name in (
    "compile", "ray", "tp", "speculate", "published", "server", "page", "examples", "cuda_graphs",
    "families", "quantize", "linear", "terminal", "released", "kv_cache", "harness", "engine",
    "fuzz", "hub", "errors")]
# What is skipped without a word is never run: in CI, a skip fails unless a GPU is what lacks.
NOTHING_IS_MISSING = os.environ.get("CI") == "true"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    return report if item.get_closest_marker("gpu") else fail_if_skipped(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return fail_if_skipped((yield))  # a whole file, by pytest.importorskip


def fail_if_skipped(report):
    if NOTHING_IS_MISSING and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {report.longrepr[2]}"
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Workers take whole files, since the tests of one share models and servers."""
    from xdist.scheduler import LoadFileScheduling
    config.option.loadscopereorder = False  # by number of tests, which says nothing of their time
    return LoadFileScheduling(config, log)


def pytest_collection_finish():
    """What the tests have imported is no garbage, and to look through it again and again takes
    longer than many a test."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that all workers end at about one time."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
