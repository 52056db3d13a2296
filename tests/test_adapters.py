"""LoRA adapters: logits with them merged in equal peft's, in float32."""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import tp_worker
from convert_hf import convert
from generate import load, make_cache
from helpers import ONE_THREAD, TINY, TORCHRUN, hf_model, run
from quantize import asked_quantization
from test_errors import refused

pytest.importorskip("transformers")
pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

pytestmark = pytest.mark.slow

TOKENS = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(0))
SIZES = dict(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             initializer_range=0.2, eos_token_id=None)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "two": dict(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]),
    "all": dict(r=8, lora_alpha=16, target_modules=[*ALL, "lm_head"]),
    "rslora": dict(r=16, lora_alpha=6, use_rslora=True, target_modules=ALL),
    "patterns": dict(r=4, lora_alpha=8, target_modules=ALL,
                     rank_pattern={"k_proj": 2, "layers.1.mlp.up_proj": 6, r".*\.0\.mlp.*": 3},
                     alpha_pattern={"^model.layers.0.self_attn.q_proj": 1, r".*own_proj": 64,
                                    "up_proj": 5}),
    "all patterns": dict(r=4, lora_alpha=8, use_rslora=True, target_modules=[*ALL, "lm_head"],
                         rank_pattern={"lm_head": 9, "q_proj": 2}, alpha_pattern={
                             "lm_head": 1, "layers.0.self_attn.q_proj": 32, "q_proj": 3}),
    "keys": dict(r=2, lora_alpha=64, target_modules=["k_proj"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model, and an adapter of each kind as peft saves it."""
    folder = tmp_path_factory.mktemp("adapters")
    hf_model("Llama", **SIZES).save_pretrained(folder / "base")
    shutil.copy(TINY / "tokenizer.model", folder / "base")
    for name, settings in KINDS.items():
        adapted(folder, name, **settings)
    return folder


def adapted(folder, name, **settings):
    model = get_peft_model(base(folder), LoraConfig(**settings))
    torch.manual_seed(len(name))
    for weight_name, weight in model.named_parameters():
        if "lora_" in weight_name:
            weight.data.normal_(std=0.1)
    model.save_pretrained(folder / name)  # with a copy of lm_head where that has LoRA
    return folder / name


def base(folder):
    from transformers import LlamaForCausalLM
    return LlamaForCausalLM.from_pretrained(folder / "base", attn_implementation="eager").eval()


def merged(folder, *names):
    """peft's model, with one adapter after the other merged in."""
    model = base(folder)
    for name in names:
        model = PeftModel.from_pretrained(model, folder / name).merge_and_unload()
    return model.requires_grad_(False)


def logits(checkpoint, *adapters, **options):
    model, _ = load(checkpoint, device="cpu", dtype=torch.float32, adapters=adapters, **options)
    with torch.no_grad():
        return model(TOKENS, make_cache(model, batch_size=2))


@pytest.mark.parametrize("names", [["two"], ["all"], ["rslora"], ["patterns"], ["two", "all"],
                                   ["all patterns"], ["keys", "patterns", "rslora"]])
def test_merged_logits_equal_peft_s(names, made, tmp_path):
    expected = merged(made, *names)(TOKENS).logits
    ours = logits(made / "base", *[made / name for name in names])
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (ours - logits(made / "base")).abs().max() > 1
    convert(made / "base", tmp_path / "ours")  # where q, k and v are one tensor
    assert torch.equal(logits(tmp_path / "ours", *[made / name for name in names]), ours)


HEAD = "base_model.model.lm_head"


def rewrite(adapter, change):
    """Change an adapter's tensors."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    return adapter


@pytest.mark.parametrize("modules", [["lm_head"], ["norm"], ["embed_tokens", "lm_head"],
                                     ["k_proj"]])
def test_a_copy_of_the_model_s_own_weights_is_taken_and_another_refused(modules, made, tmp_path):
    """As modules_to_save writes it, and LoRA of lm_head by default."""
    adapter = adapted(made, f"saved-{'-'.join(modules)}", r=4, target_modules=["q_proj"],
                      modules_to_save=modules)
    saved = [name for name in load_file(adapter / "adapter_model.safetensors")
             if name.endswith(f"{modules[-1]}.weight")]
    assert saved
    expected = merged(made, adapter.name)(TOKENS).logits
    convert(made / "base", tmp_path / "ours")
    for base_folder in (made / "base", tmp_path / "ours"):
        ours = logits(base_folder, adapter)
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    changed = rewrite(shutil.copytree(adapter, tmp_path / "changed"),
                      lambda tensors: tensors[saved[0]].view(-1)[-1:].add_(0.01))
    refused("generate", "--checkpoint", made / "base", "--adapter", changed,
            naming=[changed, saved[0], "differs from the model's"])
    without = rewrite(shutil.copytree(adapter, tmp_path / "without"),
                      lambda tensors: [tensors.pop(name) for name in list(tensors)
                                       if "lora" not in name])
    refused("generate", "--checkpoint", made / "base", "--adapter", without,
            naming=[without, "modules_to_save"])


def test_lora_of_the_output_is_saved_with_a_copy_of_it(made, tmp_path):
    """By default. One in the dtype that it was trained in is the model's rounded, not another."""
    copied = load_file(made / "all" / "adapter_model.safetensors")[f"{HEAD}.base_layer.weight"]
    assert copied.shape == (4096, 64)
    rounded = rewrite(shutil.copytree(made / "all", tmp_path / "rounded"), lambda tensors: (
        tensors.update({f"{HEAD}.base_layer.weight": copied.bfloat16()})))
    assert torch.equal(logits(made / "base", rounded), logits(made / "base", made / "all"))
    larger = rewrite(shutil.copytree(made / "all", tmp_path / "larger"), lambda tensors: (
        tensors.update({f"{HEAD}.base_layer.weight": torch.cat([copied, copied[:8]])})))
    refused("generate", "--checkpoint", made / "base", "--adapter", larger,
            naming=[larger, f"{HEAD}.base_layer.weight", "differs"])


def test_lora_of_a_tied_output_leaves_the_embedding_as_it_is(made, tmp_path):
    """As where peft runs it. (Merged by peft, it changes the embedding, too.)"""
    from transformers import LlamaForCausalLM
    shutil.copytree(made / "base", tmp_path / "base")
    hf_model("Llama", **SIZES, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    adapter = adapted(tmp_path, "tied", r=4, target_modules=["q_proj", "lm_head"])
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, adapter)(TOKENS).logits
    convert(tmp_path / "base", tmp_path / "ours")
    for folder in (tmp_path / "base", tmp_path / "ours"):
        ours = logits(folder, adapter)
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (ours - logits(tmp_path / "base")).abs().max() > 1


def test_lora_of_the_embedding_is_refused_by_name(made):
    adapter = adapted(made, "embedding", r=4, target_modules=["q_proj", "embed_tokens"])
    refused("generate", "--checkpoint", made / "base", "--adapter", adapter,
            naming=[adapter, "embed_tokens.lora_embedding_A"])


@pytest.mark.parametrize("settings, naming", [
    (dict(use_dora=True), "use_dora"), (dict(bias="all"), "bias 'all'"),
    (dict(bias="lora_only"), "bias 'lora_only'")])
def test_what_peft_itself_saves_and_is_no_plain_lora_is_refused_by_name(settings, naming, made):
    adapter = adapted(made, naming.replace(" ", ""), r=4, target_modules=["q_proj"], **settings)
    refused("generate", "--checkpoint", made / "base", "--adapter", adapter,
            naming=[adapter, naming])


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_they_are_merged_before_quantizing(mode, made, tmp_path):
    merged(made, "all").save_pretrained(tmp_path / "merged")
    shutil.copy(TINY / "tokenizer.model", tmp_path / "merged")
    ours = logits(made / "base", made / "all", quantize=mode)
    expected = logits(tmp_path / "merged", quantize=mode)
    # The last bit of a sum may round a few weights to the next level.
    assert (ours - expected).abs().mean() < 1e-3 * (ours - logits(made / "base")).abs().mean()


def test_in_bf16_the_sum_is_rounded_once(made):
    model, _ = load(made / "base", device="cpu", dtype=torch.bfloat16, adapters=[made / "all"])
    theirs = merged(made, "all").state_dict()
    ours = model.layers[1].feed_forward.down.weight.to_dense()  # back in rows
    assert ours.dtype == torch.bfloat16
    expected = theirs["model.layers.1.mlp.down_proj.weight"]
    assert (ours.float() - expected).abs().max() <= 2 ** -8 * expected.abs().max()


def test_fingerprints_tell_adapters_apart(made, tmp_path):
    """The adapter "keys" changes no first row of a weight."""
    changed = shutil.copytree(made / "keys", tmp_path / "changed")
    tensors = load_file(changed / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"][-1, -1] += 0.1
    save_file(tensors, changed / "adapter_model.safetensors")
    louder = shutil.copytree(made / "keys", tmp_path / "louder")
    edit(louder, lora_alpha=65)
    seen = {load(made / "base", device="cpu", adapters=them)[0].fingerprint for them in (
        [], [made / "keys"], [changed], [louder], [made / "keys", changed], [made / "all"])}
    assert len(seen) == 6


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_programs_take_them(made, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "A cat"}')
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 9)
    common = ["--checkpoint", made / "base", "--dtype", "fp32", "--device", "cpu", "--json"]
    greedy = ["--max-new-tokens", 9, "--temperature", 0]
    for argv, figure in ((["generate", "--prompt", "A", *greedy], "token_ids"),
                         (["batch", "--prompts", tmp_path / "p.jsonl", *greedy], "token_ids"),
                         (["chat", "--prompts", tmp_path / "p.jsonl", *greedy], "token_ids"),
                         (["eval", "--text", tmp_path / "text.txt", "--window", 60], "perplexity")):
        said = [run(*argv, *common, *more) for more in (
            [], ["--adapter", made / "all"], ["--adapter", made / "all", "--adapter",
                                              made / "two"])]
        assert [status for status, _, _ in said] == [0, 0, 0], said[1][2]
        figures = [str(json.loads(out.splitlines()[-1])[figure]) for _, out, _ in said]
        assert len(set(figures)) == 3, argv[0]


@pytest.mark.parametrize("program, where", [("server", "server.__main__"),
                                            ("bench", "bench.models")])
def test_so_do_the_folders_of_programs(program, where, made, monkeypatch):
    def spy(*args, adapters=(), **options):
        raise ValueError(f"load was given {adapters}")

    if program == "server":
        pytest.importorskip("fastapi")
    monkeypatch.setattr(f"{where}.load", spy)
    status, _, err = run(program, "--checkpoint", made / "base", "--adapter", "a/b",
                         "--adapter", "c")
    assert status == 2 and "load was given ['a/b', 'c']" in err


def test_a_draft_stays_as_it_is(made):
    seen = []

    def spy(*args, original=load, **options):
        seen.append((str(args[0]), list(options.get("adapters", ()))))
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("generate.load", spy)
        patch.setattr("speculate.load", spy)
        status, _, err = run("generate", "--checkpoint", made / "base", "--draft", made / "base",
                             "--adapter", made / "two", "--max-new-tokens", 3, "--device", "cpu",
                             "--prompt", "A", "--json")
    assert status == 0, err
    assert seen == [(str(made / "base"), [str(made / "two")]), (str(made / "base"), [])]


@pytest.mark.parametrize("changes, naming", [
    (dict(use_dora=True), "use_dora"), (dict(fan_in_fan_out=True), "fan_in_fan_out"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"), (dict(bias="all"), "bias 'all'"),
    (dict(lora_bias=True), "lora_bias"), (dict(peft_type="IA3"), "peft_type 'IA3'"),
    (dict(trainable_token_indices=[3]), "trainable_token_indices"),
    (dict(init_lora_weights="pissa_niter_16"), "init_lora_weights 'pissa_niter_16'"),
    (dict(r=3), "(4, 64)"), (dict(r="x"), "r is 'x'"), (dict(r=0), "r is 0"),
    (dict(alpha_pattern={"(": 3}), "no rank or scale"), (dict(alpha_pattern=[3]), "alpha_pattern"),
    (dict(alpha_pattern={"q_proj": 10**400}), "no rank or scale"),
    (dict(lora_alpha=float("inf")), "lora_alpha is inf"),
    (dict(lora_alpha=None), "no rank or scale")])
def test_settings_that_are_not_supported_are_named(changes, naming, made, tmp_path):
    adapter = shutil.copytree(made / "two", tmp_path / "it")
    edit(adapter, **changes)
    refused("generate", "--checkpoint", made / "base", "--adapter", adapter,
            naming=[adapter, naming])


ROOT = "base_model.model."
Q = ROOT + "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize("change, naming", [
    (lambda t: t.pop(Q + "lora_B.weight"), [Q + "lora_B.weight", "missing"]),
    (lambda t: t.update({Q + "lora_A.weight": torch.ones(4, 32)}), ["(4, 32)", "(4, 64)"]),
    (lambda t: t.update({Q + "lora_B.weight": torch.full((64, 4), torch.nan)}), ["not finite"]),
    *[(lambda t, dtype=dtype: t.update({Q + "lora_B.weight": t[Q + "lora_B.weight"].to(dtype)}),
       [Q + "lora_B.weight", dtype]) for dtype in (torch.float8_e4m3fn, torch.int8, torch.bool)],
    (lambda t: t.update({Q + "lora_magnitude_vector": torch.ones(64)}), ["magnitude_vector"]),
    (lambda t: t.update({ROOT + "lm_head.weight": torch.ones(4096, 64)}), ["lm_head.weight"]),
    (lambda t: t.update({ROOT + "model.embed_tokens.lora_embedding_A": torch.ones(4, 4096)}),
     ["lora_embedding_A"]),
    (lambda t: t.update({Q.replace(".0.", ".7.") + "lora_A.weight": torch.ones(4, 64)}),
     ["another model", "model.layers.7.self_attn.q_proj"]),
    (lambda t: t.clear(), ["no tensors"])])
def test_tensors_that_do_not_fit_are_named(change, naming, made, tmp_path):
    adapter = shutil.copytree(made / "two", tmp_path / "it")
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused("generate", "--checkpoint", made / "base", "--adapter", adapter,
            naming=[adapter, *naming])


def test_what_is_no_adapter_or_has_no_base(made, tmp_path):
    base_folder, two = made / "base", made / "two"
    for name, naming in ((tmp_path / "none", "no such adapter folder"),
                         (base_folder, "adapter_config.json"), ("nonsense", "adapter 'nonsense'")):
        refused("generate", "--checkpoint", base_folder, "--adapter", name, naming=[name, naming])
    convert(base_folder, tmp_path / "q", None, asked_quantization("int8", 32))
    refused("generate", "--checkpoint", tmp_path / "q", "--adapter", two,
            naming=[tmp_path / "q", "is stored quantized", "--quantize"])
    refused("generate", "--checkpoint", TINY, "--adapter", two, naming=[two, "of this model"])
    refused("bench", "--shape", "135m", "--adapter", two, naming=["--adapter", "--shape"])


@pytest.mark.slow
def test_two_processes_say_what_one_says(made):
    names = ["base+all", "base+all+two=int4"]
    one = tp_worker.of_folders(made, names)
    subprocess.run([*TORCHRUN, "--nproc-per-node", "2", tp_worker.__file__, made, *names],
                   env=ONE_THREAD, check=True, timeout=300, capture_output=True)
    found = load_file(made / "ranks-2.safetensors")
    for name in names:
        assert (found[name] - one[name]).abs().max() < 1e-4, name
