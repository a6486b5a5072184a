// A job as it is being made: previews, progress, and its images in the end.

import { call, events, wordsOf } from "./api.js";
import { announce, element, find, makeAgain, notify, setText } from "./dom.js";
import { STATES, duration, plural, shorten } from "./format.js";
import { openImage, showMedia } from "./viewer.js";

const STREAMS = 3; // at a time: a browser opens six connections to one address, and others are needed too
const KEPT = 20; // cards

let open = 0;

/** Put a card for a job on top, and follow it to its end. */
export function showJob(list, job) {
  const { width, height } = job.config;
  const total = job.config.num_images * (1 + (job.config.ensemble?.length ?? 0));
  const card = element(
    "article",
    { class: "job", "aria-label": shorten(job.config.prompt, 80), data: { job: job.id } },
    element(
      "div",
      { class: total === 1 ? "frames one" : "frames" },
      Array.from({ length: total }, () => frame(width, height)),
    ),
    element("p", { class: "job-prompt" }, shorten(job.config.prompt, 200)),
    element(
      "div",
      { class: "job-state" },
      element("progress", { max: "1", value: "0", "aria-label": "Progress" }),
      element("span", { class: "job-words" }, "queued"),
      element("button", { type: "button", class: "quiet small", data: { cancel: "" }, on: { click: () => cancel(job) } }, "Cancel"),
    ),
  );
  list.prepend(card);
  while (list.children.length > KEPT) list.lastElementChild.remove();
  update(card, job);
  if (job.state in { succeeded: 1, failed: 1, cancelled: 1 }) finish(card, job);
  else follow(card, job);
}

function frame(width, height) {
  const made = element("div", { class: "frame" });
  made.style.setProperty("aspect-ratio", `${width} / ${height}`);
  return made;
}

async function cancel(job) {
  try {
    await call(`v1/jobs/${job.id}/cancel`, { method: "POST" });
  } catch (problem) {
    notify(wordsOf(problem), problem.detail);
  }
}

async function follow(card, job) {
  let seen = job;
  while (card.isConnected) {
    try {
      seen = open < STREAMS ? await stream(card, job) : await call(`v1/jobs/${job.id}`);
      update(card, seen);
      if (seen.finished_at) return finish(card, seen);
      await pause(1);
    } catch (problem) {
      if (problem.status === 404) return fail(card, problem.detail);
      setText(find(".job-words", card), "connection lost; trying again");
      await pause(Math.max(2, problem.retryAfter ?? 0));
    }
  }
}

/** Follow by events until the end, or until the stream breaks: then how far it was. */
async function stream(card, job) {
  const now = { ...job };
  const leave = new AbortController();
  open += 1;
  try {
    for await (const [name, data] of events(`v1/jobs/${job.id}/events`, leave.signal)) {
      if (!card.isConnected) leave.abort();
      if (name === "done") Object.assign(now, data); // the stream ends by itself
      if (name === "state") now.state = data.state;
      if (name === "progress") Object.assign(now, data);
      if (name === "preview") showPreview(card, data);
      else update(card, now);
    }
  } finally {
    open -= 1;
  }
  return now;
}

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

function showPreview(card, preview) {
  const place = find(".frames", card).children[preview.index];
  if (!place) return;
  let image = find("img", place);
  if (!image) {
    image = element("img", { class: "preview", alt: "Preview" });
    place.replaceChildren(image);
  }
  image.src = `data:image/jpeg;base64,${preview.image}`;
  image.alt = `Preview after step ${preview.step}`;
}

function update(card, job) {
  card.dataset.state = job.state;
  const bar = find("progress", card);
  bar.value = job.progress ?? 0;
  let words = STATES[job.state].label;
  if (job.state === "running") {
    words = job.total_steps ? `step ${job.step} of ${job.total_steps}` : "starting";
  }
  setText(find(".job-words", card), words);
}

function finish(card, job) {
  find("[data-cancel]", card)?.remove();
  if (job.state === "failed") return fail(card, job.error?.message ?? "No reason was recorded.", job);
  if (job.state === "cancelled") return fail(card, "Cancelled.", job);
  const frames = [...find(".frames", card).children];
  job.images.forEach((image, index) => {
    const label = `Image ${index + 1} of ${job.images.length}, seed ${image.seed}. Details`;
    const opening = element(
      "button",
      { type: "button", class: "frame-button", "aria-label": label, on: { click: () => openImage(job, index) } },
      showMedia(job, index),
    );
    frames[index]?.replaceChildren(opening);
  });
  const seconds = job.finished_at - job.created_at;
  const words = `${plural(job.images.length, "image")} in ${duration(seconds)}, seed ${job.images[0]?.seed}`;
  tell(card, words, job);
  announce(`Done: ${words}.`);
}

function fail(card, reason, job) {
  for (const place of find(".frames", card).children) place.classList.add("none");
  tell(card, reason, job);
  find(".job-words", card).classList.add("problem");
  announce(`Not made: ${reason}`);
}

function tell(card, words, job) {
  const state = find(".job-state", card);
  find("progress", state)?.remove();
  setText(find(".job-words", state), words);
  if (!job) return;
  state.append(
    element(
      "button",
      { type: "button", class: "quiet small", on: { click: () => makeAgain(job.config, { seed: job.images?.[0]?.seed }) } },
      "Again with changes",
    ),
  );
}
