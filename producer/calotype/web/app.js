// What holds the page together: which view is shown, the theme, the key.

import { askForKeysBy, key } from "./api.js";
import { startBatches } from "./batches.js";
import { startCreate } from "./create.js";
import { find, notify } from "./dom.js";
import { startFleet } from "./fleet.js";
import { startGallery } from "./gallery.js";

const VIEWS = ["create", "gallery", "batches", "fleet"];
const shown = () => find("main > section:not([hidden])")?.id;

const show = {
  create: startCreate(),
  gallery: startGallery(),
  batches: startBatches(() => shown() === "batches"),
  fleet: startFleet(() => shown() === "fleet"),
};

function route({ focus = true } = {}) {
  const named = location.hash.replace(/^#\//, "");
  if (location.hash === "#main") return; // the skip link
  const view = VIEWS.includes(named) ? named : VIEWS[0];
  for (const name of VIEWS) find(`#${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#/${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const title = find(`#${view} h1`);
  document.title = `${title.textContent} – Calotype`;
  show[view]();
  if (focus) title.focus();
}

const THEMES = ["auto", "light", "dark"];
const themeNow = () => document.documentElement.dataset.theme ?? "auto";

function sayTheme() {
  const button = find("#theme-button");
  button.textContent = { auto: "◑ Auto", light: "○ Light", dark: "● Dark" }[themeNow()];
  button.setAttribute("aria-label", `Colors: ${themeNow()}. Change`);
}

function nextTheme() {
  const next = THEMES[(THEMES.indexOf(themeNow()) + 1) % THEMES.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("calotype-theme", next);
  } catch {
    // Without storage it lasts as long as the page.
  }
  sayTheme();
}

/** Opens the dialog; resolves to whether there is a key when it closes. */
function askForKey(detail) {
  const dialog = find("#key-dialog"), input = find("#key-input");
  find("#key-detail").textContent = detail ?? "";
  input.value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" && key.get() !== ""), { once: true });
  });
}

function startKeys() {
  const dialog = find("#key-dialog"), button = find("#key-button");
  let asked = false;
  const sayKey = () => {
    button.hidden = key.get() === "" && !asked;
  };
  find("#key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const chosen = event.submitter?.value ?? "use";
    const given = find("#key-input").value.trim();
    if (chosen === "use" && !given) return find("#key-input").focus();
    key.set(chosen === "use" ? given : "");
    sayKey();
    dialog.close(chosen);
  });
  button.addEventListener("click", async () => {
    if (await askForKey(key.get() ? "This tab sends a key already; a new one takes its place." : "")) route({ focus: false });
  });
  dialog.addEventListener("cancel", () => (dialog.returnValue = "cancel"));
  askForKeysBy((detail) => {
    asked = true;
    sayKey();
    return askForKey(detail);
  });
  sayKey();
}

for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
for (const dialog of document.querySelectorAll("dialog")) {
  // A click beside it closes it.
  dialog.addEventListener("mousedown", (event) => event.target === dialog && dialog.close("cancel"));
}
find("#theme-button").addEventListener("click", nextTheme);
addEventListener("hashchange", () => route());
addEventListener("unhandledrejection", ({ reason }) => {
  if (reason?.name !== "AbortError") notify("The page met a bug", String(reason?.message ?? reason));
});
sayTheme();
startKeys();
route({ focus: false });
