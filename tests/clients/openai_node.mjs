import OpenAI from "openai";
import {zodResponseFormat} from "openai/helpers/zod";
import {z} from "zod";
import {check, BASE, MODEL, QUESTION} from "./checks.mjs";

const client = new OpenAI({baseURL: BASE, apiKey: "none", maxRetries: 0});
const asked = {model: MODEL, max_tokens: 100, messages: [{role: "user", content: QUESTION}]};

await check("chat", async () => (await client.chat.completions.create(asked)).choices[0].message.content);
await check("stream", async () => {
  let text = "";
  for await (const chunk of await client.chat.completions.create({...asked, stream: true}))
    text += chunk.choices[0]?.delta?.content ?? "";
  return text;
});
await check("parse", async () => (await client.chat.completions.parse({
  ...asked, response_format: zodResponseFormat(z.object({tame: z.boolean()}), "cat"),
})).choices[0].message.parsed);
await check("responses", async () => (await client.responses.create({
  model: MODEL, input: QUESTION, max_output_tokens: 40})).output_text);
