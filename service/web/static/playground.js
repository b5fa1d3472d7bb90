// The playground: its form is a request, which is sampled untuned and tuned, from the same noise.

import { copy } from "./copy.js";
import { draw } from "./samples.js";

const NUMBERS = ["num_steps", "guidance_scale", "seed", "num_images", "class_labels", "height", "width"];
const OF_SETTING = ["num_steps", "sampler", "guidance_type", "guidance_scale"];
const STORE = "timetuner.playground", MAX_REMEMBERED = 12;
const form = document.getElementById("playground");

// The form as a request. A schedule that was chosen brings the rest of its setting, which the form has no fields for.
function requestOf() {
  const request = Object.fromEntries([...new FormData(form)].filter(([, value]) => value !== ""));
  for (const name of NUMBERS) if (name in request) request[name] = Number(request[name]);
  delete request.schedule;
  if ("pipeline" in form.dataset) return { ...request, previews: false };
  const { more } = settingOf(form.elements.schedule.selectedOptions[0]);
  Object.assign(request, more);
  const labels = JSON.parse(form.dataset.labels);
  if (request.guidance_type === "uncond") {
    delete request.guidance_scale;
    delete request.class_labels;
  } else if (labels.length && !("class_labels" in request)) {
    request.class_labels = Array.from({ length: request.num_images }, (_, k) => labels[k % labels.length]);
  }
  return request;
}

const settingOf = (option) => JSON.parse(option.dataset.setting ?? "{}");
const query = () => new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== "")).toString();

function choose() {
  const setting = settingOf(form.elements.schedule.selectedOptions[0]);
  for (const [name, value] of Object.entries(setting.fields ?? {})) {
    const field = form.elements[name];
    if (!field) continue;
    if (name === "num_steps" && value > field.max) field.max = value;
    field.value = value;
  }
  form.elements.num_steps.nextElementSibling.value = form.elements.num_steps.value;
}

function callsOf(request) {
  const per = Number(form.elements.sampler?.selectedOptions[0].dataset.calls);
  if (!per) return `${request.num_steps} steps`;
  const guided = request.guidance_type === "classifier-free" && request.guidance_scale !== 1 ? 2 : 1;
  const calls = request.num_steps * per * guided;
  return `${per > 1 ? "at most " : ""}${calls} network call${calls === 1 ? "" : "s"}`;
}

async function sample() {
  const request = requestOf(), schedule = form.elements.schedule.value;
  history.replaceState(null, "", `?${query()}`);
  remember();
  showCode();
  const untuned = document.getElementById("untuned"), tuned = document.getElementById("tuned");
  untuned.dataset.calls = tuned.dataset.calls = callsOf(request);
  document.getElementById("untried").hidden = true;
  await Promise.all([draw(untuned, { ...request, schedule: "none" }), draw(tuned, { ...request, schedule })]);
  offerTuning(tuned);
}

function offerTuning(tuned) {
  const place = document.getElementById("untried"), link = place.querySelector("a");
  place.hidden = !tuned.textContent.includes("No accepted schedule");
  const fields = OF_SETTING.filter((name) => form.elements[name]).map((name) => [name, form.elements[name].value]);
  link.search = new URLSearchParams(fields).toString();
  link.hash = "tune";
}

// Presets and history: the queries of earlier requests, of which those kept are presets.

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORE) ?? "[]");
  } catch {
    return [];
  }
}

function store(entries) {
  const latest = entries.filter((one) => !one.kept).slice(0, MAX_REMEMBERED);
  try {
    localStorage.setItem(STORE, JSON.stringify(entries.filter((one) => one.kept || latest.includes(one))));
  } catch { /* The browser keeps nothing for this page. */ }
  showHistory();
}

function remember(kept = false) {
  const now = query(), before = stored(), same = before.find((one) => one.query === now);
  store([{ query: now, label: label(), kept: kept || Boolean(same?.kept) }, ...before.filter((one) => one !== same)]);
}

