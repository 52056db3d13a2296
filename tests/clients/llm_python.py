"""Simon Willison's `llm`, by its command."""

import os
import pathlib
import subprocess
import sys
import tempfile

from checks import BASE, MODEL, QUESTION, check

folder = pathlib.Path(tempfile.mkdtemp())
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: ours\n  model_name: {MODEL}\n  api_base: {BASE}\n  supports_schema: true\n"
    "  supports_tools: true\n")


def llm(*argv):
    done = subprocess.run([sys.executable, "-m", "llm", *argv], capture_output=True, text=True,
                          env={**os.environ, "LLM_USER_PATH": str(folder)})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip()


check("prompt", lambda: llm("-m", "ours", "-o", "max_tokens", "40", QUESTION))
check("without streaming", lambda: llm("-m", "ours", "--no-stream", "-o", "max_tokens", "40",
                                       QUESTION))
check("a schema", lambda: llm("-m", "ours", "--schema", "tame bool", QUESTION))
check("a tool", lambda: llm("-m", "ours", "-T", "llm_version", "-o", "max_tokens", "40", QUESTION))
