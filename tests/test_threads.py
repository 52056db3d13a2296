"""How many threads steps run on, beside programs that come and go, on a simulated machine."""

import pytest
import torch

import threads
from generate import make_cache
from helpers import TINY, random_model
from load import compile_model, load
from threads import ThreadTuner


class Machine:
    """A simulated machine, some of whose cores other programs use. The threads share a step's work.
    A thread that shares its core with another program holds up all the others."""

    def __init__(self, cores, kind="decode"):
        self.cores, self.kind, self.threads = cores, kind, ThreadTuner(cores)
        self.now = 0.0

    def run(self, seconds, others):
        """Run steps for so many seconds; (steps a second in the last half, threads at the end)."""
        start, steps = self.now, 0
        while self.now < start + seconds:
            n = self.threads.now
            alone = n + others <= self.cores
            took = 0.02 / n * (1 if alone else 30 if n > 1 else 2)
            share = 1.0 if alone else 0.5
            self.threads.note(self.kind, took, share * took)
            self.now += took
            steps += self.now > start + seconds / 2
        return steps / (seconds / 2), self.threads.now


@pytest.mark.parametrize("cores", [2, 3, 16])
def test_an_idle_machine_tries_nothing(cores):
    machine = Machine(cores)
    tried = []
    machine.threads.start_trial = lambda n, kind: tried.append(n)
    assert machine.run(60, others=0) == (pytest.approx(50 * cores, rel=0.01), cores)
    assert not tried


def test_beside_two_busy_programs_one_thread_and_back():
    """One thread beside two programs makes 25 steps a second, and alone on its core 50. The number
    adapts twice within one stream."""
    machine = Machine(2)
    for _ in range(2):
        assert machine.run(10, others=0)[0] > 0.95 * 100
        assert machine.run(10, others=2)[0] > 0.85 * 25
        assert machine.run(10, others=1)[0] > 0.85 * 50  # one thread has a core of its own
    assert machine.run(10, others=0) == (pytest.approx(100, rel=0.02), 2)


def test_of_sixteen_cores_eight_stay_when_two_are_taken():
    machine = Machine(16)
    rate, _ = machine.run(20, others=2)
    assert rate > 0.85 * 8 * 50
    assert machine.run(20, others=0)[0] > 0.95 * 16 * 50


def test_steps_are_compared_with_their_own_kind():
    """A chunk of a prompt takes longer than a token with any number of threads. Cores that are free
    again are found even while the two kinds of steps take turns."""
    machine = Machine(2)
    assert machine.run(1, others=2)[1] == 1
    for _ in range(400):
        n = machine.threads.now
        machine.threads.note("chunk", 0.2 / n, 0.2 / n)
        machine.threads.note("decode", 0.02 / n, 0.02 / n)
    assert machine.threads.now == 2
    for _ in range(3):
        machine.threads.note("chunk", 9.0, 2.0)
    assert machine.threads.now == 1
    machine.threads.note("decode", 0.04, 0.04)  # faster than a chunk, which proves nothing
    assert machine.threads.trial


@pytest.fixture
def own_threads():
    """Restore the process's number of threads after a test."""
    most = torch.get_num_threads()
    yield
    threads.keep_threads()
    torch.set_num_threads(most)


def test_a_step_runs_on_what_was_found_and_the_users_own_number_counts(own_threads, monkeypatch):
    model, seen = random_model(), []
    step = model.step
    model.step = lambda *args: (seen.append(torch.get_num_threads()), step(*args))[1]
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    torch.set_num_threads(4)
    threads.adapt_threads()
    model(tokens)
    assert seen == [4] and threads.adaptive.most == 4
    monkeypatch.setattr(threads.adaptive, "now", 2)
    torch.set_num_threads(2)
    model(tokens)
    assert seen == [4, 2] and threads.adaptive.most == 4
    torch.set_num_threads(3)
    model(tokens)
    assert seen == [4, 2, 3] and threads.adaptive.most == 3
    monkeypatch.setattr(threads.adaptive, "now", 1)
    torch.set_num_threads(1)
    threads.keep_threads()
    assert torch.get_num_threads() == 3 and threads.adaptive is None


@pytest.mark.slow
def test_a_compiled_step_says_the_same_on_any_number_of_threads(own_threads):
    """This holds for a step that was compiled on few threads, and for more threads than it was
    compiled for. Inductor's own cpp.dynamic_threads (2.13) gives other results."""
    eager, _ = load(TINY, device="cpu", dtype=torch.float32)
    torch.set_num_threads(2)
    threads.adapt_threads()
    threads.adaptive.now = 1
    torch.set_num_threads(1)  # as if the tuner had chosen it
    model, _ = load(TINY, device="cpu", dtype=torch.float32, compile=True)
    for n in (1, 2, 4, 1):
        cache, plain = make_cache(model), make_cache(eager)
        for token in range(40, 60):
            torch.set_num_threads(n)
            tokens = torch.tensor([[token]])
            assert (model(tokens, cache) - eager(tokens, plain)).abs().max() < 1e-4


@pytest.mark.slow
def test_a_compiled_step_leaves_the_callers_threads_alone(own_threads):
    model, cache = random_model(), None
    torch.set_num_threads(2)
    compile_model(model)
    cache = make_cache(model, 4, 28)
    for n in (2, 4, 1):  # compiled for two
        torch.set_num_threads(n)
        model(torch.tensor([[7]]), cache)
        assert torch.get_num_threads() == n
