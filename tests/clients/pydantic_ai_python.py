import pydantic
from checks import BASE, MODEL, QUESTION, check
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Cat(pydantic.BaseModel):
    tame: bool


model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key="none"))
settings = {"max_tokens": 100}


async def stream():
    async with Agent(model, model_settings=settings).run_stream(QUESTION) as found:
        return [text async for text in found.stream_text()]


check("run", lambda: Agent(model, model_settings=settings).run_sync(QUESTION).output)
check("stream", stream)
check("output by schema", lambda: Agent(model, output_type=NativeOutput(Cat)).run_sync(
    QUESTION).output)
check("output by a tool", lambda: Agent(model, output_type=Cat).run_sync(QUESTION).output)
