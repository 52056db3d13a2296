import openai
from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from checks import BASE, MODEL, QUESTION, check

set_tracing_disabled(True)


@function_tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"Rain in {city}."


def run(kind, **options):
    model = kind(model=MODEL, openai_client=openai.AsyncOpenAI(base_url=BASE, api_key="none",
                                                               max_retries=0))
    agent = Agent("cat", model=model, **options)  # it takes an answer that is cut for an error
    return Runner.run_sync(agent, QUESTION).final_output


check("chat completions", lambda: run(OpenAIChatCompletionsModel))
check("chat completions, a tool", lambda: run(OpenAIChatCompletionsModel, tools=[weather]))
check("responses", lambda: run(OpenAIResponsesModel))
check("responses, a tool", lambda: run(OpenAIResponsesModel, tools=[weather]))
