// Files of many jobs: drop one, watch it, take its results.

import { call, download, jsonLines, wordsOf } from "./api.js";
import { announce, element, find, keyed, notify, poll, setText } from "./dom.js";
import { bytes, count, duration, plural, rate, shorten, time } from "./format.js";

const PAGE = 10;
const SHOWN_ERRORS = 20;
const SHOWN_IMAGES = 24;
const FINAL = ["completed", "failed", "expired", "cancelled"];
const WORDS = {
  validating: "reading the file", in_progress: "running", finalizing: "writing the results", cancelling: "cancelling",
  completed: "done", failed: "refused", expired: "expired", cancelled: "cancelled",
};

let older = []; // pages after the first, which are not looked at again
let look = () => {};

export function startBatches(wanted) {
  const drop = find("#drop"), input = find("#batch-file");
  input.addEventListener("change", () => {
    if (input.files[0]) submit(input.files[0]);
    input.value = "";
  });
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files[0]) submit(event.dataTransfer.files[0]);
  });
  find("#batches-more").addEventListener("click", showOlder);
  look = poll(refresh, 1, wanted);
  return look;
}

/** Upload a file and submit it; which kind of lines it has, its first one tells. */
async function submit(file) {
  const note = find("#batches-note");
  note.textContent = `Uploading ${file.name}, ${bytes(file.size)}…`;
  try {
    const form = new FormData();
    form.append("purpose", "batch");
    form.append("file", file, file.name);
    const stored = await call("v1/files", { method: "POST", body: form });
    const endpoint = await endpointOf(file);
    const metadata = { file: shorten(file.name, 200) };
    await call("v1/batches", { method: "POST", body: { input_file_id: stored.id, endpoint, completion_window: "24h", metadata } });
    announce(`Batch of ${file.name} submitted.`);
    await refresh();
  } catch (problem) {
    notify(wordsOf(problem), problem.detail ?? String(problem));
  } finally {
    note.textContent = "";
  }
}

async function endpointOf(file) {
  const [first] = (await file.slice(0, 65_536).text()).split("\n", 1);
  try {
    if ("body" in JSON.parse(first)) return "/v1/images/generations";
  } catch {
    // The gateway says what is wrong with it.
  }
  return "/v1/jobs";
}

async function refresh() {
  try {
    const page = await call(`v1/batches?limit=${PAGE}`);
    const seen = new Set(page.data.map((batch) => batch.id));
    show([...page.data, ...older.filter((batch) => !seen.has(batch.id))]);
    if (!older.length) find("#batches-more").hidden = !page.has_more;
  } catch (problem) {
    notify(wordsOf(problem), problem.detail ?? String(problem), { seconds: 10 });
    throw problem;
  }
}

async function showOlder() {
  const last = find("#batch-list").lastElementChild?.dataset.key;
  try {
    const page = await call(`v1/batches?limit=${PAGE}&after=${last}`);
    older = [...older, ...page.data];
    find("#batches-more").hidden = !page.has_more;
    await refresh();
  } catch (problem) {
    notify(wordsOf(problem), problem.detail);
  }
}

function show(batches) {
  keyed(find("#batch-list"), batches, (batch) => batch.id, create, update);
  if (!batches.length) find("#batches-note").textContent = "No batch yet.";
  else if (find("#batches-note").textContent === "No batch yet.") find("#batches-note").textContent = "";
}

function create(batch) {
  return element(
    "li",
    { class: "panel batch" },
    element(
      "div",
      { class: "batch-head" },
      element("h2", {}, batch.metadata?.file ?? batch.id),
      element("span", { class: "batch-status" }),
    ),
    element("progress", { max: "1", value: "0", "aria-label": "Progress of the batch" }),
    element("p", { class: "batch-words" }),
    element("p", { class: "hint" }, `${batch.id}, submitted ${time(batch.created_at)}`),
    element("p", { class: "actions" }),
    element("div", { class: "batch-results" }),
  );
}

