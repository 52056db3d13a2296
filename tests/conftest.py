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
