import pydantic
from checks import BASE, MODEL, QUESTION, check
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike


class Cat(pydantic.BaseModel):
    """A cat."""

    tame: bool


def model(**options):
    return OpenAILike(api_base=BASE, api_key="none", model=MODEL, max_tokens=100, max_retries=0,
                      **options)


messages = [ChatMessage(role="user", content=QUESTION)]
check("chat", lambda: model(is_chat_model=True).chat(messages).message.content)
check("stream", lambda: list(model(is_chat_model=True).stream_chat(messages)))
check("complete", lambda: model().complete("Once").text)
check("structured output", lambda: model(
    is_chat_model=True, should_use_structured_outputs=True).structured_predict(
        Cat, PromptTemplate(QUESTION)))
check("structured output by a tool", lambda: model(
    is_chat_model=True, is_function_calling_model=True).structured_predict(
        Cat, PromptTemplate(QUESTION)))
