// The gateway's API: requests with the key where one is needed, errors as `Problem`, events of a job as they come.

const STORED = "calotype-key";

/** An error as the gateway says it: what was wrong, the value, and what to do. */
export class Problem extends Error {
  constructor({ status, title, detail, code, field, value, remedy, retryAfter }) {
    super(detail);
    Object.assign(this, { status, title, detail, code, field, value, remedy, retryAfter });
  }

  static async of(response) {
    const retryAfter = Number(response.headers.get("retry-after")) || undefined;
    let told = {};
    try {
      told = await response.json();
    } catch {
      told = { detail: `The gateway answered ${response.status} and no reason.` };
    }
    if (told.error?.message) told = { detail: told.error.message, code: told.error.code, field: told.error.param };
    return new Problem({ title: titleOf(response.status), ...told, status: response.status, retryAfter });
  }
}

function titleOf(status) {
  if (status === 401) return "An API key is required";
  if (status === 403) return "Not allowed";
  if (status === 404) return "Not found";
  if (status === 429) return "Too much at once";
  return status >= 500 ? "The service is away" : "The request was refused";
}

/** What people read above a problem's detail: a code such as `InvalidRequest` as words. */
export const wordsOf = (problem) => (problem.title ?? "Error").replace(/([a-z])([A-Z])/g, (_, a, b) => `${a} ${b.toLowerCase()}`);

export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set(value) {
    if (value) sessionStorage.setItem(STORED, value);
    else sessionStorage.removeItem(STORED);
  },
};

const LEFT_ALONE_MS = 60_000; // after the key dialog was closed without a key

let asking = null;
let declined = -LEFT_ALONE_MS;
let ask = async () => false;

/** `asker(detail)` asks for a key and resolves to whether there is one now. */
export const askForKeysBy = (asker) => (ask = asker);

async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  if (key.get()) sent.authorization = `Bearer ${key.get()}`;
  if (body !== undefined && !(body instanceof FormData)) {
    sent["content-type"] = "application/json";
    body = JSON.stringify(body);
  }
  try {
    return await fetch(path, { method, body, headers: sent, signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem({ status: 0, title: "No answer", detail: "The gateway cannot be reached. Is it still running?" });
  }
}

/** The response, after asking for a key if one is needed. */
async function answer(path, options) {
  for (;;) {
    const used = key.get();
    const response = await send(path, options);
    if (response.ok) return response;
    const problem = await Problem.of(response);
    if (problem.status !== 401) throw problem;
    if (key.get() !== used) continue; // given meanwhile, by another question
    if (performance.now() - declined < LEFT_ALONE_MS) throw problem;
    asking ??= ask(problem.detail).finally(() => (asking = null));
    if (!(await asking)) {
      declined = performance.now();
      throw problem;
    }
  }
}

/** Ask the gateway; the answer's JSON. Throws Problem. */
export const call = async (path, options) => (await answer(path, options)).json();

/** The lines of a JSONL answer, as they arrive; leaving the loop ends the download. */
export async function* jsonLines(path) {
  for await (const line of lines(await answer(path))) if (line.trim()) yield JSON.parse(line);
}

/** The bytes of an answer. */
export const download = async (path) => (await answer(path)).blob();

/** A job's server-sent events, as [name, data], until the stream ends. */
export async function* events(path, signal) {
  let name = "message", data = [];
  for await (const line of lines(await answer(path, { signal }))) {
    if (line === "") {
      if (data.length) yield [name, JSON.parse(data.join("\n"))];
      [name, data] = ["message", []];
    } else if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split(/\r?\n/);
      rest = parts.pop();
      yield* parts;
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => {});
  }
}
