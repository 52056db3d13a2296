import instructor
import openai
import pydantic
from checks import BASE, MODEL, QUESTION, check


class Cat(pydantic.BaseModel):
    tame: bool


for mode in (instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    client = instructor.from_openai(openai.OpenAI(base_url=BASE, api_key="none"), mode=mode)
    check(mode.name, lambda client=client: client.chat.completions.create(
        model=MODEL, response_model=Cat, max_retries=1, max_tokens=100,
        messages=[{"role": "user", "content": QUESTION}]))
