// One request to the server behind the page, read as it streams.

const api = new URL("../v1/", document.baseURI);

/** The one line that an answer with an error says. */
async function errorLine(response) {
  const text = await response.text();
  let message = text;
  try {
    const { error, detail } = JSON.parse(text);
    message = error?.message ?? error ?? detail ?? text;
  } catch { /* not JSON: the text itself */ }
  if (response.status === 401) message = `${message}: the server wants an API key, or another one`;
  return `${response.status}: ${String(message).replace(/\s+/g, " ")}`;
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

export async function getModels(key) {
  const response = await fetch(new URL("models", api), { headers: headers(key) });
  if (!response.ok) throw new Error(await errorLine(response));
  return (await response.json()).data.map((model) => model.id);
}

export const address = (path) => new URL(path, api).href;

/** Events of a stream, one after another; ends early, without an error, when `signal` aborts. */
export async function* events(path, body, key, signal) {
  const response = await fetch(address(path), {
    method: "POST", headers: headers(key), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw new Error(await errorLine(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server ended the stream before the answer was whole");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(String(event.error.message ?? event.error).replace(/\s+/g, " "));
      yield event;
    }
  }
}
