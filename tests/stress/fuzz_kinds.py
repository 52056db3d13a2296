"""Small checkpoints of every kind that can be read, for fuzz.py and kills.py, and what is run on
them. Random weights: that they are right is what the other tests show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, models, pre_tokenizers

from convert_hf import convert
from formats import gguf as gguf_format
from formats.config import config_from_hf, hf_parts
from formats.gguf_tokenizer import SPM_IDS
from helpers import TINY
from model import ModelConfig
from quantize import asked_quantization

PUBLISHED = Path(__file__).parent.parent / "published"
SHORT = ["--max-new-tokens", 8, "--device", "cpu", "--seed", 0]
GENERATE = ["generate", "--checkpoint", "{case}", "--prompt", "the cat", *SHORT]
CHAT = ["chat", "--checkpoint", "{case}", "--prompts", "{made}/turns.jsonl", *SHORT]
CONVERT = ["convert_hf", "{case}", "{tmp}/out"]
QUANTIZE = ["quantize", "--checkpoint", "{case}", "--out", "{tmp}/out", "--mode"]
FOLDER = [GENERATE, GENERATE, CHAT, CONVERT, [*QUANTIZE, "int8"], [*QUANTIZE, "int4"],
          [*GENERATE, "--quantize", "int4"], [*GENERATE, "--draft", "{case}"]]
STORED = [GENERATE, GENERATE, CHAT]
GGUF = [["convert_hf", "{case}/model.gguf", "{tmp}/out"],
        ["convert_hf", "{case}/model.gguf", "{tmp}/out", "--quantize", "int4"],
        ["generate", "--checkpoint", "{case}/model.gguf", "--prompt", "the cat", *SHORT]]
ADAPTED = [["generate", "--checkpoint", "{made}/llama", "--adapter", "{case}", *SHORT]]
SESSION = [["chat", "--checkpoint", "{made}/ours", "--load-session", "{case}/it.session",
            "--prompts", "{made}/turns.jsonl", *SHORT]]
KINDS = {"llama": FOLDER, "mistral": FOLDER, "qwen3": FOLDER, "ours": FOLDER, "int8": STORED,
         "int4": STORED, "gguf-llama": GGUF, "gguf-bpe": GGUF, "pack": [*STORED, CONVERT],
         "int-quantized": [*STORED, CONVERT],
         **{name: [*STORED, CONVERT] for name in ("awq-32", "gptq-act-order", "gptq-auto-round",
                                                  "gptq-8bit-channel", "gptq-three-orders")},
         "adapter": ADAPTED, "session": SESSION}
BASE = {"hidden_act": "silu", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 4096,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "attention_bias": False, "mlp_bias": False}
FAMILIES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "mistral": ("Mistral", {"sliding_window": 32, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"vocab_size": 320, "use_sliding_window": True, "sliding_window": 48,
                        "eos_token_id": [2, 3],
                        "rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                            "rope_theta": 5e5}})}
CHATML = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
          "<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_kinds(made: Path) -> None:
    """A folder made/KIND for each of KINDS."""
    torch.manual_seed(0)
    (made / "turns.jsonl").write_text('{"turns": ["Hello there", "the cat sat"]}\n')
    for kind in FAMILIES:
        make_hf(made / kind, kind)
    convert(made / "llama", made / "ours")
    for mode in ("int8", "int4"):
        convert(made / "llama", made / mode, None, asked_quantization(mode, 32))
    make_gguf(made / "gguf-llama", made / "mistral", "llama")
    make_gguf(made / "gguf-bpe", made / "qwen3", "qwen3")
    for name in KINDS:
        if (PUBLISHED / name).exists():
            shutil.copytree(PUBLISHED / name, made / name)
            (made / name / "dequantized.safetensors.xz").unlink()
            words(made / name)
    make_compressed(made / "pack", made / "mistral", packed=True)
    make_compressed(made / "int-quantized", made / "mistral", packed=False)
    make_adapter(made / "adapter")
    make_session(made)


def dump(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1))


def config_of(kind: str) -> dict:
    family, changes = FAMILIES[kind]
    return {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), **BASE,
            **changes}


def hf_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Random weights, by Hugging Face's names."""
    weights = {}
    for parts in hf_parts(config).values():
        for part, shape in parts.items():
            weights[part] = torch.randn(shape) * 0.1 + (len(shape) == 1)
    return weights


def make_hf(folder: Path, kind: str) -> None:
    folder.mkdir()
    raw = config_of(kind)
    weights = hf_weights(config_from_hf(raw))
    dump(folder / "config.json", raw)
    dump(folder / "generation_config.json", {"eos_token_id": [2, 5], "temperature": 0.6})
    if kind == "qwen3":
        byte_level(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    shutil.copy(TINY / "tokenizer.model", folder)
    dump(folder / "tokenizer_config.json", {
        "add_bos_token": True, "legacy": False, "bos_token": {"content": "<s>"},
        "eos_token": "</s>", "chat_template": CHATML,
        "added_tokens_decoder": {"4000": {"content": "<|im_start|>"},
                                 "4001": {"content": "<|im_end|>", "special": True}}})
    dump(folder / "added_tokens.json", {"<tool>": 4002})
    if kind == "mistral":
        torch.save(weights, folder / "pytorch_model.bin")
        return
    files = {name: f"model-{1 + ('layers.1' in name)}.safetensors" for name in weights}
    for file in set(files.values()):
        save_file({n: t for n, t in weights.items() if files[n] == file}, folder / file)
    dump(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def byte_level(folder: Path) -> None:
    """A tokenizer.json of bytes and three merges, its special tokens and template."""
    alphabet = ["<|end|>", "<|im_start|>", "<|im_end|>", *sorted(
        pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)},
                                           [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in alphabet[:3]])
    made.save(str(folder / "tokenizer.json"))
    dump(folder / "tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": [
        {"name": "default", "template": CHATML}, {"name": "tool_use", "template": "x"}]})


