// The playground: its form is a request, which is sampled untuned and tuned, from the same noise.

import { draw } from "./samples.js";

const NUMBERS = ["num_steps", "guidance_scale", "seed", "num_images", "class_labels", "height", "width"];

function requestOf(form) {
  const request = Object.fromEntries([...new FormData(form)].filter(([, value]) => value !== ""));
  for (const name of NUMBERS) if (name in request) request[name] = Number(request[name]);
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

const playground = document.getElementById("playground");
playground?.addEventListener("submit", (event) => {
  event.preventDefault();
  const request = requestOf(playground);
  draw(document.getElementById("untuned"), { ...request, schedule: "none" });
  draw(document.getElementById("tuned"), { ...request, schedule: "auto" });
});
playground?.elements.num_steps.addEventListener("input", ({ target }) => { target.nextElementSibling.value = target.value; });
