"""Steer what a model says by adding one vector to the activations of one layer.

    python -m examples.steering
    python -m examples.steering --layer 8 --strength 2 --prompt "I went to the sea, and"

The vector is the difference of the mean activations of two small sets of prompts, at their last
token (Turner et al., 2023, "Activation addition"). Reading and adding are a forward hook each; with
`load(..., compile=True)` a hook is compiled in if it is there before the first step.

SmolLM2, greedy, float32; the vector has a norm of 50, an activation there one of 157:

    +0.0  I opened the door and let the sun in. I was so happy to be a part of this [...]
    +1.0  I opened the door and let the sun shine through. The sound of the car was music to my
          ears, a sweet aroma that filled the air [...]
    -1.0  I opened the door and I was left with a broken heart. It's not just about me, [...]

At strength 4 and -4 it says words of that mood, but no sentences any more.
"""

import contextlib

import torch

from cli import add_checkpoint, plain_parser
from generate import generate, load, make_cache
from terminal import user_errors

TOWARDS = ["I love this so much, it is wonderful", "What a beautiful and happy day",
           "She smiled, full of joy and delight", "This is the best thing that ever happened"]
AWAY = ["I hate this so much, it is horrible", "What an ugly and miserable day",
        "She wept, full of pain and despair", "This is the worst thing that ever happened"]


@contextlib.contextmanager
def hooked(block, hook):
    """hook(x) sees what the block puts out, (B, T, dim), and may return something else instead."""
    handle = block.register_forward_hook(lambda block, inputs, x: hook(x))
    try:
        yield
    finally:
        handle.remove()


def mean_activation(model, tokenizer, layer, prompts):
    """(dim,): what the layer puts out at each prompt's last token, a mean over the prompts."""
    seen = []
    with hooked(model.layers[layer], lambda x: seen.append(x[0, -1])):
        for prompt in prompts:
            model(torch.tensor([tokenizer.encode(prompt)]))
    return torch.stack(seen).mean(0)


def continuation(model, tokenizer, prompt, n_tokens):
    ids = generate(model, make_cache(model), tokenizer.encode(prompt), n_tokens,
                   repetition_penalty=1.2)
    return tokenizer.decode(list(ids)).replace("\n", " ")


def main():
    parser = plain_parser(__doc__)
    add_checkpoint(parser, "smollm2")
    parser.add_argument("--layer", type=int, metavar="L",
                        help="the layer to steer; default: the one in the middle")
    parser.add_argument("--strength", type=float, default=1.0, metavar="X",
                        help="how many times the vector is added")
    parser.add_argument("--prompt", default="I opened the door and", metavar="TEXT",
                        help="what to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N",
                        help="an answer's tokens, at most")
    with user_errors(parser):
        args = parser.parse_args()
        model, tokenizer = load(args.checkpoint, device="cpu", dtype=torch.float32)
        n = model.config.n_layers
        layer = n // 2 if args.layer is None else args.layer
        if not 0 <= layer < n:
            raise ValueError(f"--layer {layer}: this model has layers 0 to {n - 1}")
        towards, away = (mean_activation(model, tokenizer, layer, prompts)
                         for prompts in (TOWARDS, AWAY))
        for strength in (0, args.strength, -args.strength):
            vector = strength * (towards - away)
            with hooked(model.layers[layer], lambda x, vector=vector: x + vector):
                text = continuation(model, tokenizer, args.prompt, args.max_new_tokens)
            print(f"{strength:+.1f}  {args.prompt}{text}")


if __name__ == "__main__":
    main()
