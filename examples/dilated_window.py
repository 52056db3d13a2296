"""Another rule of what stays visible: of the older half of a window, every n-th token only.

    python -m examples.dilated_window --text book.txt

A rule is one method, `visible`: slots, positions and masks follow from it in every kernel, compiled
or not. This one sees as far back as the whole window with less than half of its keys (a dilated
window, as in Longformer, Beltagy et al., 2020). Its perplexity stands beside the stream's, once as
far and once with as many keys. SmolLM2, float32, 5,000 tokens of tests/text.txt, and of Pride and
Prejudice:

    4 sinks and the latest 252         perplexity 23.223    46.217
    4 sinks and 108 of the latest 252  perplexity 25.610    50.530
    4 sinks and the latest 108         perplexity 25.462    49.025

So as many keys are better spent on the latest tokens.
"""


import torch

from cli import add_checkpoint, plain_parser
from eval import read_text, streamed
from generate import load
from kv_cache import KVCache
from terminal import user_errors

S, W, CHUNK = 4, 252, 128
NEAR, EVERY = 60, 4  # the latest 60 tokens, and of the 192 before them every fourth: 108 keys


class DilatedCache(KVCache):
    def visible(self, geometry, positions, slot):
        held = self.held(geometry, positions, slot)[:, None]  # (B, 1, n)
        near = held > positions[:, :, None] - NEAR  # (B, T, n)
        # By the position itself, not by its distance: what was left out never comes back.
        chosen = (slot < geometry.n_sink) | near | (held % EVERY == 0)
        return super().visible(geometry, positions, slot) & chosen


def main():
    parser = plain_parser(__doc__)
    add_checkpoint(parser, "smollm2")
    parser.add_argument("--text", default="tests/text.txt", metavar="FILE",
                        help="UTF-8 text, plain or .xz")
    parser.add_argument("--max-tokens", type=int, default=5000, metavar="N",
                        help="first N tokens of the text only")
    with user_errors(parser):
        args = parser.parse_args()
        model, tokenizer = load(args.checkpoint, device="cpu", dtype=torch.float32)
        ids = torch.tensor(tokenizer.encode(read_text(args.text))[:args.max_tokens + 1])
        as_many = NEAR + (W - NEAR) // EVERY
        for name, kind, window in ((f"the latest {W}", KVCache, W),
                                   (f"{as_many} of the latest {W}", DilatedCache, W),
                                   (f"the latest {as_many}", KVCache, as_many)):
            cache = kind(model.config, 1, S, window, CHUNK)
            nats = torch.cat(list(streamed(model, ids, cache)))
            print(f"{S} sinks and {name:22} perplexity {nats.mean().exp():.3f}")


if __name__ == "__main__":
    main()
