// Sampling into figures: each asks the API for a job, shows what its steps predict, and at the end the images.

const SVG = "http://www.w3.org/2000/svg";

async function draw(figure, request) {
  const picture = figure.querySelector(".picture"), status = figure.querySelector("[role=status]");
  const turn = (figure.turn = (figure.turn ?? 0) + 1);
  const stale = () => figure.turn !== turn;
  figure.events?.close();
  figure.setAttribute("aria-busy", "true");
  status.className = "quiet";
  status.textContent = "Waiting for a worker …";
  try {
    const job = await submit(request);
    if (stale()) return;
    const end = await follow(figure, job, (step) => {
      status.textContent = `Step ${step.step} of ${step.num_steps}`;
      if (step.preview) show(picture, image(`data:image/png;base64,${step.preview}`, "The images as predicted so far"));
    });
    if (stale()) return;
    if (end.state !== "succeeded") throw new Error(`The job has ${end.state}: ${end.error ?? "no reason given"}`);
    const result = await content(end, figure.querySelector("figcaption").textContent);
    if (stale()) return;
    show(picture, result);
    status.textContent = end.schedule ? "By schedule " : "Untuned.";
    if (end.schedule) status.append(link(`/schedules/${end.schedule}`, end.schedule.slice(-8)));
    else if (request.schedule === "auto") status.textContent = "No accepted schedule for this setting: untuned.";
  } catch (error) {
    if (stale()) return;
    picture.replaceChildren();
    status.className = "error";
    status.textContent = error.message;
  }
  figure.setAttribute("aria-busy", "false");
}

async function submit(request) {
  const headers = { "Content-Type": "application/json", Prefer: "respond-async" };
  const answer = await fetch("/v1/samples", { method: "POST", headers, body: JSON.stringify({ previews: true, ...request }) });
  return json(answer);
}

function follow(figure, job, onStep) {
  return new Promise((resolve, reject) => {
    const events = (figure.events = new EventSource(`/v1/samples/${job.id}/events`));
    events.addEventListener("step", (event) => onStep(JSON.parse(event.data)));
    events.addEventListener("end", (event) => { events.close(); resolve(JSON.parse(event.data)); });
    // The browser connects again by itself, unless it was refused.
    events.addEventListener("error", () => { if (events.readyState === EventSource.CLOSED) reject(new Error("The connection was lost.")); });
  });
}

async function content(job, caption) {
  const answer = await fetch(job.content, { headers: { Accept: "image/png, application/json" } });
  const { num_images, num_steps, seed } = job.request;
  const text = `${caption}: ${num_images} samples in ${num_steps} steps, seed ${seed}`;
  if (answer.headers.get("Content-Type") === "image/png") return image(URL.createObjectURL(await answer.blob()), text);
  const { samples } = await json(answer);
  if (samples[0].length !== 2 || Array.isArray(samples[0][0])) throw new Error("Samples of this shape have no picture.");
  return points(samples, text);
}

async function json(answer) {
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.detail);
  return body;
}

function show(picture, element) {
  const before = picture.querySelector("img");
  picture.replaceChildren(element);
  if (before?.src.startsWith("blob:")) URL.revokeObjectURL(before.src);
}

function image(src, alt) {
  return Object.assign(new Image(), { src, alt });
}

function link(href, text) {
  return Object.assign(document.createElement("a"), { href, textContent: text, className: "id" });
}

function points(samples, text) {
  const svg = document.createElementNS(SVG, "svg"), limit = 1.1 * Math.max(...samples.flat().map(Math.abs), 1);
  svg.setAttribute("viewBox", `${-limit} ${-limit} ${2 * limit} ${2 * limit}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", text);
  for (const [x, y] of samples) {
    const dot = document.createElementNS(SVG, "circle");
    for (const [name, value] of [["cx", x], ["cy", -y], ["r", limit / 70]]) dot.setAttribute(name, value);
    svg.append(dot);
  }
  return svg;
}

function requestOf(form) {
  const request = Object.fromEntries([...new FormData(form)].filter(([, value]) => value !== ""));
  for (const name of ["num_steps", "guidance_scale", "seed", "num_images", "class_labels", "height", "width"]) {
    if (name in request) request[name] = Number(request[name]);
  }
  const labels = JSON.parse(form.dataset.labels);
  if ("pipeline" in form.dataset) return { ...request, previews: false };
  if (request.guidance_type === "uncond") {
    delete request.guidance_scale;
    delete request.class_labels;
  } else if (labels.length && !("class_labels" in request)) {
    request.class_labels = Array.from({ length: request.num_images }, (_, k) => labels[k % labels.length]);
  }
  return request;
}

for (const figure of document.querySelectorAll("figure[data-request]")) draw(figure, JSON.parse(figure.dataset.request));

const playground = document.getElementById("playground");
playground?.addEventListener("submit", (event) => {
  event.preventDefault();
  const request = requestOf(playground);
  draw(document.getElementById("untuned"), { ...request, schedule: "none" });
  draw(document.getElementById("tuned"), { ...request, schedule: "auto" });
});
playground?.elements.num_steps.addEventListener("input", ({ target }) => { target.nextElementSibling.value = target.value; });
