// Sampling into figures: each asks the API for a job, shows what its steps predict, and at the end the images.

const SVG = "http://www.w3.org/2000/svg";
const SHEET_GAP = 2; // Pixels between two images of a sheet, as the API makes it.

// Sample a request into a figure. The figure keeps its samples, and tells of them by a "drawn" event.
export async function draw(figure, request) {
  const picture = figure.querySelector(".picture"), status = figure.querySelector("[role=status]");
  const turn = (figure.turn = (figure.turn ?? 0) + 1);
  const stale = () => figure.turn !== turn;
  figure.events?.close();
  figure.setAttribute("aria-busy", "true");
  figure.querySelector(".about")?.replaceChildren();
  status.className = "quiet";
  status.textContent = "Waiting for a worker …";
  try {
    const job = await submit(request);
    if (stale()) return;
    const end = await follow(figure, job, (step) => {
      status.textContent = `Step ${step.step} of ${step.num_steps}`;
      if (step.preview) preview(picture, `data:image/png;base64,${step.preview}`, job.request.num_images, stale);
    });
    if (stale()) return;
    if (end.state !== "succeeded") throw new Error(`The job has ${end.state}: ${end.error ?? "no reason given"}`);
    const result = await content(end, figure.querySelector("figcaption").textContent);
    if (stale()) return;
    picture.replaceChildren(result.picture);
    status.textContent = end.schedule ? "By schedule " : "";
    if (end.schedule) status.append(link(`/schedules/${end.schedule}`, end.schedule.slice(-8)));
    else if (request.schedule === "auto") status.textContent = "No accepted schedule for this setting: untuned.";
    about(figure, end, result);
  } catch (error) {
    if (stale()) return;
    picture.replaceChildren();
    status.className = "error";
    status.textContent = error.message;
  }
  figure.setAttribute("aria-busy", "false");
  figure.dispatchEvent(new CustomEvent("drawn", { bubbles: true }));
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

// The samples of a job: their picture, and the file that a download of them has.
async function content(job, caption) {
  const answer = await fetch(job.content, { headers: { Accept: "image/png, application/json" } });
  const { num_images, num_steps, seed } = job.request;
  const text = `${caption}: ${num_images} samples in ${num_steps} steps, seed ${seed}`;
  if (answer.headers.get("Content-Type") === "image/png") {
    const file = await answer.blob();
    return { picture: tiles(await createImageBitmap(file), num_images, text), file, name: `${job.id}.png` };
  }
  const body = await json(answer.clone());
  if (body.samples[0].length !== 2 || Array.isArray(body.samples[0][0])) throw new Error("Samples of this shape have no picture.");
  return { picture: points(body.samples, text), file: await answer.blob(), name: `${job.id}.json` };
}

// What a figure says below its picture: network calls per image, the time that sampling took, and a download.
function about(figure, job, { file, name }) {
  const line = figure.querySelector(".about");
  if (!line) return;
  const seconds = job.started_at && job.finished_at ? (new Date(job.finished_at) - new Date(job.started_at)) / 1000 : null;
  const facts = [figure.dataset.calls, seconds === null ? "from the store" : `${seconds.toFixed(seconds < 10 ? 2 : 0)} s`];
  URL.revokeObjectURL(figure.file);
  figure.file = URL.createObjectURL(file);
  const download = Object.assign(link(figure.file, "Download"), { download: name, className: "" });
  line.append(`${facts.filter(Boolean).join(" · ")} · `, download);
}

async function json(answer) {
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.detail);
  return body;
}

async function preview(picture, src, count, stale) {
  const image = Object.assign(new Image(), { src });
  await image.decode();
  if (!stale() && picture.closest("[aria-busy=true]")) picture.replaceChildren(tiles(image, count, "The images as predicted so far"));
}

// A sheet of images drawn with wider gaps, through which the page is seen: a sheet's own are black, as many images are.
function tiles(sheet, count, text) {
  const columns = Math.ceil(Math.sqrt(count)), rows = Math.ceil(count / columns);
  const width = (sheet.width + SHEET_GAP) / columns - SHEET_GAP, height = (sheet.height + SHEET_GAP) / rows - SHEET_GAP;
  const gap = count > 1 ? Math.max(SHEET_GAP, Math.round(width / 12)) : 0;
  const canvas = Object.assign(document.createElement("canvas"), { width: columns * (width + gap) - gap, height: rows * (height + gap) - gap });
  const context = canvas.getContext("2d");
  for (let k = 0; k < count; k++) {
    const column = k % columns, row = Math.floor(k / columns);
    const from = [column * (width + SHEET_GAP), row * (height + SHEET_GAP)];
    context.drawImage(sheet, ...from, width, height, column * (width + gap), row * (height + gap), width, height);
  }
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", text);
  return canvas;
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

for (const figure of document.querySelectorAll("figure[data-request]")) draw(figure, JSON.parse(figure.dataset.request));