function label() {
  const model = document.querySelector("form.row [name=model]").selectedOptions[0].textContent, request = requestOf();
  const what = [model, request.prompt, `${request.num_steps} steps`, request.sampler, `seed ${request.seed}`];
  return what.filter(Boolean).join(", ");
}

function showHistory() {
  const place = document.getElementById("history"), entries = stored();
  place.hidden = entries.length === 0;
  const items = [...entries.filter((one) => one.kept), ...entries.filter((one) => !one.kept)].map((one) => {
    const item = document.createElement("li"), tag = Object.assign(document.createElement("span"), { className: "tag", textContent: "preset" });
    item.append(Object.assign(document.createElement("a"), { href: `/playground?${one.query}`, textContent: one.label }));
    if (one.kept) item.append(" ", tag);
    return item;
  });
  place.querySelector("ul").replaceChildren(...items);
}

function showCode() {
  const request = { ...requestOf(), schedule: form.elements.schedule.value }, { origin } = location;
  delete request.previews;
  const has = (name) => name in form.dataset, named = request.schedule !== "auto";
  const key = has("key") ? " \\\n  -H 'Authorization: Bearer tt_…'" : "", api = has("key") ? `"${origin}", api_key="tt_…"` : `"${origin}"`;
  const [type, ending] = has("images") ? ["image/png", "png"] : ["application/x-npy", "npy"];
  const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`, python = (value) => (value === null ? "None" : JSON.stringify(value));
  const keywords = Object.entries(request).map(([name, value]) => `    ${name}=${python(value)},\n`).join("");
  const setting = OF_SETTING.filter((name) => name in request).map((name) => `, ${name}=${python(request[name])}`).join("");
  const found = named ? `schedules.get("${request.schedule}")` : `schedules.resolve(model="${request.model}"${setting})`;
  const code = {
    curl: `curl ${origin}/v1/samples -H 'Accept: ${type}' -o samples.${ending}${key} \\\n  --json ${shell(JSON.stringify(request))}`,
    python: `from service.client import TimeTuner\n\nclient = TimeTuner(${api})\nsamples = client.samples.create(\n${keywords})\n`
      + (has("images") ? 'samples.images[0].save("first.png")' : "print(samples.array)"),
    diffusers: `from service.client import TimeTuner\n\nclient = TimeTuner(${api})\nschedule = client.${found}\n`
      + `pipeline.scheduler = schedule.to_diffusers(pipeline)\nimages = pipeline(num_inference_steps=${request.num_steps}).images`,
    comfyui: `curl -OJ ${shell(`${origin}/v1/schedules/${request.schedule}/export?format=comfyui-node`)}${key}`,
  };
  for (const place of document.querySelectorAll("[data-code]")) place.textContent = code[place.dataset.code];
  document.getElementById("comfyui").hidden = !(named && has("comfyui"));
}

async function tell(action, text) {
  const place = document.getElementById("told");
  await action();
  place.textContent = text;
}

if (form) {
  form.addEventListener("submit", (event) => { event.preventDefault(); sample(); });
  form.addEventListener("input", ({ target }) => {
    if (target.name === "schedule") choose();
    else if (OF_SETTING.includes(target.name)) form.elements.schedule.value = "auto";
    if (target.name === "num_steps") target.nextElementSibling.value = target.value;
    showCode();
  });
  document.getElementById("dice").addEventListener("click", () => {
    form.elements.seed.value = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
    showCode();
  });
  document.getElementById("share").addEventListener("click", () => tell(() => copy(`${location.origin}/playground?${query()}`), "Copied."));
  document.getElementById("keep").addEventListener("click", () => tell(() => remember(true), "Kept."));
  document.getElementById("forget").addEventListener("click", () => { localStorage.removeItem(STORE); showHistory(); });
  showHistory();
  showCode();
  // A link to a setting shows its samples at once. A pipeline's may take minutes: it waits for a click.
  if (new URLSearchParams(location.search).has("num_steps") && !("pipeline" in form.dataset)) sample();
}