def words(folder: Path) -> None:
    """A tokenizer.json of 90 tokens."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "the", "cat", "sat"] + [
        f"w{i}" for i in range(86)])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))


def make_gguf(folder: Path, source: Path, name: str) -> None:
    """A file with the tensors of a folder of Hugging Face's, the wide ones in Q4_0."""
    folder.mkdir()
    raw = json.loads((source / "config.json").read_text())
    config = config_from_hf(raw)
    writer = gguf.GGUFWriter(folder / "model.gguf", name)
    for key, theirs in gguf_format.SIZES.items():
        writer.add_uint32(f"{name}.{theirs}", raw[key])
    writer.add_uint32(f"{name}.attention.head_count_kv", 2)
    writer.add_uint32(f"{name}.attention.key_length", 16)
    writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{name}.rope.freq_base", 10000.0)
    writer.add_chat_template(CHATML)
    (gguf_words if name == "llama" else gguf_bytes)(writer, source)
    for hf_name, tensor in hf_weights(config).items():
        array = tensor.numpy()
        if tensor.ndim == 2 and "embed" not in hf_name:
            writer.add_tensor(gguf_format.gguf_name(hf_name),
                              gguf.quants.quantize(array, Kind.Q4_0), raw_dtype=Kind.Q4_0)
        else:
            writer.add_tensor(gguf_format.gguf_name(hf_name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_words(writer, source: Path) -> None:
    import sentencepiece
    sp = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    ids = range(sp.get_piece_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([sp.id_to_piece(i) for i in ids])
    writer.add_token_scores([sp.get_score(i) for i in ids])
    writer.add_token_types([2 if sp.is_unknown(i) else 3 if sp.is_control(i) else
                            6 if sp.is_byte(i) else 1 for i in ids])
    for key, token_id in SPM_IDS.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token_id)


def gguf_bytes(writer, source: Path) -> None:
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"[PAD{i}]" for i in range(320 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 259 + [5] * (len(tokens) - 262))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)


def make_compressed(folder: Path, source: Path, packed: bool) -> None:
    """A folder as compressed-tensors writes it, with random integers."""
    weights, raw = {}, {**config_of("mistral"), "tie_word_embeddings": False}
    for name, tensor in hf_weights(config_from_hf(raw)).items():
        if "_proj" not in name:
            weights[name] = tensor.half()
            continue
        (N, K), stem = tensor.shape, name.removesuffix("weight")
        if packed:
            weights[stem + "weight_packed"] = torch.randint(-2**31, 2**31, (N, K // 8)).int()
            weights[stem + "weight_shape"] = torch.tensor([N, K])
        else:
            weights[name] = torch.randint(-128, 128, (N, K), dtype=torch.int8)
        largest = 0.02 if packed else 0.002  # so that nothing overflows in fp16
        weights[stem + "weight_scale"] = torch.rand(N, K // 32 if packed else 1).half() * largest
    settings = {"num_bits": 4 if packed else 8, "type": "int", "symmetric": True,
                "strategy": "group" if packed else "channel",
                "group_size": 32 if packed else None, "actorder": None}
    raw["quantization_config"] = {
        "quant_method": "compressed-tensors", "ignore": ["lm_head"], "kv_cache_scheme": None,
        "format": "pack-quantized" if packed else "int-quantized", "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": settings, "input_activations": None}}}
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("pytorch_model.bin"))
    dump(folder / "config.json", raw)
    save_file(weights, folder / "model.safetensors")


def make_adapter(folder: Path) -> None:
    folder.mkdir()
    dump(folder / "adapter_config.json", {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_rslora": False,
        "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"layers.1.mlp.up_proj": 2},
        "alpha_pattern": {}, "fan_in_fan_out": False, "modules_to_save": None})
    weights = {}
    for i in range(2):
        for part, r, N in (("self_attn.q_proj", 4, 64), ("mlp.up_proj", 2 if i else 4, 128)):
            stem = f"base_model.model.model.layers.{i}.{part}.lora_"
            weights |= {stem + "A.weight": torch.randn(r, 64),
                        stem + "B.weight": torch.randn(N, r)}
    save_file(weights, folder / "adapter_model.safetensors")


def make_session(made: Path) -> None:
    """A session that chat.py saved."""
    from helpers import run
    (made / "session").mkdir()
    status, _, said = run("chat", "--checkpoint", made / "ours", "--prompts", made / "turns.jsonl",
                          *SHORT, "--save-session", made / "session" / "it.session")
    assert status == 0, said
    assert load_file(made / "session" / "it.session")