function update(card, batch) {
  const { calotype, request_counts: counts, status } = batch;
  const final = FINAL.includes(status), words = calotype.paused && !final ? "paused" : WORDS[status];
  if (card.dataset.status && card.dataset.status !== status && final) announce(`Batch ${words}.`);
  card.dataset.status = status;
  setText(find(".batch-status", card), words);
  find("progress", card).value = status === "completed" ? 1 : calotype.progress;
  const said = [`${count(counts.completed)} of ${plural(counts.total, "line")} done`];
  if (counts.failed) said.push(`${count(counts.failed)} failed`);
  if (!final && calotype.jobs_a_second > 0) said.push(`${rate(calotype.jobs_a_second)} jobs/s`);
  if (!final && calotype.seconds_left !== null) said.push(`about ${duration(calotype.seconds_left)} left`);
  for (const problem of batch.errors?.data ?? []) said.push(problem.message);
  setText(find(".batch-words", card), counts.total || batch.errors ? said.join(" · ") : "Counting its lines…");
  const offers = [];
  if (!final && status === "in_progress") {
    offers.push(calotype.paused ? ["Resume", () => steer(batch, "resume")] : ["Pause", () => steer(batch, "pause")]);
  }
  if (!final && status !== "cancelling") offers.push(["Cancel", () => steer(batch, "cancel")]);
  if (batch.output_file_id) {
    offers.push(["Show images", () => showImages(card, batch)]);
    offers.push(["Output file", () => save(batch.output_file_id, `${batch.id}_output.jsonl`)]);
  }
  if (batch.error_file_id) {
    offers.push(["Show errors", () => showErrors(card, batch)]);
    offers.push(["Error file", () => save(batch.error_file_id, `${batch.id}_errors.jsonl`)]);
    if (final) offers.push(["Retry what failed", () => steer(batch, "retry")]);
  }
  keyed(find(".actions", card), offers, ([label]) => label, ([label, act]) =>
    element("button", { type: "button", class: "small", on: { click: act } }, label));
}

async function steer(batch, verb) {
  try {
    await call(`v1/batches/${batch.id}/${verb}`, { method: "POST" });
    await refresh();
  } catch (problem) {
    notify(wordsOf(problem), problem.detail);
  }
}

async function save(file, name) {
  try {
    const url = URL.createObjectURL(await download(`v1/files/${file}/content`));
    const link = element("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  } catch (problem) {
    notify(wordsOf(problem), problem.detail);
  }
}

async function first(file, most) {
  const found = [];
  for await (const line of jsonLines(`v1/files/${file}/content`)) {
    found.push(line);
    if (found.length >= most) break;
  }
  return found;
}

async function showErrors(card, batch) {
  try {
    const errors = await first(batch.error_file_id, SHOWN_ERRORS);
    const rows = errors.map((error) =>
      element("tr", {}, element("td", {}, error.line ?? "–"), element("td", {}, error.custom_id ?? "–"),
        element("td", {}, error.error?.message ?? error.state ?? "–")));
    const table = element(
      "table",
      { class: "plain" },
      element("caption", {}, errors.length < SHOWN_ERRORS ? "Lines that failed" : `The first ${SHOWN_ERRORS} lines that failed`),
      element("thead", {}, element("tr", {}, ["Line", "Id", "Why"].map((head) => element("th", { scope: "col" }, head)))),
      element("tbody", {}, rows),
    );
    find(".batch-results", card).replaceChildren(
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Lines that failed" }, table));
  } catch (problem) {
    notify(wordsOf(problem), problem.detail);
  }
}

async function showImages(card, batch) {
  try {
    const { data } = await call(`v1/batches/${batch.id}/images?limit=${SHOWN_IMAGES}`);
    const tiles = data.map(({ custom_id: id, seed, url }) =>
      element("li", { class: "tile" },
        element("a", { href: url, target: "_blank", rel: "noopener noreferrer", class: "tile-link" },
          element("img", { src: url, alt: `${id}, seed ${seed}`, loading: "lazy" })),
        element("span", { class: "hint" }, id)));
    find(".batch-results", card).replaceChildren(element("ul", { class: "grid small-tiles" }, tiles));
  } catch (problem) {
    notify(wordsOf(problem), problem.detail);
  }
}
