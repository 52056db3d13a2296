"""Train a small Llama on any text, through the project's own Transformer, and save it in the
project's own format: the recipe of checkpoints/tiny and checkpoints/tiny-draft.

    python checkpoints/tiny/train.py --text train.txt.xz --valid valid.txt.xz --out checkpoints/tiny

Texts are UTF-8, plain or .xz, one paragraph a line. Every sequence starts with BOS, so that the
first position is one the model can learn to use as an attention sink.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from eval import read_text
from formats.config import config_from_hf
from model import Transformer

CONTEXT = 256


def train_tokenizer(text: str, vocab_size: int) -> bytes:
    """A sentencepiece BPE that loses nothing: bytes for unknown characters, spaces and newlines
    kept as they are. Returns the content of its tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in text.split("\n") if line),
        model_writer=model, model_type="bpe", vocab_size=vocab_size,
        character_coverage=0.9999, byte_fallback=True, user_defined_symbols=["\n"],
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        max_sentence_length=1 << 20, unk_id=0, bos_id=1, eos_id=2, minloglevel=1)
    return model.getvalue()


def hf_config(args, tokenizer) -> dict:
    """The model as a Hugging Face config.json, so that other programs can read it too."""
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
        hidden_size=args.dim, num_hidden_layers=args.layers, num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads, head_dim=args.dim // args.heads,
        intermediate_size=args.ffn, vocab_size=tokenizer.vocab_size(),
        max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_id(),
        eos_token_id=tokenizer.eos_id(), torch_dtype="bfloat16", gpt_stream={"format": 1})


def initialize(model: Transformer) -> None:
    """GPT-2's initialization: 0.02, and less for what is added to the residual stream."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            into_residual = name.endswith(("out.weight", "down.weight"))
            std = 0.02 / math.sqrt(2 * model.config.n_layers) if into_residual else 0.02
            torch.nn.init.normal_(weight, std=std)


def make_optimizers(model: Transformer, rate: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices of the layers, AdamW for the rest. After three
    minutes on two cores the validation loss was 4.43 (rate 1e-2) and 4.58 (3e-3), and with AdamW
    alone 5.03 (3e-3)."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or not n.startswith("layers")]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)]


def batch_of(ids: Tensor, bos: int, batch: int) -> tuple[Tensor, Tensor]:
    """Random cuts of the text: inputs (batch, CONTEXT) that start with BOS, and what follows."""
    starts = torch.randint(len(ids) - CONTEXT, (batch, 1))
    text = ids[starts + torch.arange(CONTEXT)].long()  # (batch, CONTEXT)
    return torch.cat([torch.full((batch, 1), bos), text[:, :-1]], dim=1), text


def loss_of(model, inputs: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model, ids: Tensor, bos: int, batch: int, device) -> float:
    """Nats a token over the whole text, cut into sequences of CONTEXT that each start with BOS."""
    text = ids[:len(ids) // (CONTEXT * batch) * CONTEXT * batch].long().view(-1, batch, CONTEXT)
    total = 0.0
    for targets in text.to(device):
        start = torch.full_like(targets[:, :1], bos)
        total += loss_of(model, torch.cat([start, targets[:, :-1]], dim=1), targets).item()
    return total / len(text)


def train(model, compiled, ids: Tensor, bos: int, args) -> float:
    """Train for args.steps; the rate rises for 2% of them, then falls on a cosine to zero.
    Returns the last smoothed training loss."""
    optimizers = make_optimizers(model, args.rate, args.weight_decay)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    smooth, start = 0.0, time.time()
    for step in range(1, args.steps + 1):
        done = step / args.steps
        factor = min(done / 0.02, 0.5 + 0.5 * math.cos(math.pi * done))
        for optimizer in optimizers:
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
        inputs, targets = batch_of(ids, bos, args.batch)
        loss = loss_of(compiled, inputs.to(args.device), targets.to(args.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == 1:
            smooth = loss.item() if step == 1 else 0.8 * smooth + 0.2 * loss.item()
            print(f"step {step}  {100 * done:.1f}%  loss {smooth:.3f}  "
                  f"{step * args.batch * CONTEXT / (time.time() - start):.0f} tokens/s", flush=True)
    return smooth


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--tokenizer", type=Path, help="use this one instead of training one")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-2, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the layers' matrices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    text = read_text(args.text)
    proto = (args.tokenizer.read_bytes() if args.tokenizer else train_tokenizer(text, args.vocab))
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto)
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int16)
    valid_text = read_text(args.valid)
    valid_ids = torch.tensor(tokenizer.encode(valid_text), dtype=torch.int16)
    config = hf_config(args, tokenizer)
    model = Transformer(config_from_hf(config)).to(args.device)
    initialize(model)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(ids):,} training tokens, {len(valid_ids):,} for validation")

    compiled = torch.compile(model)
    start = time.time()
    training_loss = train(model, compiled, ids, tokenizer.bos_id(), args)
    valid_loss = validate(compiled, valid_ids, tokenizer.bos_id(), args.batch, args.device)
    per_byte = valid_loss * len(valid_ids) / len(valid_text.encode()) / math.log(2)
    result = dict(parameters=size, train_tokens=len(ids), steps=args.steps, batch=args.batch,
                  context=CONTEXT, minutes=round((time.time() - start) / 60, 1),
                  device=str(args.device), torch=torch.__version__,
                  train_loss=round(training_loss, 4), valid_loss=round(valid_loss, 4),
                  valid_bits_per_byte=round(per_byte, 4))
    print(json.dumps(result))

    args.out.mkdir(parents=True, exist_ok=True)  # nothing is written before all is there
    (args.out / "tokenizer.model").write_bytes(proto)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: w.detach().to("cpu", torch.bfloat16) for name, w in model.named_parameters()}
    save_file(weights, args.out / "model.safetensors.tmp")
    os.replace(args.out / "model.safetensors.tmp", args.out / "model.safetensors")


if __name__ == "__main__":
    main()
