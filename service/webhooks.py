"""Webhooks: which URLs may be told of a job's end. `worker.webhooks` tells them."""

import ipaddress
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from service.addresses import is_allowed
from service.errors import InvalidError
from service.settings import Settings

MAX_URL = 2000
LOC = ("body", "webhook_url")


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
    None, description="Where to POST the job's end, signed as Standard Webhooks has it: see docs/webhooks.md."
)


def check_webhook(url: str | None, settings: Settings) -> None:
    """Refuse a webhook that would never be called. Raises: InvalidError."""
    if url is None:
        return
    if not settings.webhook_secret:
        raise InvalidError("webhook_url: the service has no WEBHOOK_SECRET to sign with; accepted: null", LOC, url)
    try:
        address = ipaddress.ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return  # a name: what it stands for is looked up, and checked, when it is called
    if not is_allowed(address, settings.webhook_networks):
        raise InvalidError(f"webhook_url leads to {address}; accepted: public addresses", LOC, url)
