"""Install the clients that people use, run them against a server, and print what works as a table.

    python tests/clients/run.py --checkpoint smollm2
    python tests/clients/run.py --only openai_python litellm_python --keep path/to/environments

Each client has an environment of its own, in a temporary folder (or in --keep, to run again). The
network is needed for the packages only.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Script: the packages that it needs, of which the first one's version is shown.
CLIENTS = {
    "openai_python": ["openai", "pydantic"], "openai_node": ["openai", "zod"],
    "ai_sdk_node": ["ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod"],
    "litellm_python": ["litellm"], "langchain_python": ["langchain-openai"],
    "llama_index_python": ["llama-index-llms-openai-like"],
    "pydantic_ai_python": ["pydantic-ai-slim[openai]"], "instructor_python": ["instructor"],
    "llm_python": ["llm"], "smolagents_python": ["smolagents[openai]"],
    "autogen_python": ["autogen-agentchat", "autogen-ext[openai]"],
    "openai_agents_python": ["openai-agents"], "guidellm_python": ["guidellm"],
    "lm_eval_python": ["lm_eval[api]", "transformers", "sentencepiece", "protobuf"]}


def install(script, folder):
    """Install a script's client. Returns its command, and the version."""
    packages, home = CLIENTS[script], folder / script
    if script.endswith("_node"):
        home.mkdir(exist_ok=True)
        if not (home / "node_modules").exists():
            subprocess.run(["npm", "init", "-y"], cwd=home, check=True, capture_output=True)
            subprocess.run(["npm", "install", "--silent", *packages], cwd=home, check=True)
        for name in (f"{script}.mjs", "checks.mjs"):
            (home / name).write_text((HERE / name).read_text())
        version = json.loads((home / "node_modules" / packages[0] / "package.json").read_text())
        return ["node", str(home / f"{script}.mjs")], version["version"]
    python = home / "bin" / "python"
    if not python.exists():
        uv = folder / "uv" / "bin" / "uv"  # much faster than pip
        if not uv.exists():
            subprocess.run([sys.executable, "-m", "venv", folder / "uv"], check=True)
            subprocess.run([folder / "uv" / "bin" / "pip", "install", "-q", "uv"], check=True)
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, home], check=True)
        subprocess.run([uv, "pip", "install", "-q", "--python", python, *packages], check=True)
    name = packages[0].partition("[")[0]
    version = subprocess.run([python, "-c", "import importlib.metadata, sys; "
                              f"print(importlib.metadata.version({name!r}))"],
                             capture_output=True, text=True, check=True).stdout.strip()
    return [str(python), str(HERE / f"{script}.py")], version


def start_server(checkpoint):
    """A server on a free port. Returns its process and base URL."""
    process = subprocess.Popen([sys.executable, "-m", "server", "--checkpoint", checkpoint,
                                "--port", "0"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.search(r"(http://\S+) serves", line):
            return process, f"{found[1]}/v1"
    raise SystemExit("the server did not start")


def tokenizer_folder(path):
    """The folder whose tokenizer clients may read, where they count tokens themselves."""
    kept = ROOT / "checkpoints" / "smollm2-135m-instruct"
    return path.resolve() if path.exists() else kept


def run(command, environment):
    """The checks that a script made: a list of {"check", "how", "why"}."""
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=900)
    checks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        checks.append({"check": "the script", "how": "broken", "why": last[:300]})
    return checks


def row(script, version, checks):
    def named(how):
        return ", ".join(one["check"] for one in checks if one["how"] == how) or "-"

    name = script.removesuffix("_python").replace("_node", " (npm)").replace("_", " ")
    return f"| {name} | {version} | {named('works')} | {named('refused')} | {named('broken')} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", default="smollm2", help="what the server runs")
    parser.add_argument("--url", help="a server that runs already (its /v1), and no other")
    parser.add_argument("--only", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--keep", metavar="DIR", help="a folder for the clients' environments")
    args = parser.parse_args()
    folder = Path(args.keep or tempfile.mkdtemp(prefix="clients-"))
    folder.mkdir(exist_ok=True)
    process, url = (None, args.url) if args.url else start_server(args.checkpoint)
    path = Path(args.checkpoint)
    model = path.name if path.exists() else args.checkpoint
    environment = {"BASE_URL": url, "MODEL": model, "TASKS": str(HERE.parent / "tasks"),
                   "TOKENIZER": str(tokenizer_folder(path)), "OPENAI_API_KEY": "none",
                   "HF_HUB_OFFLINE": "1"}
    lines, whys = [], []
    try:
        for script in args.only:
            command, version = install(script, folder)
            checks = run(command, environment)
            lines.append(row(script, version, checks))
            whys += [f"- {script}, {one['check']}: {one['how']}: {one['why']}" for one in checks
                     if one["why"]]
            print(lines[-1], flush=True)
    finally:
        if process:
            process.terminate()
    print("\n| client | version | works | refused | broken |\n| --- | --- | --- | --- | --- |")
    print("\n".join(lines), "\n".join(whys), sep="\n\n")


if __name__ == "__main__":
    main()
