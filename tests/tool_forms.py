"""Chat templates with tools, in the forms of released models, and a tokenizer with their marks.

The templates are written here, after those of the models that they are named for."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a <city>", "strict": True, "parameters": {
        "type": "object", "additionalProperties": False, "required": ["city", "days"],
        "properties": {"city": {"type": "string", "maxLength": 9, "description": "Größe"},
                       "days": {"type": "integer", "minimum": 1, "maximum": 14}}}}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time"}}
TOOLS = [WEATHER, CLOCK]

HERMES = (  # Hermes, Qwen 2.5 and Qwen 3
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}Tools:{% for tool in tools %}{{ '\n' }}"
    "{{ tool | tojson }}{% endfor %}{{ '\n' }}Call one so:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' or m.role == 'assistant' and not m.tool_calls %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant{% if m.content %}{{ '\n' + m.content }}"
    "{% endif %}{% for call in m.tool_calls %}{% set call = call.function %}{{ '\n' }}<tool_call>\n"
    '{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = (  # the tools stand in the first question, and an answer holds one call
    "{{ bos_token }}{% for m in messages %}"
    "{% set header = 'ipython' if m.role == 'tool' else m.role %}"
    "<|start_header_id|>{{ header }}<|end_header_id|>\n\n"
    "{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}"
    "{% else %}{% if tools and loop.first %}{% for tool in tools %}"
    "{{ tool | tojson(indent=4) }}\n\n{% endfor %}{% endif %}{{ m.content | trim }}{% endif %}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MISTRAL_START = (  # the tools stand before the last question
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}"
    "[/SYSTEM_PROMPT]{% elif m.role == 'user' %}{% if tools and m == asked[-1] %}"
    "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}")
MISTRAL_END = (
    "{{ eos_token }}{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('an id has 9') }}{% endif %}"
    '[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}'
    "[/TOOL_RESULTS]{% endif %}{% endfor %}")
MISTRAL_V7 = MISTRAL_START + (
    "[TOOL_CALLS][{% for call in m.tool_calls %}{{ (call.function | tojson)[:-1] }}, "
    '"id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]') + MISTRAL_END
MISTRAL_V13 = MISTRAL_START + (
    "{{ m.content }}{% for call in m.tool_calls %}[TOOL_CALLS]{{ call.function.name }}"
    "[ARGS]{{ call.function.arguments | tojson }}{% endfor %}") + MISTRAL_END
NO_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
XML = (  # a form of calls that is not read
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}<function="
    "{{ call.function.name }}>{{ call.function.arguments | tojson }}</function>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEMPLATES = {"hermes": HERMES, "llama3": LLAMA3, "mistral-v7": MISTRAL_V7,
             "mistral-v13": MISTRAL_V13}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "<|python_tag|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]",
           "[CALL_ID]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
           "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
WORDS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>"]
ENDS = {"hermes": "<|im_end|>", "llama3": "<|eot_id|>"}  # Mistral's is </s>


def write_tool_tokenizer(folder, form):
    """A byte-level tokenizer.json, in which the marks are tokens, and a form's template."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(
        ['{"name": "get_weather", "arguments": {"city": "Paris"}}'] * 9, trainers.BpeTrainer(
            vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False))
    library.add_special_tokens(SPECIAL)
    library.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in WORDS])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", library.token_to_id("<s>"))])
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": ENDS.get(form, "</s>"),
        "tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text({**TEMPLATES, "none": NO_TOOLS, "xml": XML}[form])
    return folder
