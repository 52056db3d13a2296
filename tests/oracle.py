"""A slow, separate reading of StreamingLLM's section 3.2, to hold the engine against.

Per layer, a Python list of un-rotated keys and values, trimmed to S + W after each token; at every
step the list's entries are numbered 0 .. n-1 and rotated at those numbers. One token at a time, one
row, float64 throughout, no code shared with the engine. A sliding layer of a model that mixes kinds
is a stream of its own, without sinks.
"""

import copy
import math

import torch


class Stream:
    def __init__(self, model, n_sink, window, rotary=None):
        """rotary: the frequencies of each kind of layers, and what cosine and sine are multiplied
        by; None: rope_theta's."""
        self.config, self.n_sink, self.window, self.rotary = model.config, n_sink, window, rotary
        self.w = {name: p.double() for name, p in model.state_dict().items()}
        self.layers = [[] for _ in range(model.config.n_layers)]
        self.history = [copy.deepcopy(self.layers)]

    def rollback(self, n):
        del self.history[len(self.history) - n:]
        self.layers = copy.copy([list(layer) for layer in self.history[-1]])

    def feed(self, token):
        """Logits (V,) float64 after one more token."""
        c = self.config
        x = self.w["embed.weight"][token] * c.embed_scale
        for i in range(c.n_layers):
            y = self.attention(i, self.norm(x, f"layers.{i}.attention_norm.weight"))
            x = x + self.norm(y, f"layers.{i}.attention_post_norm.weight")
            h = self.linear(self.norm(x, f"layers.{i}.ffn_norm.weight"),
                            f"layers.{i}.feed_forward.gate_up")
            gate, up = h[:c.ffn_dim], h[c.ffn_dim:]
            y = self.linear(self.activation(gate) * up, f"layers.{i}.feed_forward.down")
            x = x + self.norm(y, f"layers.{i}.ffn_post_norm.weight")
        self.history.append([list(layer) for layer in self.layers])
        return self.w["output.weight"] @ self.norm(x, "norm.weight")

    def activation(self, x):
        if self.config.activation == "silu":
            return x * torch.sigmoid(x)
        return x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3)))

    def attention(self, i, x):
        c, D = self.config, self.config.head_dim
        kind = c.kinds[i] if c.kinds else "full"
        n_sink, window = self.n_sink, self.window
        if kind == "sliding":
            n_sink, window = 0, min(c.sliding_window, n_sink + window)
        qkv = self.linear(x, f"layers.{i}.attention.qkv")
        q, k, v = qkv.split([c.n_heads * D, c.n_kv_heads * D, c.n_kv_heads * D])
        shape = (-1,) if c.norm_all_heads else (-1, D)  # what a norm is over
        q = self.norm(q.view(shape), f"layers.{i}.attention.q_norm.weight").view(-1, D)
        k = self.norm(k.view(shape), f"layers.{i}.attention.k_norm.weight").view(-1, D)
        held = self.layers[i]
        held.append((k, v.view(-1, D)))
        if len(held) > n_sink + window:
            del held[n_sink]
        out = []
        for head in range(c.n_heads):
            group = head // (c.n_heads // c.n_kv_heads)
            query = self.rotate(q[head], torch.tensor(len(held) - 1), kind) * c.query_scale
            keys = torch.stack([k[group] for k, _ in held])  # (n, D)
            scores = self.rotate(keys, torch.arange(len(held)), kind) @ query / D ** 0.5
            values = torch.stack([v[group] for _, v in held])
            out.append(scores.softmax(0) @ values)
        return self.linear(torch.cat(out), f"layers.{i}.attention.out")

    def rotate(self, x, position, kind):
        """x (..., D) at positions (...)."""
        if kind == "unrotated":
            return x
        half, amplitude = (self.config.rotary_dim or x.shape[-1]) // 2, 1
        theta = (kind == "sliding" and self.config.sliding_theta) or self.config.rope_theta
        frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
        if self.rotary:
            frequencies, amplitude = self.rotary[kind]
        angle = position[..., None] * frequencies.double()
        turned = torch.complex(x[..., :half], x[..., half:2 * half]) * torch.polar(
            torch.full_like(angle, amplitude), angle)
        return torch.cat([turned.real, turned.imag, x[..., 2 * half:]], dim=-1)

    def norm(self, x, name):
        if name not in self.w:
            return x
        weight = self.w[name] + self.config.norm_plus_one
        return x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * weight

    def linear(self, x, name):
        y = self.w[name + ".weight"] @ x
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y
