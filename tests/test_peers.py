"""The peers that bench times compute what our model does, or the comparison would not be fair."""

import pytest
import torch

from bench import peers
from generate import generate, load, make_cache
from helpers import TINY

CONFIG = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              intermediate_size=48, vocab_size=64, max_position_embeddings=128)


def wider(model):
    """A model whose logits differ clearly: with random weights of the usual size they hardly do."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """StreamingLLM's model and ours, float32, with the same weights."""
    torch.manual_seed(0)
    theirs = wider(peers.llama(CONFIG, torch.float32, torch.device("cpu")))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    return theirs, load(folder, device="cpu")[0]


@pytest.mark.parametrize("n_sink", [0, 1, 4])
def test_streaming_evicting_a_token_at_a_time_is_our_stream(both, n_sink):
    theirs, ours = both
    cache, past = make_cache(ours, n_sink, 20), peers.streaming_past(theirs)
    token, ids = torch.tensor([[5]]), set()
    for position in range(120):
        expected = peers.streaming_forward(theirs, past, token)
        peers.evict(past, n_sink, 19)
        logits = ours(token, cache)
        assert torch.allclose(logits, expected, atol=2e-4), position
        token = logits.argmax(-1) if position % 3 else torch.tensor([[position % 64]])
        ids.add(int(token))
    assert past[0][0].shape[2] == n_sink + 19 and len(ids) > 20


def test_a_turn_within_the_window_is_our_greedy_answer(both):
    theirs, ours = both
    past, cache, last = peers.streaming_past(theirs), make_cache(ours, 4, 60), []
    for prompt in ([3, 1, 4, 1, 5], [9, 2, 6]):  # their last token is not in their cache yet
        answer = list(peers.streaming_turn(theirs, past, last + prompt, 12, 4, 60))
        assert answer == list(generate(ours, cache, prompt, 12, stop_ids=()))
        last = answer[-1:]


def test_room_is_made_for_a_whole_turn(both):
    past = peers.streaming_past(both[0])
    for coming, kept in ((30, 0), (30, 4), (0, 23), (3, 20), (8, 15)):
        before = past[0][0]
        peers.evict(past, 4, 19, coming)
        after = past[0][0]
        assert after.shape[2] == min(kept, before.shape[2])
        assert torch.equal(after[:, :, 4:], before[:, :, before.shape[2] - after.shape[2] + 4:])
        peers.streaming_forward(both[0], past, torch.arange(30)[None])
        peers.evict(past, 4, 19)


def test_static_batches_pad_and_run_to_the_longest():
    peers.static_batches(CONFIG, torch.float32, torch.device("cpu"))([[1], [2] * 40, [3] * 7], 5)
