"""What a user can get wrong: one line that names it, exit status 2, no traceback."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from cli import make_parser
from helpers import TINY, run
from load import check_device
from terminal import hold_interrupt, user_errors

ROOT = TINY.parent.parent
DOC = "What it is.\n\n    python x.py"


def refused(program, *argv, naming, **kwargs):
    status, out, err = run(program, *argv, **kwargs)
    last = err.strip().splitlines()[-1]
    assert status == 2, err
    assert out == "" and "Traceback" not in err
    assert last.startswith((f"{program}.py: error: ", f"python -m {program}: error: "))
    for name in naming:
        assert str(name) in last, last
    return last


@pytest.mark.parametrize("flag, value", [
    ("--window", "-1"), ("--window", "0"), ("--window", "many"), ("--sink", "-1"),
    ("--top-k", "-5"), ("--top-k", "0"), ("--temperature", "-0.1"), ("--temperature", "nan"),
    ("--temperature", "inf"), ("--top-p", "1.01"), ("--top-p", "-0.1"), ("--top-p", "nan"),
    ("--min-p", "1.01"), ("--min-p", "nan"), ("--repetition-penalty", "0"), ("--samples", "0"),
    ("--max-new-tokens", "-1"), ("--max-new-tokens", "0"), ("--max-new-tokens", "1.5"),
    ("--top-k", "9" * 400), ("--top-p", "9" * 400), ("--seed", "-1"), ("--dtype", "int7"),
    ("--dtype", "float64")])
def test_numbers_out_of_range(flag, value):
    refused("generate", f"{flag}={value}", naming=[flag, value[:300]])


@pytest.mark.parametrize("argv, naming", [
    (["--device", "tpu"], ["tpu"]), (["--device", "cuda:77"], ["cuda:77"]),
    (["--device", "meta"], ["meta"]), (["--window", "253"], ["253", "257", "256"]),
    (["--sink", "256"], ["256"]), (["--sink", "300", "--window", "5"], ["305", "256"]),
    (["--prompt", ""], ["--prompt", "empty"]), (["--stop", ""], ["--stop", "empty"]),
    (["--prompt", b"caf\xe9".decode("utf-8", "surrogateescape")], ["--prompt", "UTF-8"]),
    (["--checkpoint", "/no/such/folder"], ["/no/such/folder"])])
def test_arguments(argv, naming):
    refused("generate", *argv, naming=naming)


@pytest.fixture
def broken(tmp_path):
    """A copy of the embedded checkpoint, to break."""
    return shutil.copytree(TINY, tmp_path / "broken")


def test_an_empty_folder(tmp_path):
    refused("generate", "--checkpoint", tmp_path, naming=[tmp_path, "config.json"])


def test_a_file_instead_of_a_folder():
    refused("generate", "--checkpoint", __file__, naming=[__file__])


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "{}", b"\xff\xfe", '{"architectures": 5}'])
def test_a_broken_config(broken, content):
    path = broken / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("generate", "--checkpoint", broken, naming=[path])


@pytest.mark.parametrize("file, key, value, naming", [
    ("config.json", "num_hidden_layers", 2**40, "65536"),
    ("config.json", "num_hidden_layers", 60_000, "the weights have 5 layers"),
    ("config.json", "num_hidden_layers", 4, "the weights have 5 layers"),
    ("config.json", "eos_token_id", "2", "'2'"), ("config.json", "eos_token_id", [[]], "[]"),
    ("generation_config.json", "eos_token_id", [2, -1], "-1"),
    ("config.json", "rms_norm_eps", "1e-5", "'1e-5'"),
    ("config.json", "gpt_stream", {"quantization": {"mode": "int4", "group_size": 32.0}}, "32.0"),
    ("config.json", "gpt_stream", {"quantization": {"layers": {"layers.0.attention.qkv": 5}}},
     "5")])
def test_a_value_that_cannot_be(broken, file, key, value, naming):
    content = json.loads((broken / file).read_text()) if (broken / file).exists() else {}
    (broken / file).write_text(json.dumps({**content, key: value}))
    said = refused("generate", "--checkpoint", broken, naming=[naming])
    assert f"{broken / file}: {key} is" in said or key == "gpt_stream"


def test_lists_in_lists_without_end(broken):
    (broken / "config.json").write_text("[" * 100_000)
    refused("generate", "--checkpoint", broken, naming=[broken / "config.json"])


def test_a_long_line_is_cut(broken):
    weights = load_file(broken / "model.safetensors")
    save_file({**weights, "x" * 100_000: torch.ones(1)}, broken / "model.safetensors")
    assert len(refused("generate", "--checkpoint", broken, naming=["tensor xxx", "..."])) < 700


def test_tensors_of_another_type(broken):
    weights = load_file(broken / "model.safetensors")
    save_file({**weights, "norm.weight": torch.ones(256, dtype=torch.int32)},
              broken / "model.safetensors")
    refused("generate", "--checkpoint", broken, naming=["norm.weight", "int32", "float32"])


def test_an_unknown_architecture(broken):
    (broken / "config.json").write_text('{"architectures": ["FalconForCausalLM"]}')
    refused("generate", "--checkpoint", broken, naming=["FalconForCausalLM", "LlamaForCausalLM"])


def test_no_weights(broken):
    (broken / "model.safetensors").unlink()
    refused("generate", "--checkpoint", broken, naming=[broken, "model.safetensors"])


@pytest.mark.parametrize("kept", [0, 5, 200, 100_000])
def test_truncated_weights(broken, kept):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused("generate", "--checkpoint", broken, naming=[path])


@pytest.mark.parametrize("change, naming", [
    (lambda w: w.pop("norm.weight"), ["norm.weight", "missing"]),
    (lambda w: w.update({"layers.0.extra": torch.ones(2)}), ["layers.0.extra"]),
    (lambda w: w.update({"norm.weight": torch.ones(7)}), ["norm.weight", "(7,)", "(256,)"])])
def test_tensors_that_do_not_fit(broken, change, naming):
    weights = load_file(broken / "model.safetensors")
    change(weights)
    save_file(weights, broken / "model.safetensors")
    refused("generate", "--checkpoint", broken, naming=naming)


@pytest.mark.parametrize("outside", [
    "../model.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_that_points_outside(broken, outside):
    index = broken / "model.safetensors.index.json"
    (broken / "model.safetensors").unlink()  # which counts more than an index
    index.write_text(json.dumps({"weight_map": {"norm.weight": outside}}))
    refused("generate", "--checkpoint", broken, naming=[index, outside])


@pytest.mark.parametrize("content", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[1"])
def test_a_broken_index(broken, content):
    index = broken / "model.safetensors.index.json"
    (broken / "model.safetensors").unlink()
    index.write_text(content)
    refused("generate", "--checkpoint", broken, naming=[index])


def test_an_index_that_names_a_missing_file(broken):
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    refused("generate", "--checkpoint", broken, naming=["b.safetensors", "missing"])


def test_a_pickle_with_code_in_it_is_not_run(broken, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (broken / "model.safetensors").unlink()
    torch.save({"norm.weight": Evil()}, broken / "pytorch_model.bin")
    refused("generate", "--checkpoint", broken, naming=[broken / "pytorch_model.bin"])
    assert not (tmp_path / "ran").exists()


def test_no_tokenizer(broken):
    (broken / "tokenizer.model").unlink()
    refused("generate", "--checkpoint", broken, naming=[broken, "tokenizer.model"])


@pytest.mark.parametrize("name, content", [
    ("tokenizer.model", "nonsense"), ("tokenizer_config.json", "{"),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"chat_template": [{"name": "tool_use", "template": "x"}]}'),
    ("tokenizer_config.json", '{"chat_template": [5]}'), ("chat_template.jinja", b"\xff"),
    ("added_tokens.json", "5")])
def test_a_broken_tokenizer(broken, name, content):
    (broken / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("generate", "--checkpoint", broken, naming=[broken / name])


@pytest.mark.parametrize("content", [
    '{"<a>": "q"}', '{"<a>": null}', '{"<a>": -1}', '{"a": 1e999}'])
def test_added_tokens_without_numbers(broken, content):
    (broken / "added_tokens.json").write_text(content)
    refused("generate", "--checkpoint", broken, naming=[broken, "added tokens"])


def test_a_vocabulary_that_lacks_what_its_tokenizer_needs(broken):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    made.save(str(broken / "tokenizer.json"))
    (broken / "tokenizer.model").unlink()
    refused("generate", "--checkpoint", broken, naming=["tokenizer.json", "[UNK]"])


def test_a_missing_optional_package(broken, monkeypatch):
    (broken / "tokenizer.model").unlink()
    (broken / "tokenizer.json").write_text("{}")
    refused("generate", "--checkpoint", broken, naming=[broken / "tokenizer.json"])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused("generate", "--checkpoint", broken, naming=["pip install tokenizers"])


@pytest.mark.parametrize("content, naming", [
    (b'{"prompt": "a"}\n{"prompt": \n', ["line 2"]), (b'{"prompt": "a"}\n\n[]\n', ["line 3"]),
    (b'{"turns": []}\n', ["line 1"]), (b'{"turns": ["a", 5]}\n', ["line 1"]),
    (b'{"prompt": ""}\n', ["line 1", "empty"]), (b'{"prompt": "caf\xe9"}\n', ["line 1", "UTF-8"]),
    (b'{"prompt": "\\ud800"}\n', ["line 1", "UTF-8"]), (b"", ["no prompts"]), (b"5\n", ["line 1"]),
    (b'{"turns": "hey"}\n', ["line 1"])])
def test_a_broken_prompts_file(tmp_path, content, naming):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    refused("chat", "--prompts", path, naming=[path, *naming])


@pytest.mark.parametrize("argv, naming", [
    (["--prompts", "/no/such.jsonl"], ["/no/such.jsonl"]), (["--limit", "0"], ["--limit", "0"]),
    (["--pin-system", "Be kind.", "--sink", "4"], ["--pin-system", "--sink"]),
    (["--pin-system", ""], ["--pin-system", "empty"]),
    (["--pin-system", "very long " * 200], ["sinks", "256"]), (["--limit", "3"], ["--prompts"])])
def test_chat_arguments(argv, naming):
    refused("chat", *argv, naming=naming)


def test_pinning_needs_turns(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"prompt": "The cat"}\n')
    refused("chat", "--prompts", tmp_path / "raw.jsonl", "--pin-system", "Be kind.",
            naming=["--pin-system"])


@pytest.mark.parametrize("program, argv, naming", [
    ("eval", ["--text", "/no/such.txt"], ["/no/such.txt"]),
    ("eval", ["--text", __file__, "--checkpoint", "/no/such"], ["/no/such"]),
    ("bench", ["--checkpoint", "/no/such"], ["/no/such"]),
    ("bench", ["--peer", "transformers"], ["--peer", "--shape"])])
def test_the_measuring_programs(program, argv, naming):
    refused(program, *argv, naming=naming)


def test_a_text_that_is_none(tmp_path):
    for name, content in (("a.txt", b"\xff\xfe"), ("a.txt.xz", b"no xz"), ("b.txt", b"")):
        (tmp_path / name).write_bytes(content)
        refused("eval", "--text", tmp_path / name, naming=[tmp_path / name])


@pytest.mark.slow
def test_a_real_process_says_one_line_and_exits_2():
    done = subprocess.run([sys.executable, "generate.py", "--checkpoint", "/no/such"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "generate.py: error: /no/such: no such checkpoint folder"


@pytest.mark.slow
def test_development_mode_shows_where_an_error_comes_from():
    done = subprocess.run([sys.executable, "-X", "dev", "generate.py", "--checkpoint", "/no/such"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "hub.py" in done.stderr


def test_what_the_engine_logs_is_said_once(capsys):
    with user_errors(make_parser(DOC)):
        for accepted in (3, 3, 4):
            logging.getLogger("gpt_stream").info("speculation stopped: %s of 32", accepted)
        for _ in range(2):  # an error is said each time
            logging.getLogger("gpt_stream").error("the engine failed")
    logging.getLogger("gpt_stream").info("nobody listens any more")
    assert capsys.readouterr().err == (
        "speculation stopped: 3 of 32\nspeculation stopped: 4 of 32\n" + 2 * "the engine failed\n")


@pytest.mark.parametrize("number", [getattr(signal, name) for name in ("SIGTERM", "SIGHUP")
                                    if hasattr(signal, name)])
def test_a_signal_ends_the_program_once_and_what_it_does_last_is_done(number):
    steps = []
    with pytest.raises(SystemExit) as end, user_errors(make_parser(DOC)):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGTERM)  # a second one does not interrupt cleaning up
            steps.append("cleaned")
    assert end.value.code == 128 + number and steps == ["cleaned"]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_an_error_after_a_signal_is_told_and_the_signal_ends_the_program(capsys):
    with pytest.raises(SystemExit) as end, user_errors(make_parser(DOC)):
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit:  # as C code does that calls Python
            raise TypeError("it has no shape") from None
    assert end.value.code == 143 and capsys.readouterr().err == "x.py: error: it has no shape\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_ignored_stays_so(number):
    """As nohup leaves SIGHUP, and a shell SIGINT for what runs in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with user_errors(make_parser(DOC)):
            signal.raise_signal(number)
            with hold_interrupt() as caught:
                signal.raise_signal(number)
            assert not caught
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_outside_of_a_program_only_ctrl_c_is_held():
    with hold_interrupt() as caught:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.raise_signal(signal.SIGINT)
    with hold_interrupt() as later:
        pass
    assert caught == [signal.SIGINT] and not later


