"""Whoever holds a model: loading and stepping leave the caller's process as it was."""

import json
import subprocess
import sys

import pytest

from helpers import TINY

SCRIPT = """
import gc, json, logging, os, signal, sys, threading, time, warnings
import torch
import torch._inductor.config  # which compiling would import
from torch._dynamo import config as dynamo

def state():
    gc.collect()
    handlers = {kind.name: str(signal.getsignal(kind)) for kind in signal.valid_signals()
                if isinstance(kind, signal.Signals)}
    return dict(
        threads=torch.get_num_threads(), interop=torch.get_num_interop_threads(),
        running=sorted(t.name for t in threading.enumerate()  # but for those of PyTorch's compiler
                       if not t.name.startswith(("tqdm_monitor", "ThreadPoolExecutor"))),
        signals=handlers, filters=[str(f) for f in warnings.filters],
        files=sorted(os.readlink(f"/dev/fd/{n}") for n in (0, 1, 2)),
        streams=[str(type(s)) for s in (sys.stdin, sys.stdout, sys.stderr)],
        umask=os.umask(0o022), folder=os.getcwd(),
        environment={k: v for k, v in os.environ.items() if not k.startswith("_TORCHINDUCTOR")},
        logging=[logging.root.level, len(logging.root.handlers),
                 len(logging.getLogger("gpt_stream").handlers)],
        grad=torch.is_grad_enabled(), dtype=str(torch.get_default_dtype()),
        device=str(torch.get_default_device()), seed=torch.initial_seed(),
        random=torch.random.get_rng_state().tolist()[:40],
        deterministic=torch.are_deterministic_algorithms_enabled(),
        precision=torch.get_float32_matmul_precision(),
        dynamo=settings(dynamo), inductor=settings(torch._inductor.config))

def settings(config):
    # A copied set may have another order.
    return {name: str(sorted(map(str, value)) if isinstance(value, (set, frozenset)) else value)
            for name, value in config.get_config_copy().items()}

os.umask(0o022)
torch.set_num_threads(2)
compile = sys.argv[1] == "compile"
torch.zeros(1).sum()
from generate import generate, load, make_cache
before = state()
model, tokenizer = load("checkpoints/tiny-draft", compile=compile, device="cpu")
loaded = state()
cache = make_cache(model)
list(generate(model, cache, tokenizer.encode("Hello"), 12, temperature=0.5, seed=1))
torch.set_num_threads(3)  # more than it was compiled for
list(generate(model, cache, [7], 12, temperature=0.5, seed=1))
assert torch.get_num_threads() == 3
torch.set_num_threads(2)
for _ in range(40):  # threads of PyTorch's compiler change its settings for as long as they run
    if (after := state()) == before:
        break
    time.sleep(0.25)
def changes(old, new):
    if old == new:
        return None
    if isinstance(old, dict):
        return {key: changes(old.get(key), new.get(key)) for key in {*old, *new}
                if old.get(key) != new.get(key)}
    return [old, new]

print(json.dumps({f"{when} {name}": changes(before[name], now[name]) for when, now in
                  (("loaded", loaded), ("stepped", after)) for name in before
                  if now[name] != before[name]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "compile"])
def test_load_and_generate_change_nothing_of_the_callers_process(how):
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True,
                          cwd=TINY.parent.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
