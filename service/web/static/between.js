// A slider between two of a page's pictures: it moves the line left of which the first is seen, right of it the second.

for (const slider of document.querySelectorAll(".between")) {
  const [first, second] = slider.querySelectorAll("select"), range = slider.querySelector("input[type=range]");
  const place = slider.querySelector(".picture");
  const figureOf = (select) => document.getElementById(select.value);
  const nameOf = (select) => select.selectedOptions[0]?.textContent;

  function copy(select) {
    const picture = figureOf(select)?.querySelector(".picture > [role=img]");
    const copied = picture?.cloneNode(true);
    if (picture instanceof HTMLCanvasElement) copied.getContext("2d").drawImage(picture, 0, 0);
    return copied;
  }

  function show() {
    const pictures = [copy(second), copy(first)];
    slider.hidden = !pictures.every(Boolean);
    if (slider.hidden) return;
    pictures[1].classList.add("over");
    place.replaceChildren(...pictures);
    move();
  }

  function move() {
    place.style.setProperty("--line", `${range.value}%`);
    range.setAttribute("aria-valuetext", `${nameOf(first)} on ${range.value} % from the left, then ${nameOf(second)}`);
  }

  for (const select of [first, second]) select.addEventListener("change", show);
  range.addEventListener("input", move);
  document.addEventListener("drawn", show);
}
