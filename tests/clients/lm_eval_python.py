"""lm-evaluation-harness's `local-completions`, on the tasks in tests/tasks."""

import os
import subprocess
import sys

from checks import BASE, MODEL, check


def evaluate(task, batch_size=1, **options):
    given = {"model": MODEL, "base_url": f"{BASE}/completions", **options}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args",
         ",".join(f"{name}={value}" for name, value in given.items()), "--tasks", task,
         "--include_path", os.environ["TASKS"], "--batch_size", str(batch_size)],
        capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    return task in done.stdout


for tokens in ("remote", "huggingface"):
    options = dict(tokenizer_backend=tokens, tokenizer=os.environ["TOKENIZER"])
    check(f"multiple choice, {tokens} tokenizer", lambda options=options: evaluate(
        "gpt_stream_questions", batch_size=4, **options))
    check(f"rolling, {tokens} tokenizer", lambda options=options: evaluate(
        "gpt_stream_texts", num_concurrent=4, **options))
check("generate_until", lambda: evaluate("gpt_stream_endings", **options))
