import litellm
from checks import BASE, MODEL, QUESTION, check

asked = dict(api_base=BASE, api_key="none", max_tokens=40,
             messages=[{"role": "user", "content": QUESTION}])
for kind in ("hosted_vllm", "openai"):
    name = f"{kind}/{MODEL}"
    check(f"{kind}, chat", lambda name=name: litellm.completion(
        model=name, **asked).choices[0].message.content)
    check(f"{kind}, stream", lambda name=name: [
        chunk for chunk in litellm.completion(model=name, stream=True, **asked)
        if chunk.choices[0].delta.content])
check("hosted_vllm, as Anthropic's API", lambda: litellm.anthropic.messages.create(
    model=f"hosted_vllm/{MODEL}", **asked) and True)
check("hosted_vllm, text completion", lambda: litellm.text_completion(
    model=f"hosted_vllm/{MODEL}", prompt="Once", api_base=BASE, api_key="none",
    max_tokens=5).choices[0].text)
