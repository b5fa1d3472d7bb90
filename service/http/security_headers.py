"""Security headers of every response: browsers run only this service's scripts, and neither frame nor sniff it."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
# The documentation pages contain inline scripts and styles.
DOCS_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; worker-src blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
DOCS_PATHS = ("/docs", "/redoc")
API = ("/v1/", "/openai/")


class SecurityHeadersMiddleware:
    """Sets the headers that the endpoint has not set."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                policy = _policy(scope["path"], headers.get("content-type", ""))
                # Forms have no Origin under `no-referrer`, and the CSRF check needs it.
                headers.setdefault("Referrer-Policy", "same-origin" if policy == PAGE_POLICY else "no-referrer")
                headers.setdefault("Content-Security-Policy", policy)
                if scope["path"].startswith(API):
                    # Browsers may cache images, because their ETag tells whether they are still valid.
                    headers.setdefault("Cache-Control", "private, no-cache" if "etag" in headers else "no-store")
            await send(message)

        await self.app(scope, receive, guarded)


def _policy(path: str, content_type: str) -> str:
    if path in DOCS_PATHS:
        return DOCS_POLICY
    web = not path.startswith(API) and content_type.startswith(("text/html", "text/javascript", "text/css"))
    return PAGE_POLICY if web else DATA_POLICY
