"""GPTQ, AWQ and compressed-tensors folders: every weight to the bit as others read it, then logits.

The folders in tests/published were written by AutoGPTQ and auto-round, and hold what these tools
read back from them (tests/published/export.py); compressed-tensors is here itself."""

import json
import lzma
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load as parse
from safetensors.torch import load_file, save_file

import tp_worker
from convert_hf import hf_parts, read_config
from generate import generate, load, make_cache
from helpers import TINY, hf_model, run
from published import open_weights, read_quantization
from test_tp import ONE_THREAD, TORCHRUN

EXPORTED = Path(__file__).parent / "published"
FOLDERS = sorted(path.name for path in EXPORTED.iterdir() if path.is_dir())
SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             eos_token_id=None)
# compressed-tensors: format and settings, of all layers or by a part of their names
SCHEMES = {
    "pack-4-32": dict(num_bits=4, group_size=32),
    "pack-4-64-zeros": dict(num_bits=4, group_size=64, symmetric=False),
    "pack-4-channel": dict(num_bits=4),
    "pack-4-channel-zeros": dict(num_bits=4, symmetric=False),
    "pack-8": dict(num_bits=8),
    "pack-8-zeros": dict(num_bits=8, symmetric=False),
    "pack-8-64": dict(num_bits=8, group_size=64),
    "int-8": dict(num_bits=8, format="int-quantized"),
    "naive-8-zeros": dict(num_bits=8, symmetric=False, format="naive-quantized"),
    "mixed": {"q_proj|up_proj": dict(num_bits=4, group_size=32),
              "k_proj|gate_proj|down_proj": dict(num_bits=8, format="int-quantized"),
              "layers.1.*o_proj": dict(num_bits=8, group_size=32, symmetric=False)},
}


def in_place(made, name):
    """A copy of an exported folder with a tokenizer, to load."""
    folder = shutil.copytree(EXPORTED / name, made / name)
    shutil.copy(TINY / "tokenizer.model", folder)
    return folder


def dequantized(name):
    return parse(lzma.decompress((EXPORTED / name / "dequantized.safetensors.xz").read_bytes()))


def compress(folder, scheme, old_spelling=False):
    """A random model's folder as compressed-tensors writes it, and the weights that it reads."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams
    model = hf_model("Llama", **SIZES, initializer_range=0.2)
    model.half().save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.model", folder)
    by_name = scheme if "num_bits" not in scheme else {"": scheme}
    stored, read, groups = load_file(folder / "model.safetensors"), {}, {}
    for number, (pattern, settings) in enumerate(by_name.items()):
        settings = dict(settings)
        layout = settings.pop("format", "pack-quantized")
        args = QuantizationArgs(
            strategy="group" if "group_size" in settings else "channel", **settings)
        made = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
        groups[f"group_{number}"] = made.model_dump(mode="json")
        tool = BaseCompressor.get_value_from_registry(layout)
        for name in [n for n in stored if "_proj.weight" in n and re.search(pattern, n)]:
            weight = stored.pop(name)
            blocks = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
            scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
            parts = {"weight": weight, "weight_scale": scale.half(), "weight_zero_point": zero}
            parts = tool.compress(parts, made)
            stored.update({name.removesuffix("weight") + n: t for n, t in parts.items()})
            read[name] = tool.decompress({**parts, "weight_scale": scale.half().float()},
                                         made)["weight"]
    save_file(stored, folder / "model.safetensors")
    config = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"],
              "quantization_status": "compressed", "kv_cache_scheme": None,
              "format": layout if len(groups) == 1 else "mixed-precision"}
    if old_spelling:
        for group in groups.values():
            del group["format"]
    edit(folder, quantization_config=config)
    return read


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def weights_of(folder):
    """Every weight in floating point, by Hugging Face's names."""
    raw, config = read_config(folder)
    parts = hf_parts(config)
    return {part: block for name, blocks in open_weights(folder, raw, config, None)
            for part, block in zip(parts[name], blocks)}


def plain_model(folder, read):
    """transformers' model of these weights, in float32."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    stored = load_file(folder / "model.safetensors")
    floats = {n: t.float() for n, t in stored.items() if n in model.state_dict()
              and t.is_floating_point()}
    model.load_state_dict({**floats, **read})
    return model.requires_grad_(False)


def check_logits(model, folder, read):
    tokens = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = plain_model(folder, read)(tokens).logits
    with torch.no_grad():
        ours = model(tokens, make_cache(model, batch_size=2))
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def check_tokens(model, eager):
    """One after the other, as the decode step reads weights."""
    said = [list(generate(m, make_cache(m, 4, 40), list(range(5, 40)), 30)) for m in (model, eager)]
    assert said[0] == said[1]


# ------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("name", FOLDERS)
def test_exported_folders(name, tmp_path):
    folder, read = in_place(tmp_path, name), dequantized(name)
    ours = weights_of(folder)
    assert len(read) == 7
    for layer, weight in read.items():
        assert torch.equal(ours[layer], weight), layer
    model, _ = load(folder, device="cpu", dtype=torch.float32)
    check_logits(model, folder, read)


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(name, tmp_path):
    read = compress(tmp_path / "it", SCHEMES[name], old_spelling="int" in name)
    ours = weights_of(tmp_path / "it")
    assert len(read) == (14 if name != "mixed" else 11)
    for layer, weight in read.items():
        assert torch.equal(ours[layer], weight), layer
    model, _ = load(tmp_path / "it", device="cpu", dtype=torch.float32)
    check_logits(model, tmp_path / "it", read)
