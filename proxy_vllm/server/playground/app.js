// The form, and what it sends: one request for each column.

import { address, events, getModels } from "./stream.js";
import { Column, showTables } from "./tokens.js";

const at = (id) => document.getElementById(id);
const settings = await (await fetch("settings.json")).json();
let running = null; // an AbortController while answers stream

const chat = () => document.querySelector("[name=mode]:checked").value === "chat";
const path = () => (chat() ? "chat/completions" : "completions");

/** Alpha as it is sent. The server is the judge of what is a number in its range. */
function alpha() {
  const text = at("alpha").value.trim();
  return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
}

function body(xargs) {
  const system = at("system").value.trim();
  const text = at("prompt").value;
  const said = chat()
    ? { messages: [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: text }] }
    : { prompt: text };
  const seed = at("seed").value;
  return {
    model: at("model").value,
    ...said,
    max_tokens: Number(at("max-tokens").value),
    temperature: Number(at("temperature").value),
    ...(seed !== "" && { seed: Number(seed) }),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    vllm_xargs: xargs,
  };
}

function steered() {
  const coloured = settings.explain && at("colour").checked;
  return { proxy_alpha: alpha(), ...(coloured && { proxy_explain: true }) };
}

/** Titles of the columns, and what each asks of the server. */
const columns = () => [
  ...(at("show-base").checked ? [["base, alpha 0", { proxy_alpha: 0 }]] : []),
  [`proxy, alpha ${alpha()}`, steered()],
  ...(settings.expert && at("show-expert").checked ? [["expert alone", { proxy_member: "expert" }]] : []),
];

function showCurl() {
  const quoted = JSON.stringify(body(steered()), null, 2).replaceAll("'", "'\\''");
  const key = at("key").value ? ` \\\n  -H "Authorization: Bearer $API_KEY"` : "";
  at("curl").textContent =
    `curl -N ${address(path())} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${quoted}'`;
}

function showError(error) {
  at("error").textContent = error ? error.message : "";
}

/** The models that the server names: known only to those who have its key. */
async function loadModels() {
  const names = await getModels(at("key").value);
  const chosen = at("model").value;
  at("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  at("model-row").hidden = names.length < 2;
}

async function fill(column, request, signal) {
  const began = performance.now();
  let ended = "";
  try {
    for await (const { choices: [choice], usage } of events(path(), request, at("key").value, signal)) {
      if (choice) {
        const delta = choice.delta ?? {};
        const text = choice.text ?? (delta.reasoning ?? "") + (delta.content ?? "");
        column.add(text, choice.proxy_explain);
        if (column.entries) at("explain").hidden = false;
        ended = choice.finish_reason ?? ended;
      }
      column.count = usage?.completion_tokens ?? column.count;
      column.say("…");
    }
    const seconds = (performance.now() - began) / 1000;
    column.say(`${ended === "length" ? "at the limit," : "done,"} ${seconds.toFixed(1)} s,`);
  } catch (error) {
    column.say(signal.aborted ? "stopped," : "failed,");
    if (!signal.aborted) throw error;
  }
}

async function send() {
  if (running) return;
  running = new AbortController();
  const { signal } = running;
  showError(null);
  at("answers").replaceChildren();
  at("table").replaceChildren();
  at("explain").hidden = true;
  at("send").disabled = true;
  at("stop").disabled = false;
  try {
    if (!at("model").value) await loadModels();
    showCurl();
    const runs = columns().map(([title, xargs]) =>
      fill(new Column(title, at("answers")), body(xargs), signal));
    const failed = (await Promise.allSettled(runs)).find((run) => run.status === "rejected");
    if (failed) throw failed.reason;
  } catch (error) {
    showError(error);
  } finally {
    running = null;
    at("send").disabled = false;
    at("stop").disabled = true;
  }
}

function showMode() {
  at("system-row").hidden = !chat();
  at("prompt-name").textContent = chat() ? "Message" : "Prompt";
}

const [low, high] = settings.alpha_range;
Object.assign(at("slider"), { min: Math.max(low, -1), max: Math.min(high, 3), value: settings.alpha });
at("alpha").value = settings.alpha;
at("colour-row").hidden = !settings.explain;
at("expert-row").hidden = !settings.expert;
at("slider").addEventListener("input", () => (at("alpha").value = at("slider").value));
at("alpha").addEventListener("input", () => (at("slider").value = at("alpha").value));
at("key").addEventListener("change", () => loadModels().then(() => showError(null), showError).then(showCurl));
at("form").addEventListener("input", () => { showMode(); showCurl(); });
at("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("stop").addEventListener("click", () => running?.abort());
at("copy").addEventListener("click", () => navigator.clipboard.writeText(at("curl").textContent).catch(showError));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
showTables(at("answers"), at("table"));
showMode();
await loadModels().catch(() => {}); // a server with a key: told when something is sent
showCurl();
