"""Make the animated tour of the web page, from the real page in a headless Chromium.

    timetuner up --home "$(mktemp -d)"
    python tools/tour.py http://127.0.0.1:8000 docs/images/tour.webp    (in another terminal)

The tour begins with an empty registry. It registers the bundled model of clothes, tunes it, waits for the job, moves
the slider between pictures, and goes on to the playground and the matrix. Waiting is cut short: a running job is shown
a few times. Chromium is needed (`apt-get install chromium`), and five minutes on two cores.
"""

import argparse
import io
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Locator, Page, expect, sync_playwright

WIDTH, HEIGHT, CAPTION = 960, 680, 44
INK, PAPER, POINTER = "#ffffff", "#1f5fbf", "#b3470b"
LONG, SHORT, BRIEF = 2600, 900, 140  # milliseconds
MAX_BYTES = 3_000_000
MODEL = "fashion32"
JOB_SECONDS, LOOK_SECONDS, NUM_MOMENTS = 1500, 2, 5


@dataclass
class Tour:
    """The page, and its pictures so far with how long each is shown."""

    page: Page
    frames: list[Image.Image] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)
    caption: str = ""

    def show(self, milliseconds: int, pointer: Locator | None = None) -> None:
        """Take a picture, with a pointer on an element if one is given."""
        frame = Image.new("RGB", (WIDTH, HEIGHT + CAPTION), PAPER)
        frame.paste(Image.open(io.BytesIO(self.page.screenshot())), (0, CAPTION))
        draw = ImageDraw.Draw(frame)
        draw.text((16, CAPTION // 2), self.caption, INK, ImageFont.load_default(20), anchor="lm")
        box = pointer.bounding_box() if pointer else None
        if box:
            x, y = box["x"] + box["width"] / 2, CAPTION + box["y"] + box["height"] / 2
            arrow = ((0, 0), (0, 24), (6, 19), (10, 28), (15, 26), (11, 17), (19, 17))
            draw.polygon([(x + dx, y + dy) for dx, dy in arrow], POINTER, INK, 2)
        self.frames.append(frame)
        self.durations.append(milliseconds)

    def click(self, target: Locator) -> None:
        """Show the pointer on an element, and click it."""
        target.scroll_into_view_if_needed()
        self.show(SHORT, target)
        target.click()
        self.page.wait_for_load_state()

    def wait_for_pictures(self) -> None:
        for figure in self.page.locator("figure[data-request]").all():
            expect(figure).to_have_attribute("aria-busy", "false", timeout=1000 * JOB_SECONDS)

    def slide(self, slider: Locator) -> None:
        """Move the line between two pictures to and fro."""
        self.page.locator(".between").evaluate("place => place.scrollIntoView({ block: 'center' })")
        for value in (50, 30, 10, 30, 50, 70, 90, 70, 50):
            slider.fill(str(value))
            self.show(BRIEF)

    def save(self, path: Path) -> None:
        first, *others = self.frames
        options = {"quality": 70, "method": 6, "minimize_size": True, "allow_mixed": True}
        first.save(path, save_all=True, append_images=others, duration=self.durations, loop=0, **options)


def walk(tour: Tour, url: str) -> None:
    """The way through the page."""
    page = tour.page
    tour.caption = "An empty service says what it does."
    page.goto(url)
    tour.show(LONG)
    tour.caption = "Register a model: here the bundled one of clothes."
    page.get_by_label("Built-in model").select_option(MODEL)
    tour.click(page.get_by_role("button", name="Register"))
    tour.caption = "Tune it for 5 steps. The cost is told before."
    form = page.locator("#tune-form")
    form.scroll_into_view_if_needed()
    expect(page.locator("#price")).not_to_be_empty()
    tour.show(LONG // 2)
    tour.click(form.get_by_role("button", name="Start tuning"))
    tour.caption = "A job as it runs: phase, time that remains, loss and ratios."
    finished = page.get_by_role("link", name="See the schedule it made")
    watch(tour, finished)
    tour.show(SHORT)
    tour.click(finished)
    tour.caption = "What it brought, in a sentence, and the pictures: all from the same noise."
    tour.wait_for_pictures()
    tour.show(LONG)
    slider = page.get_by_role("slider", name="The line between both pictures")
    tour.caption = "A slider between any two of them, and how many untuned steps it is worth."
    tour.slide(slider)
    tour.show(SHORT)
    tour.caption = "The playground samples with and without the schedule, and shows the code."
    tour.click(page.get_by_role("link", name="Try it"))
    tour.wait_for_pictures()
    tour.show(LONG)
    tour.caption = "All models by network calls: what was tuned, what it brought, and what is left to tune."
    tour.click(page.get_by_role("link", name="Matrix", exact=True))
    tour.show(LONG)


def watch(tour: Tour, finished: Locator) -> None:
    """Show a job until a link appears, at a few moments that are evenly far from each other."""
    job = Tour(tour.page, caption=tour.caption)
    for _ in range(JOB_SECONDS // LOOK_SECONDS):
        tour.page.wait_for_timeout(1000 * LOOK_SECONDS)
        if finished.is_visible():
            break
        if tour.page.locator("polyline").count():
            job.show(BRIEF)
    expect(finished).to_be_visible()
    last = len(job.frames) - 1
    for k in sorted({round(last * moment / NUM_MOMENTS) for moment in range(NUM_MOMENTS + 1)} if job.frames else ()):
        tour.frames.append(job.frames[k])
        tour.durations.append(SHORT // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="the page of an empty service")
    parser.add_argument("out", type=Path, help="a WebP file")
    args = parser.parse_args()
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("no Chromium; install it by `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, reduced_motion="reduce")
        tour = Tour(page)
        walk(tour, args.url)
        browser.close()
    tour.save(args.out)
    size = args.out.stat().st_size
    print(f"{args.out}: {len(tour.frames)} pictures, {sum(tour.durations) / 1000:.0f} s, {size / 1e6:.2f} MB")
    if size > MAX_BYTES:
        raise SystemExit(f"larger than {MAX_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
