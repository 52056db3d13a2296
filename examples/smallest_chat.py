"""The smallest conversation without end: python -m examples.smallest_chat (Ctrl-D leaves)."""

import argparse
import sys

from cli import show, user_errors
from generate import generate, load, make_cache


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="smollm2", metavar="NAME")
    with user_errors(parser):
        model, tokenizer = load(parser.parse_args().checkpoint)
        cache, last_id = make_cache(model), None
        show("> ")
        for line in sys.stdin:
            if last_id is None:
                ids = tokenizer.first_turn(line.strip())
            else:
                ids = tokenizer.next_turn(line.strip(), last_id)
            text = tokenizer.stream()
            for last_id in generate(model, cache, ids, 256, temperature=0.7, top_p=0.9):
                show(text(last_id))
            show(f"{text(None)}\n> ")


if __name__ == "__main__":
    main()
