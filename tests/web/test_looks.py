"""Every page, light and dark, on wide and narrow screens: accessible, and no wider than the screen.

With SCREENSHOTS set to a folder, a picture of each is left there.
"""

import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.web.conftest import World

AXE = Path(__file__).parent / "axe.min.js"
SCHEMES = ("light", "dark")
WIDTHS = (1280, 390)
PAGES = (
    "/",
    "/models",
    "/jobs",
    "/jobs/{job}",
    "/schedules",
    "/schedules?status=imported",
    "/schedules/{schedule}",
    "/schedules/{of_points}",
    "/models/{model}",  # It shows pictures that the pages of schedules had sampled.
    "/compare",
    "/compare?model={model}",
    "/compare/schedules?a={schedule}&b={of_points}",
    "/matrix",
    "/usage",
    "/playground",
    "/playground?model={model}",
    "/login",
    "/nowhere",
)


def address(world: World, path: str) -> str:
    first, *_, last = world.schedules
    ids = {"model": world.model, "job": first["job"], "schedule": first["id"], "of_points": last["id"]}
    return world.url + path.format(**ids)


def settle(page: Page) -> None:
    """Wait until pictures that the page asks for by itself are there."""
    for figure in page.locator("figure[data-request]").all():
        expect(figure).to_have_attribute("aria-busy", "false")


@pytest.fixture
def looks(request: pytest.FixtureRequest) -> list[tuple[Any, int]]:
    """Schemes and widths to look at a page in: each of either, and with `--all` or for pictures each with each."""
    if request.config.getoption("--all") or "SCREENSHOTS" in os.environ:
        return list(product(SCHEMES, WIDTHS))
    return list(zip(SCHEMES, WIDTHS, strict=True))


@pytest.mark.parametrize("path", PAGES)
def test_pages_are_accessible_and_fit_the_screen(
    world: World, page: Page, path: str, looks: list[tuple[Any, int]]
) -> None:
    page.goto(address(world, path))
    page.evaluate(AXE.read_text())  # not as a script of the page's own, which its policy forbids
    for scheme, width in looks:
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        page.set_viewport_size({"width": width, "height": 900})
        settle(page)
        if folder := os.environ.get("SCREENSHOTS"):
            name = path.strip("/").translate(str.maketrans("/?={}", "-----")) or "overview"
            page.screenshot(path=Path(folder) / f"{name}-{width}-{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert faults(page) == []


def faults(page: Page) -> list[str]:
    """All findings that axe-core calls serious or critical."""
    found: dict[str, Any] = page.evaluate("axe.run()")
    return [
        f"{violation['id']}: {node['html']}"
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]
