// Jobs that failed for good: why, and once more.

import { call, wordsOf } from "./api.js";
import { announce, element, find, keyed, notify, poll } from "./dom.js";
import { plural, shorten, time } from "./format.js";
import { openImage } from "./viewer.js";

const PAGE = 20;

let words = "";
let look = () => {};

/** Looks every few seconds while `wanted()`; returns a function that looks at once. */
export function startDead(wanted) {
  look = poll(refresh, 5, wanted);
  return look;
}

/** How many there are. */
export const deadInWords = () => words;

async function refresh() {
  const page = await call(`v1/dead?limit=${PAGE}`);
  keyed(find("#dead"), page.data, (job) => job.id, createDead);
  find("#no-dead").hidden = page.data.length > 0;
  words = page.has_more ? `more than ${page.data.length} dead letters` : plural(page.data.length, "dead letter");
}

function createDead(job) {
  return element(
    "li",
    { class: "panel dead" },
    element("button", { type: "button", class: "row-name", on: { click: () => openImage(job, 0) } }, shorten(job.config.prompt, 120) || job.id),
    element("p", { class: "problem" }, job.error ? `${job.error.code}: ${shorten(job.error.message, 220)}` : "No reason was recorded."),
    element("p", { class: "hint" }, `${time(job.finished_at)} · ${plural(job.attempt, "attempt")} · ${plural(job.crashes, "worker")} lost`),
    element(
      "p",
      { class: "actions" },
      element("button", { type: "button", class: "small", on: { click: () => settle(job, "POST", "/retry", "Submitted again.") } }, "Retry"),
      element("button", { type: "button", class: "quiet small", on: { click: () => settle(job, "DELETE", "", "Taken off the list.") } }, "Drop"),
    ),
  );
}

async function settle(job, method, rest, said) {
  try {
    await call(`v1/dead/${job.id}${rest}`, { method });
    announce(said);
    find("#fleet-title").focus();
  } catch (problem) {
    notify(wordsOf(problem), problem.detail);
  }
  look();
}
