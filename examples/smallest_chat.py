"""The smallest conversation without end; Ctrl-D leaves.

    python -m examples.smallest_chat
"""

import sys

from cli import add_checkpoint, plain_parser
from generate import chat_stop_ids, generate, load, make_cache
from terminal import show, user_errors


def main():
    parser = plain_parser(__doc__)
    add_checkpoint(parser, "smollm2")
    with user_errors(parser):
        model, tokenizer = load(parser.parse_args().checkpoint)
        cache, last_id = make_cache(model), None
        ends = chat_stop_ids(model, tokenizer)
        show("> ")
        for line in sys.stdin:
            ids = (tokenizer.first_turn(line.strip()) if last_id is None
                   else tokenizer.next_turn(line.strip(), last_id))
            text = tokenizer.stream()
            for last_id in generate(model, cache, ids, 256, stop_ids=ends, temperature=0.7,
                                    top_p=0.9):
                show(text(last_id))
            show(f"{text(None)}\n> ")


if __name__ == "__main__":
    main()
