// The queues, the workers, and every row of their step batches as they run.

import { call, wordsOf } from "./api.js";
import { deadInWords, startDead } from "./dead.js";
import { element, find, keyed, notify, poll, setText } from "./dom.js";
import { count, duration, plural, rate } from "./format.js";
import { openImage } from "./viewer.js";

const REMEMBERED = 60; // seconds
const SVG = "http://www.w3.org/2000/svg";

const past = new Map(); // by worker: looks
let looked = 0;

export function startFleet(wanted) {
  poll(refresh, 1, wanted);
  const lookAtDead = startDead(wanted);
  return () => {
    refresh().catch(() => {});
    lookAtDead();
  };
}

async function refresh() {
  try {
    const fleet = await call("v1/fleet");
    if (fleet.at <= looked) return;
    looked = fleet.at;
    for (const worker of fleet.workers) remember(worker, fleet.at);
    const alive = new Set(fleet.workers.map((worker) => worker.name));
    for (const name of past.keys()) if (!alive.has(name)) past.delete(name);
    showFigures(fleet);
    showQueues(fleet.queues);
    keyed(find("#workers"), fleet.workers, (worker) => worker.name, createWorker, (card, worker) => updateWorker(card, worker, fleet.at));
    find("#no-workers").hidden = fleet.workers.length > 0;
  } catch (problem) {
    notify(wordsOf(problem), problem.detail ?? String(problem), { seconds: 10 });
    throw problem;
  }
}

function remember(worker, at) {
  if (!past.has(worker.name)) past.set(worker.name, []);
  const looks = past.get(worker.name), last = looks.at(-1);
  // Workers report once a second: one that seems to stand still may only not have reported again yet.
  if (last && last.passes === worker.forward_passes && at - last.at < 2.5) return;
  looks.push({ at, passes: worker.forward_passes, rows: worker.rows, images: worker.images });
  while (looks[0].at < at - REMEMBERED) looks.shift();
}

/** What changed over the last `seconds`, by the second. */
function pace(name, seconds) {
  const looks = past.get(name) ?? [], last = looks.at(-1);
  const first = looks.find((one) => one.at >= last.at - seconds);
  if (!first || first === last) return { passes: 0, rows: 0, images: 0 };
  const passed = last.at - first.at, passes = last.passes - first.passes;
  return { passes: passes / passed, rows: passes ? (last.rows - first.rows) / passes : 0, images: (last.images - first.images) / passed };
}

const waits = (number) => (number ? `${count(number)} more wait for a place` : "all have a place");
const sum = (values) => values.reduce((total, value) => total + value, 0);

function showFigures(fleet) {
  const lanes = Object.fromEntries(["interactive", "bulk"].map((lane) => {
    const own = fleet.queues.filter((queue) => queue.lane === lane);
    return [lane, { waiting: sum(own.map((queue) => queue.waiting)), oldest: Math.max(0, ...own.map((queue) => queue.oldest_wait_seconds ?? 0)) }];
  }));
  const groups = fleet.workers.flatMap((worker) => worker.groups);
  const images = sum(fleet.workers.map((worker) => pace(worker.name, 15).images));
  const memory = sum(fleet.workers.map((worker) => worker.out_of_memory));
  const said = ({ waiting, oldest }) => (waiting ? `oldest for ${duration(oldest)}` : "nobody waits");
  const figures = [
    ["Interactive", count(lanes.interactive.waiting), said(lanes.interactive)],
    ["Bulk", count(lanes.bulk.waiting), said(lanes.bulk)],
    ["In step batches", count(sum(groups.map((group) => group.running))), waits(sum(groups.map((group) => group.waiting)))],
    ["Images a second", rate(images), fleet.jobs_a_second === null ? "over 15 s" : `${rate(fleet.jobs_a_second)} jobs/s lately`],
    ["Errors", count(sum(fleet.workers.map((worker) => worker.failed))), [deadInWords(), memory && `${plural(memory, "time")} out of memory`].filter(Boolean).join(", ")],
  ];
  keyed(find("#figures"), figures, ([label]) => label,
    ([label]) => element("div", {}, element("dt", {}, label), element("dd", {}, element("span", { class: "figure" }), element("span", { class: "hint" }))),
    (box, [, value, detail]) => {
      setText(find(".figure", box), value);
      setText(find(".hint", box), detail);
    });
}

function showQueues(queues) {
  keyed(find("#queues"), queues, (queue) => queue.name,
    (queue) => element("tr", {}, element("th", { scope: "row" }, queue.lane), element("td", {}, queue.models.join(" + ")),
      element("td", { class: "number" }), element("td", { class: "number" })),
    (row, queue) => {
      setText(row.children[2], count(queue.waiting));
      setText(row.children[3], queue.oldest_wait_seconds === null ? "–" : duration(queue.oldest_wait_seconds));
    });
}

