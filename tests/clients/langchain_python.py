import pydantic
from checks import BASE, MODEL, QUESTION, check
from langchain_openai import ChatOpenAI, OpenAI


class Cat(pydantic.BaseModel):
    """A cat."""

    tame: bool


def weather(city: str) -> str:
    """The weather in a city."""
    return f"Rain in {city}."


chat = ChatOpenAI(base_url=BASE, api_key="none", model=MODEL, max_tokens=100, max_retries=0)
check("invoke", lambda: chat.invoke(QUESTION).content)
check("stream", lambda: [chunk for chunk in chat.stream(QUESTION) if chunk.content])
check("structured output", lambda: chat.with_structured_output(Cat).invoke(QUESTION))
check("bound tools", lambda: chat.bind_tools([weather]).invoke(QUESTION))
check("completions", lambda: OpenAI(base_url=BASE, api_key="none", model=MODEL,
                                    max_tokens=5, max_retries=0).invoke("Once"))
