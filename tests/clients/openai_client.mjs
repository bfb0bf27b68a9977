// Drives a server with the openai package of npm: `node openai_client.mjs http://HOST:PORT/v1`.
// Prints one JSON object; anything unexpected ends it with an error.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({baseURL: process.argv[2], apiKey: "none", maxRetries: 0});
const messages = [{role: "user", content: "Tell me of the sea."}];
const wanted = {model: "demo", messages, max_completion_tokens: 16, seed: 3, temperature: 0.8};

const models = [];
for await (const model of await client.models.list()) models.push(model.id);
assert.ok(models.includes("demo"));

const whole = await client.chat.completions.create(wanted);
const text = whole.choices[0].message.content;

let streamed = "", usage = null;
const stream = await client.chat.completions.create(
  {...wanted, stream: true, stream_options: {include_usage: true}});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, text);
assert.deepEqual(usage, whole.usage);

const runner = client.chat.completions.stream(wanted);
assert.equal((await runner.finalChatCompletion()).choices[0].message.content, text);

const plain = await client.completions.create(
  {model: "demo", prompt: "The user can", max_tokens: 5, temperature: 0, logprobs: 2});
assert.equal(plain.choices[0].logprobs.tokens.length, plain.usage.completion_tokens);

const response = await client.responses.create(
  {model: "demo", input: messages, max_output_tokens: 16});
assert.ok(response.output_text.length > 0);
let deltas = "";
for await (const event of await client.responses.create(
  {model: "demo", input: messages, max_output_tokens: 16, stream: true})) {
  if (event.type === "response.output_text.delta") deltas += event.delta;
}
assert.ok(deltas.length > 0);

const forced = await client.chat.completions.create({
  ...wanted, max_completion_tokens: 64, tool_choice: {type: "function", function: {name: "tide"}},
  tools: [{type: "function", function: {name: "tide", parameters: {
    type: "object", properties: {high: {type: "boolean"}}, required: ["high"],
    additionalProperties: false}}}],
});
const call = forced.choices[0].message.tool_calls[0].function;
assert.equal(call.name, "tide");
assert.equal(typeof JSON.parse(call.arguments).high, "boolean");

const refused = await client.chat.completions.create({...wanted, max_tokens: -1}).catch((e) => e);
assert.ok(refused instanceof OpenAI.BadRequestError, String(refused));
const unknown = await client.models.retrieve("another").catch((e) => e);
assert.ok(unknown instanceof OpenAI.NotFoundError, String(unknown));

const leaver = await client.chat.completions.create({...wanted, max_completion_tokens: 400, stream: true});
for await (const _ of leaver) break;  // leaves, which aborts it
console.log(JSON.stringify({text, usage}));