function createWorker(worker) {
  return element(
    "li",
    { class: "panel worker" },
    element("div", { class: "worker-head" }, element("h3", {}, worker.name), element("span", { class: "state" })),
    element("p", { class: "hint worker-words" }),
    element("figure", { class: "spark" }, chart(), element("figcaption", { class: "hint" })),
    element("div", { class: "groups" }),
    element("p", { class: "hint idle" }, "Nothing to do."),
  );
}

function updateWorker(card, worker, at) {
  const lately = pace(worker.name, 15);
  setText(find(".state", card), worker.draining ? "leaving" : worker.groups.length ? "working" : "idle");
  setText(find(".worker-words", card), [
    worker.device, `up for ${duration(at - worker.started_at)}`, plural(worker.images, "image"),
    `${rate(lately.passes)} steps/s`, plural(worker.failed, "error"),
  ].join(" · "));
  draw(find(".spark", card), worker.name);
  keyed(find(".groups", card), worker.groups, (group) => `${group.model} ${group.width}x${group.height}`, createGroup, updateGroup);
  find(".idle", card).hidden = worker.groups.length > 0;
}

function chart() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 240 40");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const area = document.createElementNS(SVG, "path");
  svg.append(area);
  return svg;
}

/** Rows a step over the last minute, as an area and as words. */
function draw(figure, name) {
  const looks = past.get(name) ?? [];
  const points = looks.slice(1).map((look, index) => {
    const before = looks[index], passes = look.passes - before.passes;
    return { at: look.at, rows: passes > 0 ? (look.rows - before.rows) / passes : 0 };
  });
  const most = Math.max(0, ...points.map((point) => point.rows)), end = points.at(-1)?.at;
  const x = (point) => (240 * (1 - (end - point.at) / REMEMBERED)).toFixed(1);
  const line = points.map((point) => `${x(point)} ${(39 - (37 * point.rows) / Math.max(4, most)).toFixed(1)}`);
  find("path", figure).setAttribute("d", line.length > 1 ? `M${x(points[0])} 41 L${line.join(" L")} L240 41 Z` : "");
  setText(find("figcaption", figure), `Rows a step: ${rate(pace(name, 15).rows)} over 15 s, at most ${rate(most)} in a minute`);
}

function createGroup(group) {
  return element(
    "div",
    { class: "group" },
    element("h4", {}, `${group.model} ${group.width} × ${group.height}`),
    element("p", { class: "hint" }),
    element("ol", { class: "rows", "aria-label": "Rows of the step batch" }),
  );
}

function updateGroup(box, group) {
  const rows = sum(group.rows.map((row) => (row.guided ? 2 : 1)));
  const words = [`${rows} of ${plural(group.budget, "row")}`, plural(group.running, "image")];
  if (group.waiting) words.push(`${count(group.waiting)} waiting`);
  if (group.decoding) words.push(`${count(group.decoding)} being decoded`);
  if (group.running > group.rows.length) words.push(`the first ${group.rows.length} are shown`);
  setText(find(".hint", box), words.join(" · "));
  keyed(find(".rows", box), group.rows, (row) => (row.job ? `${row.job}/${row.image}` : `other ${row.guided}`), createRow, updateRow);
}

function createRow(row) {
  const name = row.job
    ? element("button", { type: "button", class: "row-name", title: row.prompt, on: { click: () => openJob(row.job) } }, row.prompt)
    : element("span", { class: "row-name stranger" }, "another tenant’s");
  return element(
    "li",
    { class: row.job ? "row" : "row stranger" },
    name,
    element("span", { class: "tracks", "aria-hidden": "true" }, element("span", { class: "track" }), row.guided && element("span", { class: "track" })),
    element("span", { class: "row-step" }),
    element("span", { class: "row-kind" }, row.guided ? "guided" : "plain"),
  );
}

function updateRow(line, row) {
  line.style.setProperty("--done", row.total_steps ? row.step / row.total_steps : 0);
  line.style.setProperty("--steps", Math.min(row.total_steps, 60) || 1);
  const step = find(".row-step", line);
  const said = `${row.step}/${row.total_steps}`;
  if (step.dataset.said === said) return;
  step.dataset.said = said;
  step.replaceChildren(element("span", { "aria-hidden": "true" }, said),
    element("span", { class: "visually-hidden" }, `step ${row.step} of ${row.total_steps}, `));
}

async function openJob(id) {
  try {
    openImage(await call(`v1/jobs/${id}`), 0);
  } catch (problem) {
    notify(wordsOf(problem), problem.detail);
  }
}
