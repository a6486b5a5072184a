// Numbers, times and names as people read them.

const whole = new Intl.NumberFormat("en");
const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

export const count = (value) => whole.format(value);
export const rate = (value) => (value >= 10 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toFixed(2));
export const time = (seconds) => clock.format(new Date(seconds * 1000));
export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

export function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

export function bytes(size) {
  if (size < 1024) return `${size} bytes`;
  return size < 1048576 ? `${(size / 1024).toFixed(1)} KiB` : `${(size / 1048576).toFixed(1)} MiB`;
}

export const SAMPLERS = {
  ddpm: "DDPM",
  ddim: "DDIM",
  pndm: "PNDM",
  euler: "Euler",
  euler_a: "Euler ancestral",
  heun: "Heun",
  dpmpp_2m: "DPM++ 2M",
  dpmpp_2m_karras: "DPM++ 2M Karras",
  dpmpp_2m_sde: "DPM++ 2M SDE",
  dpmpp_2m_sde_karras: "DPM++ 2M SDE Karras",
  dpmpp_3m: "DPM++ 3M",
  dpmpp_3m_sde: "DPM++ 3M SDE",
  dpmpp_2s: "DPM++ 2S",
  dpm2: "DPM2",
  dpm2_a: "DPM2 ancestral",
  deis: "DEIS",
  sa_solver: "SA-Solver",
  euler_karras: "Euler Karras",
  unipc: "UniPC",
  unipc_3: "UniPC, third order",
  lcm: "LCM",
  tcd: "TCD",
};

export const STATES = {
  queued: { label: "queued", mark: "○" },
  running: { label: "running", mark: "◐" },
  succeeded: { label: "done", mark: "●" },
  failed: { label: "failed", mark: "✕" },
  cancelled: { label: "cancelled", mark: "–" },
};

export const shorten = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