def test_what_is_held_ends_the_program_later():
    steps = []
    with pytest.raises(SystemExit) as end, user_errors(make_parser(DOC)):
        with hold_interrupt() as caught:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            steps.append(list(caught))
        steps.append("said")
    assert end.value.code == 143 and steps == [[signal.SIGTERM] * 2, "said"]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("program, argv", [
    ("generate", ["--max-new-tokens", "5"]),
    ("eval", ["--text", "README.md", "--max-tokens", "50"])])  # which leaves it to Python to write
def test_a_full_disk_behind_the_output_is_one_line(program, argv):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, f"{program}.py", "--device", "cpu", *argv], cwd=ROOT,
                              stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"{program}.py: error: stdout: No space left on device"


def test_a_plot_that_cannot_be_written_is_known_before_anything_is_measured(tmp_path):
    argv = ("--text", __file__, "--max-tokens", 9)
    refused("eval", *argv, "--plot", tmp_path / "none" / "a.png", naming=["a.png", "no folder"])
    refused("eval", *argv, "--plot", tmp_path, naming=[tmp_path, "not a file"])
    for name in ("curve", "curve.txt"):
        refused("eval", *argv, "--plot", tmp_path / name, naming=[name, ".png"])


@pytest.mark.slow
def test_advice_on_faster_but_other_numbers_is_not_passed_on(monkeypatch):
    """What PyTorch says on a GPU that could compute float32 in fewer bits; no flag of ours does."""
    from torch._inductor.compile_fx import _warn_tf32_disabled
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    with pytest.warns(UserWarning, match="TensorFloat32"):
        _warn_tf32_disabled.__wrapped__()
    with warnings.catch_warnings(record=True) as passed_on, \
            user_errors(make_parser("What it is.\n\n    python x.py")):
        warnings.warn("something else", stacklevel=1)
        _warn_tf32_disabled.__wrapped__()
    assert [str(warning.message) for warning in passed_on] == ["something else"]


