"""The pages of the API's description, with links back to the web page."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse

ICON = "/static/icon.svg"
LINKS = {"/": "TimeTuner", "/models": "Models", "/jobs": "Jobs", "/schedules": "Schedules", "/playground": "Playground"}
STYLE = "font: 15px/1.5 system-ui, sans-serif; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: .6rem 1rem"
COLOURS = "color: #1a56b0; text-underline-offset: .15em"
BACK = "".join(f'<a href="{path}" style="{COLOURS}">{name}</a>' for path, name in LINKS.items())
HEADER = f'<header><nav aria-label="Pages" style="{STYLE}">{BACK}</nav></header>'


def add_docs_pages(app: FastAPI, static_url: str) -> None:
    """Add `/docs` and `/redoc`, whose scripts are files of this service."""
    openapi_url = str(app.openapi_url)
    pages: dict[str, Callable[[], HTMLResponse]] = {
        "/docs": lambda: get_swagger_ui_html(
            openapi_url=openapi_url,
            title=f"API · {app.title}",
            swagger_js_url=f"{static_url}/swagger-ui-bundle.js",
            swagger_css_url=f"{static_url}/swagger-ui.css",
            swagger_favicon_url=ICON,
        ),
        "/redoc": lambda: get_redoc_html(
            openapi_url=openapi_url,
            title=f"API · {app.title}",
            redoc_js_url=f"{static_url}/redoc.standalone.js",
            redoc_favicon_url=ICON,
            with_google_fonts=False,
        ),
    }
    for path, page in pages.items():
        app.get(path, include_in_schema=False)(_serving(page()))


def _serving(page: HTMLResponse) -> Callable[[], Any]:
    content = bytes(page.body).decode().replace("<body>", f"<body>{HEADER}", 1).replace("<html>", '<html lang="en">', 1)

    async def serve() -> HTMLResponse:
        return HTMLResponse(content)

    return serve
