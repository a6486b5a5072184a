// Building and changing the page without ever writing HTML from data.

/** A new element. `attributes`: properties by name, `on`: listeners, `data`: dataset, `aria`/`role`/…: attributes. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name === "class") made.className = value;
    else if (value === true) made.setAttribute(name, "");
    else made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** Make the children of `container` those of `items`, keeping what is there already: focus and motion survive. */
export function keyed(container, items, keyOf, create, update) {
  const known = new Map([...container.children].map((child) => [child.dataset.key, child]));
  const times = new Map();
  let place = container.firstElementChild;
  for (const item of items) {
    let key = String(keyOf(item));
    times.set(key, (times.get(key) ?? 0) + 1);
    if (times.get(key) > 1) key += ` ${times.get(key)}`; // several of one key are told apart by their order
    let child = known.get(key);
    known.delete(key);
    if (!child) {
      child = create(item);
      child.dataset.key = key;
    }
    if (child === place) place = place.nextElementSibling;
    else container.insertBefore(child, place);
    update?.(child, item);
  }
  for (const child of known.values()) child.remove();
}

/** Set a text only where it differs, so that nothing is announced or repainted for no reason. */
export function setText(target, text) {
  if (target.textContent !== String(text)) target.textContent = text;
}

export const find = (selector, within = document) => within.querySelector(selector);

let announcing;

/** Tell a screen reader, politely; what follows within a moment replaces it. */
export function announce(text) {
  clearTimeout(announcing);
  announcing = setTimeout(() => setText(find("#announcer"), text), 120);
}

/** A problem, or good news, at the edge of the page until it is dismissed. */
export function notify(title, detail, { kind = "error", seconds = 0 } = {}) {
  const close = element("button", { class: "quiet small", type: "button", "aria-label": `Dismiss: ${title}` }, "✕");
  const box = element(
    "div",
    { class: `notice ${kind}`, role: kind === "error" ? "alert" : "status" },
    element("div", {}, element("strong", {}, title), element("p", {}, detail)),
    close,
  );
  close.addEventListener("click", () => box.remove());
  if (seconds) setTimeout(() => box.remove(), seconds * 1000);
  const region = find("#notices");
  for (const other of [...region.children]) {
    if (other.querySelector("p").textContent === detail) other.remove(); // the same again
  }
  region.append(box);
  while (region.children.length > 4) region.firstElementChild.remove();
}

/** Put a text on the clipboard, and say so. */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    notify("Copied", `${what}: ${text}`, { kind: "good", seconds: 4 });
  } catch {
    notify("Not copied", `This browser keeps the clipboard to itself. ${what}: ${text}`);
  }
}

const AGAIN = "calotype-again";

/** Ask for the form to be filled with a job's config, and with the seed of one of its images. */
export function makeAgain(config, { seed } = {}) {
  document.dispatchEvent(new CustomEvent(AGAIN, { detail: { config, seed } }));
}

/** Call `fill(config, { seed })` at each such request. */
export function onMakeAgain(fill) {
  document.addEventListener(AGAIN, ({ detail: { config, seed } }) => fill(config, { seed }));
}

/** Call `look` now and every so often while `wanted()` and the page is visible; errors slow it down. */
export function poll(look, seconds, wanted) {
  let timer, busy = false;
  const turn = async () => {
    clearTimeout(timer);
    if (busy) return;
    let pause = seconds;
    if (wanted() && !document.hidden) {
      busy = true;
      try {
        await look();
      } catch (problem) {
        pause = Math.max(5, problem.retryAfter ?? 0);
      } finally {
        busy = false;
      }
    }
    timer = setTimeout(turn, pause * 1000);
  };
  document.addEventListener("visibilitychange", () => document.hidden || turn());
  turn();
  return turn;
}
