// Handing in a model: a file is dropped or chosen, sent with a bar that shows how far it is, and its page opened.

const form = document.getElementById("upload");

function send(file) {
  const bar = form.querySelector("progress"), status = form.querySelector("[role=status]");
  const body = new FormData(form);
  body.set("archive", file);
  for (const name of ["name", "private"]) if (!body.get(name)) body.delete(name);
  if (!body.get("name")) body.set("name", file.name.replace(/\.(tar\.gz|tgz|tar|zip)$/i, ""));
  const request = new XMLHttpRequest(); // `fetch` does not tell how much was sent.
  request.open("POST", "/v1/models");
  request.setRequestHeader("Prefer", "respond-async");
  request.responseType = "json";
  request.upload.addEventListener("progress", ({ loaded, total }) => {
    bar.value = loaded / total;
    status.textContent = loaded < total ? `${Math.round((100 * loaded) / total)} % of ${file.name}` : "Sent. It is being read …";
  });
  const fail = (text) => {
    bar.hidden = true;
    status.className = "error";
    status.textContent = text;
  };
  request.addEventListener("load", () => {
    if (request.status < 300) location.assign(`/models/${request.response.id}`);
    else fail(request.response?.detail ?? `The service answered ${request.status}.`);
  });
  request.addEventListener("error", () => fail("The connection was lost."));
  bar.hidden = false;
  status.className = "quiet";
  request.send(body);
}

if (form) {
  const field = form.elements.archive;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (field.files.length) send(field.files[0]);
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    form.addEventListener(name, (event) => {
      event.preventDefault();
      form.classList.toggle("over-it", name === "dragover");
    });
  }
  form.addEventListener("drop", ({ dataTransfer }) => { if (dataTransfer.files.length) send(dataTransfer.files[0]); });
}