def test_a_cuda_build_without_a_gpu_warns_of_nothing(monkeypatch, caplog):
    from torch.utils.cpp_extension import _find_cuda_home
    monkeypatch.setenv("CUDA_HOME", "/usr")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.NOTSET)
    _find_cuda_home()
    assert "No CUDA runtime is found" in caplog.text
    caplog.clear()
    with user_errors(make_parser(DOC)):
        _find_cuda_home()
    assert not caplog.text


@pytest.mark.slow
def test_a_compiler_that_fails_is_a_line_that_says_what_may_help(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing is compiled there
    argv = ["--checkpoint", TINY.parent / "tiny-draft", "--device", "cpu", "--compile"]
    with torch._inductor.config.patch({"cpp.cxx": (None, "false")}):
        last = refused("generate", *argv, naming=["C++ compiler", "leaving --compile out may help"])
    assert "--device cpu" not in last


def test_a_gpu_that_fails_is_a_line_that_says_what_may_help(monkeypatch):
    """Of what PyTorch raises there: a driver, a kernel, the compiler, memory."""
    from torch._dynamo.exc import TorchDynamoException
    compiler = TorchDynamoException("PassManager::run failed\nMore")
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
    driver = RuntimeError("CUDA error: no kernel image is available\nMore")
    for found, error in ((True, driver), (True, compiler), (True, memory), (False, driver)):
        def fail(*args, error=error):
            raise error

        monkeypatch.setattr("generate.prefill", fail)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda found=found: found)
        message = str(error).splitlines()[0]
        refused("generate", naming=[message, "--device cpu, or leaving --compile out, may help"])
    monkeypatch.setattr("generate.prefill", lambda *args: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError):  # a fault of the program's, without a GPU, is shown whole
        run("generate")


