// Jobs of late, a page at a time, and images side by side.

import { call, wordsOf } from "./api.js";
import { element, find, notify } from "./dom.js";
import { STATES, plural, shorten, time } from "./format.js";
import { facts, openImage, showMedia } from "./viewer.js";

const PAGE = 24; // jobs
const MOST = 6; // images side by side

let next = null;
let turn = 0; // answers to questions that are no longer asked are dropped
const chosen = new Map(); // by job and image

export function startGallery() {
  find("#gallery-state").addEventListener("change", () => load({ fresh: true }));
  find("#gallery-more").addEventListener("click", () => load({ fresh: false }));
  find("#tray-clear").addEventListener("click", clear);
  find("#tray-compare").addEventListener("click", compare);
  return () => load({ fresh: true });
}

async function load({ fresh }) {
  const own = ++turn;
  const grid = find("#gallery-grid"), more = find("#gallery-more"), note = find("#gallery-note");
  const asked = new URLSearchParams({ limit: PAGE });
  const state = find("#gallery-state").value;
  if (state) asked.set("state", state);
  if (!fresh && next) asked.set("after", next);
  more.disabled = true;
  try {
    const page = await call(`v1/jobs?${asked}`);
    if (own !== turn) return;
    const tiles = page.data.flatMap(tilesOf);
    if (fresh) grid.replaceChildren(...tiles);
    else {
      grid.append(...tiles);
      find("button, a", tiles[0] ?? grid)?.focus();
    }
    next = page.next;
    more.hidden = !page.has_more;
    note.textContent = grid.children.length ? (page.has_more ? "" : "That is all there is.") : "Nothing here yet.";
  } catch (problem) {
    notify(wordsOf(problem), problem.detail);
  } finally {
    more.disabled = false;
  }
}

function tilesOf(job) {
  if (!job.images.length) return [unimaged(job)];
  return job.images.map((_, index) => imaged(job, index));
}

function imaged(job, index) {
  const id = `${job.id}-${index}`;
  const choose = element("input", {
    type: "checkbox", class: "choose", "aria-label": `Compare ${shorten(job.config.prompt, 60)}, seed ${job.images[index].seed}`,
  });
  choose.checked = chosen.has(id);
  choose.addEventListener("change", () => pick(id, job, index, choose));
  return element(
    "li",
    { class: "tile", data: { id } },
    element(
      "button",
      { type: "button", class: "tile-button", "aria-label": `Details of ${shorten(job.config.prompt, 100)}, seed ${job.images[index].seed}`,
        on: { click: () => openImage(job, index) } },
      showMedia(job, index, { alt: "" }),
    ),
    element("div", { class: "tile-words" }, element("span", { class: "tile-prompt" }, job.config.prompt),
      element("span", { class: "hint" }, `seed ${job.images[index].seed}`)),
    element("label", { class: "tile-choose" }, choose, element("span", { "aria-hidden": "true" }, "compare")),
  );
}

function unimaged(job) {
  const { mark, label } = STATES[job.state];
  return element(
    "li",
    { class: "tile bare" },
    element(
      "button",
      { type: "button", class: "tile-button", on: { click: () => openImage(job, 0) } },
      element("span", { class: `state ${job.state}` }, element("span", { "aria-hidden": "true" }, mark), ` ${label}`),
      element("span", { class: "tile-prompt" }, shorten(job.config.prompt, 90)),
      job.error && element("span", { class: "problem" }, shorten(job.error.message, 120)),
      element("span", { class: "hint" }, time(job.created_at)),
    ),
  );
}

function pick(id, job, index, box) {
  if (box.checked && chosen.size >= MOST) {
    box.checked = false;
    return notify("Enough to compare", `At most ${MOST} images fit side by side; take one out first.`);
  }
  if (box.checked) chosen.set(id, { job, index });
  else chosen.delete(id);
  showTray();
}

function clear() {
  chosen.clear();
  for (const box of document.querySelectorAll(".choose")) box.checked = false;
  showTray();
  find("#gallery-title").focus();
}

function showTray() {
  find("#tray").hidden = chosen.size === 0;
  find("#tray-text").textContent = `${plural(chosen.size, "image")} chosen`;
  find("#tray-compare").disabled = chosen.size < 2;
}

/** A table: a column an image, a row a setting; rows that differ say so. */
function compare() {
  const images = [...chosen.values()];
  const told = images.map(({ job, index }) => new Map(facts(job, index)));
  const labels = [...new Set(told.flatMap((own) => [...own.keys()]))];
  const rows = labels.map((label) => {
    const values = told.map((own) => String(own.get(label) ?? "–"));
    const differs = new Set(values).size > 1;
    return element(
      "tr",
      { class: differs ? "differs" : "" },
      element("th", { scope: "row" }, label, differs && element("span", { class: "differs-mark" }, "differs")),
      values.map((value) => element("td", {}, value)),
    );
  });
  const heads = images.map(({ job, index }, number) =>
    element("th", { scope: "col" }, element("span", { class: "visually-hidden" }, `Image ${number + 1}`), showMedia(job, index)),
  );
  const table = element(
    "table",
    { class: "comparison" },
    element("thead", {}, element("tr", {}, element("td", {}), heads)),
    element("tbody", {}, rows),
  );
  table.style.setProperty("--images", images.length);
  find("#compare-body").replaceChildren(table);
  find("#compare").showModal();
  find("#compare-title").focus();
}
