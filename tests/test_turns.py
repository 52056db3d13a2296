"""Conversations in the forms that released models use, against transformers' apply_chat_template.

The templates are written here, after those of the models that they are named for.
"""

import json
import re
import shutil

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.tokenization_utils_base import generate_merges

from tokenizer import Tokenizer

CORPUS = ["Hello there, said the cat. USER: it sat on the mat. ASSISTANT: the end.\n\nSo?"] * 20
TURNS = ["Hi there, cat.", " Is it <late>?\n", "So  long"]
ANSWERS = ["Hello.", "It sat on\nthe mat", "Yes"]

LLAMA2 = (  # a BOS a turn, the system turn inside the user's, and a check of the order
    "{% set system = messages[0].content if messages[0].role == 'system' %}"
    "{% for m in (messages[1:] if system else messages) %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MISTRAL_V1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if not loop.first %} {% endif %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}")
MISTRAL_V3 = (  # the system turn stands in the last question
    "{% set system = messages[0].content if messages[0].role == 'system' %}"
    "{{ bos_token }}{% for m in (messages[1:] if system else messages) %}"
    "{% if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
MISTRAL_V7 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}[SYSTEM_PROMPT] {{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
QWEN3 = (  # drops the reasoning of earlier answers
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1].lstrip('\n') "
    "if m.role == 'assistant' else m.content %}"
    "<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}")
DEEPSEEK = (  # the generation prompt begins to think
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}")
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
MONARCH = (  # BOS begins every turn
    "{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}")
GLM = (  # nothing ends a turn but the next turn's mark
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
BOS_IS_EOS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}")

# Of each form: template, bos_token, eos_token. VICUNA has no template of its own.
FORMS = {
    "llama2": (LLAMA2, "<s>", "</s>"), "llama3": (LLAMA3, "<s>", "<|eot_id|>"),
    "mistral-v1": (MISTRAL_V1, "<s>", "</s>"), "mistral-v3": (MISTRAL_V3, "<s>", "</s>"),
    "mistral-v7": (MISTRAL_V7, "<s>", "</s>"), "qwen3": (QWEN3, None, "<|im_end|>"),
    "deepseek": (DEEPSEEK, "<s>", "<｜end▁of▁sentence｜>"), "zephyr": (ZEPHYR, "<s>", "</s>"),
    "monarch": (MONARCH, "<s>", "</s>"), "glm": (GLM, "<|user|>", "<|user|>"),
    "gemma": (GEMMA, "<s>", "</s>"), "chatml": (CHATML, "<s>", "<|im_end|>"),
    "bos-is-eos": (BOS_IS_EOS, "</s>", "</s>"), "vicuna": (None, "<s>", "</s>")}
MARKS = ["<s>", "</s>", *dict.fromkeys(
    mark for form, _, _ in FORMS.values() for mark in re.findall(
        r"<[|｜][\w▁]+[|｜]>|\[/?[A-Z]\w+\]|<\w+_turn>|<sop>|</?think>", form or "")),
    "<|user|>", "<|system|>", "<|assistant|>"]
WORDS = {"<think>", "</think>"}
N_PIECES = 360  # of the sentencepiece model
VOCABULARIES = ["byte-level", "metaspace", "prepend", "sentencepiece", "sentencepiece-new"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each kind of vocabulary, all with the same marks."""
    root = tmp_path_factory.mktemp("vocabularies")
    marks = dict.fromkeys(MARKS)
    byte_level = tokenizers.Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    metaspace = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    metaspace.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    metaspace.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=420, show_progress=False,
        special_tokens=["<unk>"] + [f"<0x{i:02X}>" for i in range(256)]))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    prepend = tokenizers.Tokenizer.from_str(metaspace.to_str())  # as Llama 2's first tokenizer.json
    prepend.pre_tokenizer = pre_tokenizers.Sequence([])
    prepend.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    for name, made in (("byte-level", byte_level), ("metaspace", metaspace), ("prepend", prepend)):
        saved = json.loads(made.to_str())
        saved["added_tokens"] = []  # the trainer only reserves byte tokens as special ones
        made = tokenizers.Tokenizer.from_str(json.dumps(saved))
        made.add_tokens([tokenizers.AddedToken(mark, special=mark not in WORDS, normalized=False)
                         for mark in marks])
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
        (root / name).mkdir()
        made.save(str(root / name / "tokenizer.json"))
    for name in ("sentencepiece", "sentencepiece-new"):
        (root / name).mkdir()
        with open(root / name / "tokenizer.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CORPUS), model_writer=file, vocab_size=N_PIECES,
                model_type="bpe", byte_fallback=True, minloglevel=2,
                normalization_rule_name="identity", remove_extra_whitespaces=False)
    return root


def of_sentencepiece(folder, settings, marks):
    """transformers' tokenizer of a tokenizer.model, from its pieces and scores."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [library.id_to_piece(i) for i in range(N_PIECES)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(vocab, {p: library.get_score(i) for p, i in vocab.items()})
    theirs = transformers.LlamaTokenizer(vocab, merges, legacy=settings["legacy"])
    theirs.add_tokens([tokenizers.AddedToken(mark, special=mark not in WORDS, normalized=False)
                       for mark in marks])
    theirs.bos_token, theirs.eos_token = settings["bos_token"], settings["eos_token"]
    return theirs


def open_form(folders, tmp_path, vocabulary, form):
    """(our tokenizer, transformers') of a form in a kind of vocabulary."""
    template, bos, eos = FORMS[form]
    folder = shutil.copytree(folders / vocabulary, tmp_path / "form")
    settings = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    if template:
        (folder / "chat_template.jinja").write_text(template)
    if vocabulary.startswith("sentencepiece"):
        settings.update(tokenizer_class="LlamaTokenizer", legacy=vocabulary == "sentencepiece")
        marks = [mark for mark in dict.fromkeys(MARKS) if mark not in ("<s>", "</s>")]
        settings["added_tokens_decoder"] = {
            str(N_PIECES + n): {"content": mark, "special": mark not in WORDS, "normalized": False}
            for n, mark in enumerate(marks)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if vocabulary.startswith("sentencepiece"):
        theirs = of_sentencepiece(folder, settings, marks)
    else:
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    theirs.chat_template = template
    if not template:
        theirs.chat_template = (
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} "
            "{% elif m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
            "{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
    return Tokenizer(folder), theirs


def messages_of(system, n):
    """A conversation up to its n-th question."""
    turns = [{"role": "system", "content": system}] if system is not None else []
    for user, said in zip(TURNS[:n], ANSWERS):
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": said}]
    return turns[:-1]


def ids_of(theirs, messages, **options):
    return theirs.apply_chat_template(messages, **{"add_generation_prompt": True, **options},
                                      return_dict=False)


SYSTEMS = {form: [None, "You are a cat.", " Be kind.\n"] for form in FORMS} | {
    "mistral-v1": [None], "gemma": [None]}
CASES = [(vocabulary, form) for vocabulary in VOCABULARIES for form in FORMS]


@pytest.mark.parametrize("vocabulary, form", CASES)
def test_a_conversations_ids_are_the_templates_own(folders, tmp_path, vocabulary, form):
    ours, theirs = open_form(folders, tmp_path, vocabulary, form)
    for system in SYSTEMS[form]:
        for n in (1, 2, 3):
            messages = messages_of(system, n)
            assert ours.conversation(messages) == ids_of(theirs, messages)
        if system:
            opening = ours.system_turn(system)
            assert opening and opening == ours.conversation(messages_of(system, 1))[:len(opening)]


@pytest.mark.parametrize("vocabulary, form", CASES)
def test_turn_by_turn_the_ids_are_those_of_the_whole(folders, tmp_path, vocabulary, form):
    """But for an answer, which keeps the ids that the model gave it."""
    ours, theirs = open_form(folders, tmp_path, vocabulary, form)
    for n in (1, 2):
        messages = messages_of(None, n)
        said = {"role": "assistant", "content": ANSWERS[n - 1]}
        answered = ids_of(theirs, [*messages, said], add_generation_prompt=False,
                          continue_final_message=True)
        whole = ids_of(theirs, messages_of(None, n + 1))
        following = ours.next_turn(TURNS[n], answered[-1])
        assert answered + following == whole
        assert ours.turns_after(messages_of(None, n + 1), 2 * n - 1, answered[-1]) == following
        # A model that ends its turn says the mark itself.
        end = ours.named_ids.get(ours.chat_template.turn_end)
        if end is not None:
            assert end in ours.turn_end_ids and end in ours.hidden_ids
            assert ours.next_turn(TURNS[n], end) == following[following.index(end) + 1:]
