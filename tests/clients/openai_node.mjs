// A script written with openai-node, run unchanged against the live server. Prints one JSON object of what it saw.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.CHORALE_URL + "/v1", apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "Tell me a story." }];
const tool = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Bern", "Oslo"] } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};
const schema = {
  type: "object",
  properties: { kind: { enum: ["cat", "dog"] }, is_loud: { type: "boolean" } },
  required: ["kind", "is_loud"],
  additionalProperties: false,
};
const seen = {};

const chat = await client.chat.completions.create({ model: "voice", messages, max_tokens: 12, temperature: 0 });
seen.chat = { text: chat.choices[0].message.content, usage: chat.usage.completion_tokens };

const stream = await client.chat.completions.create({
  model: "voice", messages, max_tokens: 12, temperature: 0, stream: true, stream_options: { include_usage: true },
});
seen.stream = { text: "", usage: null };
for await (const chunk of stream) {
  seen.stream.text += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) seen.stream.usage = chunk.usage.completion_tokens;
}

const called = await client.chat.completions.create({
  model: "tiny", messages, tools: [tool], tool_choice: "required", max_tokens: 200, seed: 3,
});
seen.tool = called.choices[0].message.tool_calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]);

const parsed = await client.chat.completions.parse({
  model: "tiny", messages, max_tokens: 500, seed: 1,
  response_format: { type: "json_schema", json_schema: { name: "pet", strict: true, schema } },
});
seen.pet = JSON.parse(parsed.choices[0].message.content);

const scored = await client.chat.completions.create({
  model: "tiny", messages, max_tokens: 2, temperature: 0, logprobs: true, top_logprobs: 2,
});
seen.logprobs = scored.choices[0].logprobs.content.map((token) => token.top_logprobs.length);

seen.models = [];
for await (const model of client.models.list()) seen.models.push(model.id);
seen.deleted = (await client.models.delete("spare")).deleted;
seen.errors = [];
for (const [model, extra] of [["spare", {}], ["tiny", { n: 10000 }]]) {
  try {
    await client.chat.completions.create({ model, messages, max_tokens: 1, ...extra });
  } catch (error) {
    seen.errors.push([error.constructor.name, error.status, error.code, error.param]);
  }
}
console.log(JSON.stringify(seen));
