"""The field `webhook_url` of a request."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

MAX_URL = 2000


def _web(url: str) -> str:
    accepted = f"an http or https URL of up to {MAX_URL} characters, without user, password or fragment"
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        ok = False
    printable = url.isascii() and url.isprintable() and " " not in url
    if not ok or not printable or len(url) > MAX_URL or "@" in parts.netloc or parts.fragment:
        raise ValueError(f"accepted: {accepted}")
    return url


WebhookUrl = Annotated[str, AfterValidator(_web)]

WEBHOOK_URL = Field(
    None, description="The URL that gets a POST when the job ends, signed by Standard Webhooks: see docs/webhooks.md."
)
