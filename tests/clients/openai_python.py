import openai
import pydantic
from checks import BASE, MODEL, QUESTION, check

client = openai.OpenAI(base_url=BASE, api_key="none", max_retries=0)
messages = [{"role": "user", "content": QUESTION}]
tools = [{"type": "function", "function": {
    "name": "weather", "description": "The weather in a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]


class Cat(pydantic.BaseModel):
    tame: bool


def ask(**options):
    return client.chat.completions.create(model=MODEL, messages=messages,
                                          **{"max_tokens": 40, **options})


check("chat", lambda: ask().choices[0].message.content)
check("stream", lambda: [c for c in ask(stream=True) if c.choices[0].delta.content])
check("logprobs", lambda: ask(logprobs=True, top_logprobs=5).choices[0].logprobs.content[0].bytes)
check("4,096 tokens", lambda: ask(max_tokens=4096, stop="e").choices)
check("parse", lambda: client.chat.completions.parse(
    model=MODEL, messages=messages, response_format=Cat).choices[0].message.parsed)
check("tools", lambda: ask(tools=tools).choices)
check("a required tool", lambda: ask(
    tools=tools, tool_choice="required", max_tokens=200).choices[0].message.tool_calls)
check("completions", lambda: client.completions.create(
    model=MODEL, prompt="Once", max_tokens=5, echo=True, logprobs=1).choices[0].logprobs.tokens)
check("responses", lambda: client.responses.create(
    model=MODEL, input=QUESTION, max_output_tokens=40).output_text)
check("responses, streamed", lambda: [event for event in client.responses.create(
    model=MODEL, input=QUESTION, max_output_tokens=40, stream=True)
    if event.type in ("response.completed", "response.incomplete")])
check("embeddings", lambda: client.embeddings.create(model=MODEL, input="x"))
