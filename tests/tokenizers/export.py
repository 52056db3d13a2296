"""Makes the vocabularies in this folder, and records the ids that other libraries give on them.

    python tests/tokenizers/export.py vocabularies     # sentencepiece and tokenizers
    python tests/tokenizers/export.py transformers-4   # transformers 4, sentencepiece, protobuf
    python tests/tokenizers/export.py mistral-common   # mistral-common[sentencepiece]
    python tests/tokenizers/export.py llama.cpp        # llama-cpp-python, gguf, sentencepiece

Each needs an environment of its own. The last three write their name with .json beside this file;
tests/test_vocabularies.py compares ours with these recordings.
"""

import json
import sys
import tempfile
from pathlib import Path

from cases import (
    FORMS,
    HERE,
    MARKS,
    SPLIT_TEXTS,
    TEXTS,
    TURNS,
    gguf_cases,
    slow_folders,
    write_folder,
)

CORPUS = ["Hello there, said the cat. It sat on the mat, and the other cats sat too.",
          "USER: Hi ASSISTANT: [INST] Hi [/INST] user system assistant so two",
          "one two three 123 456", "x = 3; y += 1"] * 30


def make_vocabularies():
    import sentencepiece

    def train(name, **options):
        with open(HERE / name, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CORPUS), model_writer=file, minloglevel=2,
                normalization_rule_name="identity",
                **{"byte_fallback": True, "remove_extra_whitespaces": False, "model_type": "bpe",
                   "vocab_size": 400, **options})

    train("llama.model")
    train("marks.model", user_defined_symbols=["<|im_start|>", "<x>", "  "],
          control_symbols=list(MARKS))
    train("unigram.model", model_type="unigram", vocab_size=320)
    train("spaces.model", remove_extra_whitespaces=True, byte_fallback=False, vocab_size=100)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    library.save(str(HERE / "bytes.json"), pretty=False)


def record_transformers(folder):
    from transformers import LlamaTokenizer
    recorded = []
    for (vocabulary, *_), files in slow_folders().items():
        write_folder(folder, vocabulary, files)
        tokenizer = LlamaTokenizer.from_pretrained(folder)
        recorded.append([tokenizer.encode("a")[:1], *(
            tokenizer.encode(text, add_special_tokens=False) for text in TEXTS)])
    return recorded


def record_mistral(folder):
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    recorded = {}
    for version, (vocabulary, _) in FORMS.items():
        path = folder / f"tokenizer.model.{version}"
        path.write_bytes((HERE / vocabulary).read_bytes())
        messages = [(UserMessage if role == "user" else AssistantMessage)(content=text)
                    for role, text in TURNS]
        request = ChatCompletionRequest(messages=messages)
        recorded[version] = MistralTokenizer.from_file(str(path)).encode_chat_completion(
            request).tokens
    return recorded


def gguf_metadata(case):
    """A GGUF file's metadata of the tokenizer, by the names behind tokenizer.ggml."""
    case = dict(case)
    name = case.pop("model")
    if name.endswith(".json"):
        model = json.loads((HERE / name).read_text())["model"]
        tokens = sorted(model["vocab"], key=model["vocab"].get)
        return {"model": "gpt2", "tokens": tokens, "bos_token_id": 0, "eos_token_id": 1,
                "token_type": [3, 3] + [1] * (len(tokens) - 2),
                "merges": [" ".join(pair) for pair in model["merges"]], **case}
    import sentencepiece
    sp = sentencepiece.SentencePieceProcessor(model_file=str(HERE / name))
    ids = range(sp.get_piece_size())
    more = case.pop("types", {})
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
             for i in ids]
    return {"model": "llama", "tokens": [*(sp.id_to_piece(i) for i in ids), *more],
            "scores": [*(sp.get_score(i) for i in ids), *(-1000.0 for _ in more)],
            "token_type": kinds + list(more.values()), **case}


def write_gguf(path, metadata):
    import gguf
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 1, "context_length": 64, "embedding_length": 32,
                       "feed_forward_length": 32, "attention.head_count": 1}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string,
               list: writer.add_array}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def record_llama_cpp(folder):
    import llama_cpp
    recorded = {}
    for name, case in gguf_cases().items():
        write_gguf(folder / "a.gguf", gguf_metadata(case))
        model = llama_cpp.Llama(str(folder / "a.gguf"), vocab_only=True, verbose=False)
        recorded[name] = [model.tokenize(text.encode(), add_bos=True, special=True)
                          for text in TEXTS + SPLIT_TEXTS]
    return recorded


RECORDERS = {"transformers-4": record_transformers, "mistral-common": record_mistral,
             "llama.cpp": record_llama_cpp}


if __name__ == "__main__":
    if (library := sys.argv[1]) == "vocabularies":
        make_vocabularies()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            recorded = RECORDERS[library](Path(temporary))
        (HERE / f"{library}.json").write_text(json.dumps(recorded) + "\n")
