// The form: what a job should be. Its fields are those of the API, by the same names.

import { call, wordsOf } from "./api.js";
import { announce, element, find, notify, onMakeAgain } from "./dom.js";
import { SAMPLERS } from "./format.js";
import { showJob } from "./job_card.js";
import { models } from "./models.js";

const NUMBERS = ["num_inference_steps", "guidance_scale", "num_images", "preview_every"];
const SHOWN = ["prompt", "negative_prompt", "model", "width", "height", "sampler", "seed", ...NUMBERS];
// Of a job's config: what need not be sent again, being what is meant anyway.
const PLAIN = { output_format: "png", init_image: null, mask_image: null, strength: null, refiner: null, num_frames: null };
const EXAMPLES = [
  "a large red heart on a yellow background",
  "a green star above a blue square on a white background",
  "a yellow ring on a purple background",
];

const form = () => find("#create-form");
let carried = {}; // fields of the job that is made again which the form has no place for

export function startCreate() {
  form().addEventListener("submit", submit);
  form().addEventListener("reset", () => queueMicrotask(afterReset));
  form().addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form().requestSubmit();
  });
  form().addEventListener("input", (event) => clearProblem(event.target));
  onMakeAgain(again);
  find("#model").addEventListener("change", fitToModel);
  find("#carried-drop").addEventListener("click", () => carry({}));
  for (const range of document.querySelectorAll("[data-for]")) {
    const number = find(`#${range.dataset.for}`);
    range.addEventListener("input", () => {
      number.value = range.value;
      clearProblem(number);
    });
    number.addEventListener("input", () => (range.value = number.value));
    range.value = number.value;
  }
  return load;
}

async function load() {
  try {
    const known = await models();
    const select = find("#model");
    if ([...known.keys()].join() !== [...select.options].map((option) => option.value).join()) {
      const before = select.value;
      select.replaceChildren(...[...known.keys()].map((name) => element("option", { value: name }, name)));
      if (known.has(before)) select.value = before;
      await fitToModel();
    }
    if (!known.size) {
      notify("No model yet", "No worker has announced a model. Start one: calotype worker --model demo");
    }
    showExamples(known.has("demo") ? EXAMPLES : []);
  } catch (problem) {
    notify(wordsOf(problem), problem.detail);
  }
}

function showExamples(prompts) {
  find("#examples").replaceChildren(
    ...prompts.map((prompt) =>
      element("button", { type: "button", class: "chip", on: { click: () => tryPrompt(prompt) } }, prompt),
    ),
  );
}

function tryPrompt(prompt) {
  find("#prompt").value = prompt;
  find("#prompt").focus();
}

/** The choices of a model, keeping what was chosen where it has that too. */
async function fitToModel() {
  const card = (await models()).get(find("#model").value);
  if (!card) return;
  offer(find("#size"), card.native_sizes.map(([width, height]) => [`${width}x${height}`, `${width} × ${height}`]));
  offer(find("#sampler"), card.samplers.map((name) => [name, SAMPLERS[name] ?? name]));
  find("#num_inference_steps").max = card.max_steps;
  const previews = find("#preview_every");
  previews.disabled = !card.features.includes("preview");
}

function offer(select, choices) {
  const before = select.value;
  select.replaceChildren(...choices.map(([value, label]) => element("option", { value }, label)));
  if (choices.some(([value]) => value === before)) select.value = before;
}

async function afterReset() {
  carry({});
  for (const input of form().elements) clearProblem(input);
  for (const range of document.querySelectorAll("[data-for]")) range.value = find(`#${range.dataset.for}`).value;
  await fitToModel();
}

/** The config that the form describes. */
function described() {
  const fields = { ...carried };
  for (const name of ["prompt", "negative_prompt", "model", "sampler"]) {
    const value = find(`#${name}`).value;
    if (value) fields[name] = value;
  }
  for (const name of NUMBERS) {
    const input = find(`#${name}`);
    if (!input.disabled && input.value !== "") fields[name] = Number(input.value);
  }
  fields.prompt ??= "";
  const seed = find("#seed").value.trim();
  if (seed) fields.seed = Number(seed);
  const [width, height] = find("#size").value.split("x").map(Number);
  if (width && height) Object.assign(fields, { width, height });
  return fields;
}

