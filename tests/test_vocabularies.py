"""A folder's token ids are transformers': over the places of added tokens, their flags,
post-processors, `legacy` and the files of a vocabulary. What transformers 4, mistral-common and
llama.cpp give is recorded in tests/tokenizers."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors

sys.path.append(str(Path(__file__).parent / "tokenizers"))

from cases import (
    ADDED,
    FORMS,
    HERE,
    OWN,
    SPLIT_TEXTS,
    TEXTS,
    gguf_cases,
    places,
    slow_folders,
    token,
    with_config,
    write_folder,
)
from export import gguf_metadata, write_gguf

from formats.gguf_file import read_gguf
from formats.gguf_tokenizer import write_tokenizer
from formats.tokenizer_json import TokenizerJson
from formats.tokenizer_model import TokenizerModel
from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
CLASSES = ("LlamaTokenizer", "PreTrainedTokenizerFast", None)
LEGACY = ("absent", True, False)
BYTES_OWN = {"0": token("<s>"), "1": token("</s>")}


def settings_of(cls, legacy="absent", **more):
    """What tokenizer_config.json says of how spaces are put."""
    return {**({"tokenizer_class": cls} if cls else {}),
            **({} if legacy == "absent" else {"legacy": legacy}), **more}


def write(folder, vocabulary, files, change=None):
    """A checkpoint's folder. change(library) is done to a tokenizer.json before it is saved.

    "llama.json" is llama.model's vocabulary as a tokenizer.json of transformers 4's kind, which
    puts a space in front of every part; "both" has the two files."""
    files = {"config": {"model_type": "llama"}, **files}
    source = vocabulary if "." in vocabulary and vocabulary != "llama.json" else "llama.model"
    write_folder(folder, source, files)
    if vocabulary in ("llama.json", "both"):
        library = llama_library()
    elif vocabulary == "bytes.json":
        library = tokenizers.Tokenizer.from_file(str(HERE / vocabulary))
    else:
        return folder
    if vocabulary == "llama.json":
        (folder / "tokenizer.model").unlink()
    if change:
        change(library)
    library.save(str(folder / "tokenizer.json"))
    return folder


def llama_library():
    sp = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "llama.model"))
    vocabulary = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    words = {piece: sp.get_score(i) for piece, i in vocabulary.items() if not (
        sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))}
    merges = [(word[:cut], word[cut:]) for word in sorted(words, key=words.get, reverse=True)
              for cut in range(1, len(word)) if word[:cut] in words and word[cut:] in words]
    library = tokenizers.Tokenizer(models.BPE(
        vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([
        normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


def read_both(folder):
    """(ours, transformers 5's) of a folder."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip("before 5.24 transformers overlooks more and reads tokenizer.model otherwise")
    return Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(ours, theirs, front=(), texts=TEXTS):
    """A rendered template's ids are theirs to the token. So is a raw text's, behind what stands in
    front (BOS), which a text that begins with it itself has once; no EOS is put behind it."""
    front = [theirs.convert_tokens_to_ids(text) for text in front]
    assert ours.front == front
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode_rendered(text) == expected, text
        if expected[:len(front)] != front:
            expected = front + expected
        assert ours.encode(text) == expected, text


def with_post_processor(single):
    def change(library):
        ids = [(text, library.token_to_id(text)) for text in ("<s>", "</s>")]
        library.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return change


# ------------------------------------------------------------------------------ transformers 5

KINDS = ("llama.model", "llama.json", "bytes.json", "both")


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_are_found_wherever_a_file_says_them(tmp_path, kind, cls):
    """Beside a tokenizer.model, transformers 5 overlooks special_tokens_map.json's list. Its ids
    are then those of a folder that says the same in added_tokens_decoder."""
    own = BYTES_OWN if kind == "bytes.json" else OWN
    front = ["<s>"] if kind == "llama.model" else []
    for (place, files), legacy in itertools.product(places(400, own).items(), LEGACY):
        settings = settings_of(cls, legacy, bos_token="<s>", add_bos_token=True)
        ours, theirs = read_both(write(tmp_path / "a", kind, with_config(files, **settings)))
        if (place, kind) == ("map", "llama.model"):
            decoder = {str(400 + i): token(text) for i, text in enumerate(ADDED)}
            settings["added_tokens_decoder"] = {**own, **decoder}
            _, theirs = read_both(write(tmp_path / "b", kind, with_config({}, **settings)))
        assert_same(ours, theirs, front)


@pytest.mark.parametrize("kind", ["llama.model", "llama.json", "both"])
def test_codellama_s_class_puts_one_space_in_front_whatever_the_files_say(tmp_path, kind):
    for legacy, decoder in itertools.product(LEGACY, (OWN, {**OWN, "400": token("<|im_start|>")})):
        files = with_config({}, added_tokens_decoder=decoder, add_bos_token=True,
                            **settings_of("CodeLlamaTokenizer", legacy))
        assert_same(*read_both(write(tmp_path / "a", kind, files)),
                    ["<s>"] if kind == "llama.model" else [])


@pytest.mark.parametrize("kind, cls, legacy", [
    *itertools.product(("llama.model", "llama.json"), ("LlamaTokenizer", None), (True, False)),
    ("bytes.json", None, True)])
def test_flags_of_added_tokens_count(tmp_path, kind, cls, legacy):
    own = BYTES_OWN if kind == "bytes.json" else OWN
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    for values in itertools.product((False, True), repeat=len(names)):
        flags = dict(zip(names, values))
        decoder = {**own, "400": token("<|im_start|>", **flags), "401": token("<|im_end|>"),
                   "402": token("<x>", **flags)}
        settings = settings_of(cls, legacy, bos_token="<s>", add_bos_token=True)
        files = with_config({}, added_tokens_decoder=decoder, **settings)
        assert_same(*read_both(write(tmp_path / "a", kind, files)),
                    ["<s>"] if kind == "llama.model" else [])


FRONTS = {"$A": [], "<s> $A": ["<s>"], "<s> $A </s>": ["<s>"], "$A </s>": [],
          "<s> </s> $A": ["<s>", "</s>"]}  # GLM's has two tokens, too


@pytest.mark.parametrize("single", FRONTS)
@pytest.mark.parametrize("kind", ["llama.json", "bytes.json", "both"])
def test_what_stands_in_front_is_the_post_processor_s(tmp_path, kind, single):
    """Whatever else the file was saved with, and whatever tokenizer_config.json adds to it."""
    def change(library):
        with_post_processor(single)(library)
        library.enable_truncation(4)
        library.enable_padding(pad_id=1, pad_token="</s>", length=16)
        library.model.dropout = 0.9
    for cls, add_bos in itertools.product(CLASSES, ({}, {"add_bos_token": True},
                                                    {"add_bos_token": False})):
        files = with_config({}, bos_token="<s>", **settings_of(cls), **add_bos)
        folder = write(tmp_path / "a", kind, files, change)
        ours = Tokenizer(folder)
        if cls != "LlamaTokenizer" or kind == "bytes.json":  # which transformers reads with dropout
            write(folder, kind, files, with_post_processor(single))
        assert_same(ours, read_both(folder)[1], FRONTS[single])


@pytest.mark.parametrize("cls", [*CLASSES, "LlamaTokenizerFast"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_bos_of_a_tokenizer_model_is_what_the_files_say(tmp_path, cls, family):
    for legacy, (bos, front) in itertools.product(LEGACY, [
            ({}, ["<s>"]), ({"bos_token": None}, []), ({"bos_token": "</s>"}, ["</s>"]),
            ({"bos_token": {"content": "<s>", "__type": "AddedToken"}}, ["<s>"])]):
        for add in (True, False):
            files = {**with_config({}, **settings_of(cls, legacy, add_bos_token=add, **bos)),
                     "config": {"model_type": family}}
            assert_same(*read_both(write(tmp_path / "a", "llama.model", files)),
                        front if add else [])


@pytest.mark.parametrize("files", [{}, {"tokenizer_config": {"bos_token": ""}},
                                   {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}}])
def test_a_tokenizer_model_puts_bos_in_front_where_no_file_says_so(tmp_path, files):
    """As transformers 4 (below), llama.cpp and mistral-common, which the checkpoints were made
    with. transformers 5 puts none."""
    ours = Tokenizer(write(tmp_path / "a", "llama.model", files))
    assert ours.encode("Hello") == [1, *ours.encode_rendered("Hello")] and ours.bos_token == "<s>"


@pytest.mark.parametrize("kind", ["marks.model", "unigram.model", "spaces.model"])
def test_other_vocabularies_of_sentencepiece(tmp_path, kind):
    """Its own marks, unigrams, and spaces that it removes; bytes or an unknown token for the rest.
    (transformers 5's LlamaTokenizer reads all of them as if they were llama.model's kind.)"""
    for legacy in LEGACY:
        files = with_config({}, **settings_of(None, legacy, add_bos_token=True))
        assert_same(*read_both(write(tmp_path / "a", kind, files)), ["<s>"])


def test_marks_of_the_model_itself_are_added_tokens_to_the_llama_class(tmp_path):
    for legacy in LEGACY:
        files = with_config({}, **settings_of("LlamaTokenizer", legacy, add_bos_token=True))
        assert_same(*read_both(write(tmp_path / "a", "marks.model", files)), ["<s>"])


CONFLICTS = {
    "ids with holes": {"tokenizer_config": {"added_tokens_decoder": {
        "405": token("<x>"), "409": token("<|im_start|>")}}},
    "a piece of the vocabulary with another id": {"tokenizer_config": {"added_tokens_decoder": {
        "400": token("USER"), "401": token("<x>")}}},
    "two texts of one id": {"tokenizer_config": {"added_tokens_decoder": {"400": token("<x>")}},
                            "added_tokens": {"<|im_start|>": 400}},
    "two ids of one text": {
        "tokenizer_config": {"added_tokens_decoder": {
            "400": token("<x>"), "401": token("<x>"), "402": token("<|im_start|>")}},
        "added_tokens": {"<|im_start|>": 400, "<x>": 409}},
    "one id twice in a file": {"added_tokens": {"<x>": 400, "<|im_start|>": 400}},
    "flags twice": {"tokenizer_config": {
        "added_tokens_decoder": {"400": token("<x>", lstrip=True)},
        "eos_token": {**token("<x>", rstrip=True), "__type": "AddedToken"}}},
    "flags in the map": {"special_tokens_map": {"eos_token": token("<x>", lstrip=True)},
                         "added_tokens": {"<x>": 400}},
    "names twice": {"tokenizer_config": {"eos_token": "<|im_start|>"},
                    "special_tokens_map": {"eos_token": "<x>"}},
    "an older map": {"tokenizer_config": {"eos_token": "<|im_start|>", "added_tokens_decoder": {}},
                     "special_tokens_map": {"eos_token": "<x>"}},
    "an empty text": {"tokenizer_config": {"added_tokens_decoder": {"400": token("")}}},
}


@pytest.mark.parametrize("kind", ["llama.model", "llama.json", "bytes.json"])
@pytest.mark.parametrize("name", CONFLICTS)
def test_where_files_contradict_each_other_transformers_choice_holds(tmp_path, kind, name):
    files = CONFLICTS[name]
    decoder = files.get("tokenizer_config", {}).get("added_tokens_decoder")
    if decoder is not None:
        own = BYTES_OWN if kind == "bytes.json" else OWN
        files = with_config(files, added_tokens_decoder={**own, **decoder})
    for cls in ("LlamaTokenizer", None):
        settings = settings_of(cls, False, add_bos_token=True, bos_token="<s>")
        ours, theirs = read_both(write(tmp_path / "a", kind, with_config(files, **settings)))
        assert_same(ours, theirs, ["<s>"] if kind == "llama.model" else [])
        if name != "an older map":  # transformers doesn't read that one
            assert ours.eos_token == (theirs.eos_token or ours.eos_token)


def test_an_id_of_the_vocabulary_may_be_given_another_text(tmp_path):
    """As transformers 4 has it, and 5 except in its LlamaTokenizer, which gives a new id."""
    decoder = {**OWN, "300": token("<x>")}
    ours, theirs = (read_both(write(tmp_path / "a", "llama.model", with_config(
        {}, added_tokens_decoder=decoder, add_bos_token=True, **settings_of(cls, False))))[i]
        for i, cls in enumerate(("LlamaTokenizer", None)))
    assert ours.specials["<x>"] == 300
    assert_same(ours, theirs, ["<s>"], [text for text in TEXTS if "<x>" in text])


@pytest.mark.parametrize("kind", ["llama.model", "llama.json", "bytes.json"])
def test_a_name_in_any_file_is_found_and_its_token_is_not_shown(tmp_path, kind):
    """eos_token only in special_tokens_map.json beside a newer file; words that a list calls
    special."""
    files = with_config({"special_tokens_map": {"eos_token": "<|im_end|>"}},
                        additional_special_tokens=["<x>"],
                        added_tokens_decoder={"400": token("<|im_end|>", special=False),
                                              "401": token("<x>", special=False),
                                              "402": token("<think>", special=False)})
    ours = Tokenizer(write(tmp_path / "a", kind, files))
    ids = [ours.specials[text] for text in ("<|im_end|>", "<x>", "<think>")]
    assert ours.eos_token == "<|im_end|>" and ours.eos_id == ids[0]
    assert ours.decode(ids) == "<think>"


# ------------------------------------------------------------------------------ both files


def test_tokenizer_json_is_read_where_both_files_stand_as_transformers_reads_it(tmp_path):
    files = with_config({}, bos_token="<s>", eos_token="</s>")
    folder = write(tmp_path / "a", "both", files, with_post_processor("<s> $A"))
    for contents in (b"", b"SGVsbG8= 0\nSGk= 1\n", (HERE / "marks.model").read_bytes()):
        (folder / "tokenizer.model").write_bytes(contents)  # the second one is tiktoken's
        ours, theirs = read_both(folder)
        assert isinstance(ours.vocabulary, TokenizerJson)
        assert_same(ours, theirs, ["<s>"])


@pytest.mark.parametrize("legacy", [True, False])
def test_without_the_library_of_tokenizer_json_the_other_file_gives_the_same_ids(
        tmp_path, monkeypatch, legacy):
    files = with_config({}, **settings_of(None if legacy else "LlamaTokenizer", legacy))
    folder = write(tmp_path / "a", "both", files, with_post_processor("<s> $A"))
    with_library = Tokenizer(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    without = Tokenizer(folder)
    assert isinstance(without.vocabulary, TokenizerModel)
    for text in TEXTS:
        assert without.encode(text) == with_library.encode(text)
        assert without.encode(text, bos=False) == with_library.encode(text, bos=False)


@pytest.mark.parametrize("kind", ["llama.model", "llama.json", "bytes.json"])
@pytest.mark.parametrize("cls", ["LlamaTokenizer", None])
def test_text_that_goes_on_gets_no_space_in_front(tmp_path, kind, cls):
    """Except behind an added token, where a legacy checkpoint has one."""
    for legacy in LEGACY:
        ours = Tokenizer(write(tmp_path / "a", kind, with_config({}, **settings_of(cls, legacy))))
        for text in ("so", " so", "[INST] Hi"):
            assert ours.decode(ours.encode(text, bos=False)) == text
        after = ours.encode_rendered("</s>so", start=False)
        assert ours.encode_rendered("Hi</s>so") == [*ours.encode_rendered("Hi"), *after]


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_is_one_clear_error(tmp_path, kind):
    ours = Tokenizer(write(tmp_path / "a", kind, {}))
    for encode in (ours.encode, ours.encode_rendered, ours.first_turn):
        with pytest.raises(ValueError, match=r"half a character, '.ud83d', at \d"):
            encode("a\ud83d")


def test_a_panic_of_the_library_is_one_clear_error(tmp_path):
    """It panics where two tokens take the whitespace between them, which is a token itself."""
    files = {"tokenizer_config": {"added_tokens_decoder": {
        "343": token("<x>", rstrip=True), "344": token("\n", lstrip=True)}}}
    ours = Tokenizer(write(tmp_path / "a", "bytes.json", files))
    with pytest.raises(ValueError, match="tokenizer.json cannot encode"):
        ours.encode("<x><x>\n\n")


# ------------------------------------------------------------------------------ recorded ids


def test_ids_are_those_of_transformers_4_s_slow_tokenizer(tmp_path):
    """But where "legacy" is false: at the start of a text 4 writes a space before a space, and
    before a word that was added, and 5 doesn't."""
    recorded = json.loads((HERE / "transformers-4.json").read_text())
    for ((vocabulary, place, legacy), files), (front, *ids) in zip(
            slow_folders().items(), recorded, strict=True):
        ours = Tokenizer(write(tmp_path / "a", vocabulary, files))
        assert ours.front == front
        for text, expected in zip(TEXTS, ids, strict=True):
            begins = text.startswith((" ", "\u2581", *ours.added))
            if legacy is False and begins and expected[:1] == ours.encode_rendered("\u2581"):
                expected = expected[1:]
            assert ours.encode_rendered(text) == expected, (vocabulary, place, legacy, text)


def test_ids_are_mistral_common_s(tmp_path):
    recorded = json.loads((HERE / "mistral-common.json").read_text())
    for version, (vocabulary, text) in FORMS.items():
        files = with_config({}, legacy=False)
        ours = Tokenizer(write(tmp_path / "a", vocabulary, files))
        assert ours.encode_rendered(text) == recorded[version], version


@pytest.mark.parametrize("name", gguf_cases())
def test_a_gguf_vocabulary_s_ids_are_llama_cpp_s(tmp_path, name):
    recorded = json.loads((HERE / "llama.cpp.json").read_text())[name]
    write_gguf(tmp_path / "a.gguf", gguf_metadata(gguf_cases()[name]))
    write_tokenizer(tmp_path, read_gguf(tmp_path / "a.gguf")[0])
    ours = Tokenizer(tmp_path)
    for text, expected in zip(TEXTS + SPLIT_TEXTS, recorded, strict=True):
        if ours.front and text.startswith("<s>"):  # llama.cpp says that BOS is there twice
            assert expected[:2] == 2 * ours.front
            expected = expected[1:]
        assert ours.encode(text) == expected, text


# ------------------------------------------------------------------------------ GGUF


def test_a_gguf_file_s_metadata_are_what_the_package_reads(tmp_path):
    for case in gguf_cases().values():
        path = tmp_path / "a.gguf"
        write_gguf(path, gguf_metadata(case) | {"flags": [True, False], "numbers": [-1, 2],
                                                "floats": [0.5], "none": "", "flag": True})
        theirs = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()
                  if not key.startswith("GGUF.")}
        ours = read_gguf(path)[0]
        assert ours == theirs and list(ours) == list(theirs)
        assert [type(value) for value in ours.values()] == [type(v) for v in theirs.values()]


WRONG = {  # a change of (tokens, types), and what the error names
    "a token twice": (lambda tokens, types: tokens.__setitem__(300, tokens[290]),
                      "token 300 of", "as token 290"),
    "an unknown type": (lambda tokens, types: types.__setitem__(300, 9),
                        "token 300 of", "type 9", "1 to 6"),
    "a byte that is none": (lambda tokens, types: types.__setitem__(300, 6),
                            "token 300 of", "<0x00> to <0xFF>"),
    "a missing byte": (lambda tokens, types: (tokens.__setitem__(5, "five"),
                                              types.__setitem__(5, 1)), "not <0x02>"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_token_that_cannot_be_is_named_and_no_temporary_folder_is(tmp_path, name):
    change, *named = WRONG[name]
    metadata = {f"tokenizer.ggml.{key}": value
                for key, value in gguf_metadata(gguf_cases()["plain"]).items()}
    change(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"])
    with pytest.raises(ValueError) as error:
        write_tokenizer(tmp_path, metadata)
    assert all(word in str(error.value) for word in named) and str(tmp_path) not in str(error.value)
