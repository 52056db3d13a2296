from checks import BASE, MODEL, QUESTION, check
from smolagents import CodeAgent, OpenAIServerModel, ToolCallingAgent

model = OpenAIServerModel(model_id=MODEL, api_base=BASE, api_key="none", max_tokens=100)
messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
check("generate", lambda: model.generate(messages).content)
check("stream", lambda: list(model.generate_stream(messages)))
check("CodeAgent", lambda: str(CodeAgent(tools=[], model=model, max_steps=1).run(QUESTION)))
check("ToolCallingAgent", lambda: str(
    ToolCallingAgent(tools=[], model=model, max_steps=1).run(QUESTION)))
