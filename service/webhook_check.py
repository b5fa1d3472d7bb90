"""Webhooks: which URLs may be told of a job's end. `worker.webhooks` tells them."""

import ipaddress
from urllib.parse import urlsplit

from service.http.errors import InvalidError
from service.shared.addresses import is_allowed
from service.shared.settings import Settings

LOC = ("body", "webhook_url")


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
