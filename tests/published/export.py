"""Makes the folders beside this file: a small random Llama, quantized and written by others' tools,
each with the weights that the same tool reads back from it, in float32.

    python export.py auto-gptq      AutoGPTQ 0.7.1 with transformers 4.46
    python export.py auto-round     auto-round 0.16.1, whose packing AutoAWQ and GPTQModel share

The tests need neither: they read what these left.
"""

import json
import lzma
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent


def random_llama(dim=64, ffn=128):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=96, hidden_size=dim, intermediate_size=ffn, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.2, eos_token_id=None, architectures=["LlamaForCausalLM"]))


def finish(name, made, readers):
    """Keep config.json, the weights, and what `readers`, by layer, read back."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = json.loads((made / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    [weights] = made.glob("*.safetensors")
    tensors = load_file(weights)
    plain = {n: t.half() if t.dtype == torch.float32 else t for n, t in tensors.items()}
    (folder / "model.safetensors").write_bytes(save(plain, metadata={"format": "pt"}))
    read = {f"{layer}.weight": weight.contiguous() for layer, weight in readers(plain).items()}
    (folder / "dequantized.safetensors.xz").write_bytes(lzma.compress(save(read), preset=9))
    shutil.rmtree(made)


# ------------------------------------------------------------------------------ AutoGPTQ


def auto_gptq(name, bits, group_size, sym, desc_act, different=False, **sizes):
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import LlamaGPTQForCausalLM, _base
    from auto_gptq.quantization import gptq
    _base.CUDA_0, torch.cuda.synchronize = torch.device("cpu"), lambda: None
    model, add_batch = random_llama(**sizes), gptq.GPTQ.add_batch

    def see(self, x, out):
        """Of a random model, inputs of unequal size; if different, for q, k and v in other ways."""
        seed = int(self.layer.weight.sum().abs() * 1000) if different else 0
        generator = torch.Generator().manual_seed(seed)
        return add_batch(self, x * (0.2 + torch.rand(x.shape[-1], generator=generator)), out)

    gptq.GPTQ.add_batch = see
    wrapped = LlamaGPTQForCausalLM(model, False, BaseQuantizeConfig(
        bits=bits, group_size=group_size, sym=sym, desc_act=desc_act))
    batches = [{"input_ids": torch.randint(3, 96, (1, 64)),
                "attention_mask": torch.ones(1, 64, dtype=torch.int64)} for _ in range(4)]
    wrapped.quantize(batches, use_triton=False, cache_examples_on_gpu=False)
    made = HERE / "made"
    wrapped.save_quantized(str(made))
    layers = {n: m for n, m in wrapped.model.named_modules() if hasattr(m, "qweight")}

    def read(tensors):
        """The layer's own forward of the unit vectors, in float32."""
        weights = {}
        for layer, module in layers.items():
            module.scales = tensors[f"{layer}.scales"].float()
            module.bias = None
            weights[layer] = module(torch.eye(module.infeatures)).t()
        return weights

    finish(name, made, read)
    gptq.GPTQ.add_batch = add_batch


# ------------------------------------------------------------------------------ auto-round


def auto_round(name, layout, group_size, sym, **sizes):
    from auto_round import AutoRound
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    rounded = AutoRound(
        random_llama(**sizes).half(), tokenizer=PreTrainedTokenizerFast(tokenizer_object=words),
        bits=4, group_size=group_size, sym=sym, iters=0, disable_opt_rtn=True, device_map="cpu",
        nsamples=1, seqlen=16, amp=False)
    rounded.quantize_and_save(str(HERE / "made"), format=layout)

    def read(tensors):
        weights = {}
        for layer in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
            parts = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(layer)}
            scales = parts["scales"].float()
            if layout == "auto_awq":
                K = len(parts["qweight"])
                weights[layer] = dequantize_gemm(parts["qweight"], parts["qzeros"], scales, 4,
                                                 K // len(scales)).t()
            else:
                K, N = 8 * len(parts["qweight"]), parts["qweight"].shape[1]
                module = QuantLinear(4, K // len(scales), K, N, bias=False)
                module.load_state_dict(parts, strict=False)
                module.scales = scales
                weights[layer] = module(torch.eye(K)).t()
        return weights

    [made] = (HERE / "made").iterdir()
    finish(name, made, read)
    (HERE / "made").rmdir()


if __name__ == "__main__":
    if sys.argv[1] == "auto-gptq":
        auto_gptq("gptq-act-order", 4, 32, sym=False, desc_act=True)
        auto_gptq("gptq-three-orders", 4, 32, sym=False, desc_act=True, different=True)
        auto_gptq("gptq-128", 4, 128, sym=True, desc_act=False, dim=128)
        auto_gptq("gptq-channel", 4, -1, sym=False, desc_act=False)
        auto_gptq("gptq-8bit", 8, 64, sym=False, desc_act=True)
        auto_gptq("gptq-8bit-channel", 8, -1, sym=True, desc_act=False)
    else:
        auto_round("gptq-auto-round", "auto_gptq", 64, sym=False)
        auto_round("awq-32", "auto_awq", 32, sym=False)
        auto_round("awq-64", "auto_awq", 64, sym=False)
        auto_round("awq-128", "auto_awq", 128, sym=False, dim=128)
