"""A slow, separate reading of StreamingLLM's section 3.2, to hold the engine against.

Per layer, a Python list of un-rotated keys and values, trimmed to S + W after each token; at every
step the list's entries are numbered 0 .. n-1 and rotated at those numbers. One token at a time, one
row, float64 throughout, no code shared with the engine.
"""

import copy

import torch


class Stream:
    def __init__(self, model, n_sink, window):
        self.config, self.n_sink, self.window = model.config, n_sink, window
        self.w = {name: p.double() for name, p in model.state_dict().items()}
        self.layers = [[] for _ in range(model.config.n_layers)]
        self.history = [copy.deepcopy(self.layers)]

    def rollback(self, n):
        del self.history[len(self.history) - n:]
        self.layers = copy.copy([list(layer) for layer in self.history[-1]])

    def feed(self, token):
        """Logits (V,) float64 after one more token."""
        x = self.w["embed.weight"][token]
        for i in range(self.config.n_layers):
            x = x + self.attention(i, self.norm(x, f"layers.{i}.attention_norm.weight"))
            h = self.linear(self.norm(x, f"layers.{i}.ffn_norm.weight"),
                            f"layers.{i}.feed_forward.gate_up")
            gate, up = h[:self.config.ffn_dim], h[self.config.ffn_dim:]
            x = x + self.linear(gate * torch.sigmoid(gate) * up, f"layers.{i}.feed_forward.down")
        self.history.append([list(layer) for layer in self.layers])
        return self.w["output.weight"] @ self.norm(x, "norm.weight")

    def attention(self, i, x):
        c, D = self.config, self.config.head_dim
        qkv = self.linear(x, f"layers.{i}.attention.qkv").view(-1, D)
        q, k, v = qkv[:c.n_heads], qkv[c.n_heads:c.n_heads + c.n_kv_heads], qkv[-c.n_kv_heads:]
        if c.qk_norm:
            q = self.norm(q, f"layers.{i}.attention.q_norm.weight")
            k = self.norm(k, f"layers.{i}.attention.k_norm.weight")
        held = self.layers[i]
        held.append((k, v))
        if len(held) > self.n_sink + self.window:
            del held[self.n_sink]
        out = []
        for head in range(c.n_heads):
            group = head // (c.n_heads // c.n_kv_heads)
            query = self.rotate(q[head], len(held) - 1)
            scores = torch.stack([query @ self.rotate(k[group], position)
                                  for position, (k, _) in enumerate(held)]) / D ** 0.5
            values = torch.stack([v[group] for _, v in held])
            out.append(scores.softmax(0) @ values)
        return self.linear(torch.cat(out), f"layers.{i}.attention.out")

    def rotate(self, x, position):
        half = len(x) // 2
        angle = position * self.config.rope_theta ** (
            -torch.arange(half, dtype=torch.float64) / half)
        pair = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pair.real, pair.imag])

    def norm(self, x, name):
        return x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * self.w[name]

    def linear(self, x, name):
        y = self.w[name + ".weight"] @ x
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y
