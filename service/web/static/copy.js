// Buttons that copy: one for each block of code, and for each id.

// Write into the clipboard, also of a page that came by HTTP from another machine, to which browsers give no clipboard.
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = Object.assign(document.createElement("textarea"), { value: text });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

function addButton(element, what, place) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy" });
  button.setAttribute("aria-label", `Copy ${what}`);
  button.addEventListener("click", async () => {
    await copy(element.textContent.trim());
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  place(button);
}

for (const block of document.querySelectorAll("pre")) {
  const frame = Object.assign(document.createElement("div"), { className: "code" });
  block.replaceWith(frame);
  frame.append(block);
  addButton(block, "this code", (button) => frame.append(button));
}
// A link to a text, such as an export, whose content is fetched when it is to be copied.
for (const link of document.querySelectorAll("a[data-copied]")) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy" });
  button.setAttribute("aria-label", `Copy ${link.dataset.copied}`);
  button.addEventListener("click", async () => {
    button.textContent = "…";
    const answer = await fetch(link.href);
    if (answer.ok) await copy(await answer.text());
    button.textContent = answer.ok ? "Copied" : "Not possible";
    if (!answer.ok) button.title = (await answer.json()).detail;
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  link.after(" ", button);
}
for (const id of document.querySelectorAll("code.copied")) addButton(id, id.textContent, (button) => id.after(" ", button));

// Whoever logs out leaves nothing of the playground's history to the next.
if (location.pathname === "/login") localStorage.removeItem("timetuner.playground");
