// One image, large, with everything that made it.

import { call, wordsOf } from "./api.js";
import { copy, element, find, makeAgain, notify } from "./dom.js";
import { STATES, SAMPLERS, bytes, count, duration, shorten, time } from "./format.js";

/** The element that shows a job's image: an image, a video, or a link where a browser can show neither. */
export function showMedia(job, index, { alt } = {}) {
  const image = job.images[index], url = job.urls[index];
  const said = alt ?? `${shorten(job.config.prompt, 160)}, seed ${image.seed}`;
  if (image.content_type.startsWith("video/")) {
    return element("video", { src: url, muted: true, loop: true, controls: true, playsinline: true, "aria-label": said });
  }
  if (!image.content_type.startsWith("image/")) {
    return element("span", { class: "file" }, `${image.content_type}, ${bytes(image.bytes)}`);
  }
  return element("img", { src: url, alt: said, width: image.width, height: image.height, decoding: "async" });
}

/** What made an image, as [label, value] in the order people ask. */
export function facts(job, index) {
  const { config } = job, image = job.images[index];
  const listed = (parts, write) => (parts?.length ? parts.map(write).join(", ") : null);
  return [
    ["Prompt", config.prompt],
    ["Negative prompt", config.negative_prompt],
    ["Model", config.model],
    ["Size", `${image.width} × ${image.height}`],
    ["Steps", config.num_inference_steps],
    ["Guidance", config.guidance_scale],
    ["Sampler", SAMPLERS[config.sampler] ?? config.sampler],
    ["Seed", image.seed],
    ["LoRAs", listed(config.loras, (lora) => `${lora.name} at ${lora.weight}`)],
    ["ControlNets", listed(config.controls, (control) => `${control.name} at ${control.scale}`)],
    ["Source image", config.init_image],
    ["Mask", config.mask_image],
    ["Strength", config.init_image ? config.strength : null],
    ["Refiner", config.refiner ? `${config.refiner.model} from ${config.refiner.start}` : null],
    ["Ensemble", listed(config.ensemble, (name) => name)],
    ["Frames", config.num_frames],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
}

function origins(job, index) {
  const image = job.images[index];
  const timings = Object.entries(job.timings ?? {}).filter(([, seconds]) => seconds >= 0.001);
  return [
    ["Job", job.id],
    ["Lane", job.lane],
    ["Worker", job.worker],
    ["Attempts", job.attempt],
    ["Submitted", time(job.created_at)],
    ["Finished", job.finished_at ? time(job.finished_at) : null],
    [job.images.length > 1 ? "Took, all images" : "Took", timings.map(([phase, seconds]) => `${phase.replaceAll("_", " ")} ${duration(seconds)}`).join(", ")],
    ["File", `${image.content_type}, ${bytes(image.bytes)}`],
    ["SHA-256", image.sha256],
    ["Config digest", job.digest],
    ["Same as job", job.leader],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
}

export function list(entries) {
  return element(
    "dl",
    { class: "facts" },
    entries.map(([label, value]) => [element("dt", {}, label), element("dd", {}, String(value))]),
  );
}

/** Open the dialog on a job's image; on the job itself where it has none. */
export function openImage(job, index) {
  const dialog = find("#image"), body = find("#image-body");
  find("#image-title").textContent = job.images.length
    ? `Image ${index + 1} of ${job.images.length}`
    : `Job, ${STATES[job.state].label}`;
  body.replaceChildren(...(job.images.length ? imaged(job, index) : unimaged(job)));
  if (!dialog.open) dialog.showModal();
  find("#image-title").focus();
}

function imaged(job, index) {
  const image = job.images[index];
  const turn = (to, label, sign) =>
    element("button", {
      type: "button", class: "quiet", "aria-label": label, disabled: to < 0 || to >= job.images.length,
      on: { click: () => openImage(job, to) },
    }, sign);
  const more = element("details", {}, element("summary", {}, "Where it comes from"), list(origins(job, index)));
  more.addEventListener("toggle", () => more.open && addProvenance(more, job, index), { once: true });
  return [
    element(
      "figure",
      {},
      element("div", { class: "large" }, showMedia(job, index)),
      job.images.length > 1 &&
        element("figcaption", {}, turn(index - 1, "Image before", "←"), turn(index + 1, "Next image", "→")),
    ),
    element(
      "div",
      { class: "about" },
      element(
        "p",
        { class: "actions" },
        element("button", { type: "button", class: "primary", on: { click: () => changeIt(job, image.seed) } }, "Again with changes"),
        element("button", { type: "button", on: { click: () => copy(String(image.seed), "Seed") } }, "Copy seed"),
        element("a", { class: "button", href: job.urls[index], target: "_blank", rel: "noopener noreferrer" }, "Open file"),
      ),
      list(facts(job, index)),
      more,
    ),
  ];
}

function unimaged(job) {
  const tried = job.history.map((attempt) => [
    `Attempt ${attempt.attempt}`,
    `${attempt.how} after ${duration(attempt.ended_at - attempt.started_at)}${attempt.error ? `: ${attempt.error.message}` : ""}`,
  ]);
  const { width, height } = job.config;
  const asked = facts({ ...job, images: [{ width, height, seed: job.config.seed }] }, 0);
  return [
    element(
      "div",
      { class: "about" },
      job.error && element("p", { class: "problem" }, `${job.error.code}: ${job.error.message}`),
      element(
        "p",
        { class: "actions" },
        element("button", { type: "button", class: "primary", on: { click: () => changeIt(job) } }, "Again with changes"),
      ),
      list([...asked, ["Job", job.id], ["Submitted", time(job.created_at)], ...tried]),
    ),
  ];
}

/** What the worker wrote beside the image, and into its file. */
async function addProvenance(box, job, index) {
  try {
    const found = await call(`v1/jobs/${job.id}/images/${index}/provenance`);
    box.append(
      list([
        ["Calotype", found.calotype],
        ["Weights", `${found.model} ${found.model_version}`],
        ["Network steps", count(found.steps_taken)],
      ]),
      element("pre", { tabindex: "0", "aria-label": "Provenance as JSON" }, JSON.stringify(found, null, 1)),
    );
  } catch (problem) {
    notify(wordsOf(problem), problem.detail);
  }
}

function changeIt(job, seed) {
  find("#image").close();
  makeAgain(job.config, { seed });
}
