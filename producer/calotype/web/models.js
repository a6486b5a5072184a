// The models that workers have announced, each with the card that says what can be asked of it.

import { call } from "./api.js";

let asked = null;

/** The cards by name; asked for once a minute at most. */
export function models() {
  if (!asked) {
    asked = call("v1/models").then(({ data }) => new Map(data.map((model) => [model.id, model.card])));
    asked.catch(() => {}).finally(() => setTimeout(() => (asked = null), 60_000));
    asked.catch(() => (asked = null));
  }
  return asked;
}