/** What can be said without asking the gateway. */
function refused(fields) {
  if (!fields.prompt.trim()) return { field: "prompt", detail: "Say what the image should show." };
  if (fields.seed !== undefined && !/^\d{1,16}$/.test(find("#seed").value.trim())) {
    return { field: "seed", detail: "A seed is a whole number; leave it empty to have one drawn." };
  }
  for (const name of ["num_inference_steps", "guidance_scale", "num_images"]) {
    const { validity, min, max } = find(`#${name}`);
    if (!validity.valid) return { field: name, detail: `Give a number from ${min} to ${max}.` };
  }
  return null;
}

async function submit(event) {
  event.preventDefault();
  const fields = described();
  const mistake = refused(fields);
  if (mistake) return showProblem(mistake);
  const button = find("#submit");
  button.disabled = true;
  try {
    const job = await call("v1/jobs", { method: "POST", body: fields });
    find("#empty-stage").hidden = true;
    showJob(find("#jobs"), job);
    announce("Submitted.");
  } catch (problem) {
    showProblem(problem);
  } finally {
    button.disabled = false;
  }
}

/** Beside the field that is wrong, or at the page's edge where it is none of the form's. */
function showProblem(problem) {
  const name = { width: "size", height: "size" }[problem.field] ?? problem.field;
  const input = name && form().elements.namedItem(name);
  if (!input) return notify(wordsOf(problem), problem.detail);
  clearProblem(input);
  const id = `${name}-problem`;
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", [input.getAttribute("aria-describedby"), id].filter(Boolean).join(" "));
  input.closest(".field").append(element("span", { class: "problem", id, role: "alert" }, problem.detail));
  input.focus();
}

function clearProblem(input) {
  if (!input?.getAttribute?.("aria-invalid")) return;
  input.removeAttribute("aria-invalid");
  const id = `${input.name}-problem`;
  const others = (input.getAttribute("aria-describedby") ?? "").split(" ").filter((other) => other && other !== id);
  if (others.length) input.setAttribute("aria-describedby", others.join(" "));
  else input.removeAttribute("aria-describedby");
  find(`#${id}`)?.remove();
}

/** Fill the form with a job's config; the seed of one of its images, if one is given. */
async function again(config, { seed } = {}) {
  location.hash = "#/create";
  await load();
  find("#model").value = config.model;
  await fitToModel();
  const size = `${config.width}x${config.height}`, sizes = find("#size");
  if (![...sizes.options].some((option) => option.value === size)) {
    sizes.append(element("option", { value: size }, `${config.width} × ${config.height}`));
  }
  sizes.value = size;
  for (const name of ["prompt", "negative_prompt", "sampler", ...NUMBERS]) find(`#${name}`).value = config[name] ?? "";
  find("#preview_every").value = String(config.preview_every ?? 0);
  if (!find("#preview_every").value) find("#preview_every").value = "0";
  find("#seed").value = seed ?? config.seed ?? "";
  for (const range of document.querySelectorAll("[data-for]")) range.value = find(`#${range.dataset.for}`).value;
  carry(
    Object.fromEntries(
      Object.entries(config).filter(([name, value]) => {
        if (SHOWN.includes(name) || value === PLAIN[name]) return false;
        return !(Array.isArray(value) && value.length === 0);
      }),
    ),
  );
  find("#prompt").focus();
  announce("The form has that job’s settings.");
}

function carry(fields) {
  carried = fields;
  const names = Object.keys(fields);
  find("#carried").hidden = names.length === 0;
  find("#carried-text").textContent = names.length ? `Also from that job: ${names.join(", ").replaceAll("_", " ")}.` : "";
}
