from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from checks import BASE, MODEL, QUESTION, check


def client():
    return OpenAIChatCompletionClient(
        model=MODEL, base_url=BASE, api_key="none", max_tokens=100, max_retries=0,
        model_info={"vision": False, "function_calling": True, "json_output": True,
                    "family": "unknown", "structured_output": True})


def weather(city: str) -> str:
    """The weather in a city."""
    return f"Rain in {city}."


async def create():
    found = await client().create([UserMessage(content=QUESTION, source="user")])
    return found.content


async def agent(**options):
    found = await AssistantAgent("assistant", client(), **options).run(task=QUESTION)
    return found.messages[-1].content


check("create", create)
check("agent, with a name on each message", agent)
check("agent with a tool", lambda: agent(tools=[weather]))
