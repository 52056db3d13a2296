import {createOpenAI} from "@ai-sdk/openai";
import {createOpenAICompatible} from "@ai-sdk/openai-compatible";
import {generateObject, generateText, streamText, tool} from "ai";
import {z} from "zod";
import {check, BASE, MODEL, QUESTION} from "./checks.mjs";

const compatible = createOpenAICompatible({
  name: "ours", baseURL: BASE, apiKey: "none", supportsStructuredOutputs: true})(MODEL);
const openai = createOpenAI({baseURL: BASE, apiKey: "none"});
const asked = {prompt: QUESTION, maxOutputTokens: 100, maxRetries: 0};
const weather = tool({description: "The weather in a city.",
                      inputSchema: z.object({city: z.string()}), execute: async () => "Rain."});

for (const [name, model] of [["openai-compatible", compatible], ["openai, chat", openai.chat(MODEL)],
                             ["openai, its default (responses)", openai(MODEL)]]) {
  await check(`${name}: text`, async () => (await generateText({model, ...asked})).text);
  await check(`${name}: stream`, async () => {
    let text = "";
    for await (const part of streamText({model, ...asked, onError() {}}).fullStream) {
      if (part.type === "error") throw part.error;
      if (part.type === "text-delta") text += part.text;
    }
    return text;
  });
  await check(`${name}: object`, async () => (await generateObject({
    model, ...asked, schema: z.object({tame: z.boolean()})})).object);
  await check(`${name}: a tool`, async () => await generateText({
    model, ...asked, tools: {weather}}));
}