@pytest.mark.slow
def test_bytes_that_are_not_utf8_on_the_command_line():
    done = subprocess.run([sys.executable, "generate.py", "--prompt", b"caf\xe9"], cwd=ROOT,
                          capture_output=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(b"--prompt is not UTF-8 text")


def test_cuda_without_a_number_is_the_present_gpu_and_stays_it(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, device in (("cuda", "cuda:1"), ("cuda:0", "cuda:0"), (None, "cuda:1")):
        assert check_device(name) == torch.device(device)
    assert not chosen


@pytest.mark.parametrize("name, flags, missing", [
    ("vocabularies", (), "ggml-vocab-*.gguf"), ("templates", (), "templates"),
    ("gemma", ("--text", "x", "--parts"), "gemma3_270m*.whl")])
def test_a_check_of_a_folder_without_what_it_checks_does_not_pass(tmp_path, name, flags, missing):
    pytest.importorskip("transformers")
    status, out, err = run(f"stress.{name}", *flags, tmp_path)
    last = err.splitlines()[-1]
    assert status == 2 and out == "" and str(tmp_path) in last and missing in last


# ------------------------------------------------------------------------------ convert_hf


def test_converting_refuses_a_folder_with_something_in_it(tmp_path):
    (tmp_path / "kept").write_text("x")
    refused("convert_hf", TINY, tmp_path, naming=[tmp_path])
    assert os.listdir(tmp_path) == ["kept"]


def test_a_failed_conversion_leaves_nothing(broken, tmp_path):
    weights = load_file(broken / "model.safetensors")
    weights.pop("layers.4.ffn_norm.weight")
    save_file(weights, broken / "model.safetensors")
    refused("convert_hf", broken, tmp_path / "out", naming=["layers.4.ffn_norm.weight"])
    assert os.listdir(tmp_path) == ["broken"]


def test_more_rows_than_memory(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}')
    refused("batch", "--prompts", tmp_path / "p.jsonl", "--batch", 10**9, naming=["memory"])
