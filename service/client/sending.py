"""How both clients reach the service: where it is, who they are, and when they ask again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from tenacity import RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from service.client.calls import Call
from service.client.errors import ApiError, UnreachableError

DEFAULT_URL = "http://127.0.0.1:8000"
MAX_ATTEMPTS = 6
MAX_RETRY_AFTER_SECONDS = 60.0  # The client raises an error if the service demands a longer wait.
TRANSIENT_STATUSES = (429, 502, 503, 504)
jitter = wait_random_exponential(multiplier=0.25, max=8)


def http_options(url: str | None, api_key: str | None, timeout: float) -> dict[str, Any]:
    """Arguments of an httpx client. Default of `url` is TIMETUNER_URL, of `api_key` TIMETUNER_API_KEY."""
    url = url or os.environ.get("TIMETUNER_URL") or DEFAULT_URL
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url is {url!r}; accepted: one that begins with http:// or https://")
    api_key = api_key or os.environ.get("TIMETUNER_API_KEY")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return {"base_url": url.rstrip("/"), "headers": headers, "timeout": timeout}


def retries(call: Call[Any], max_attempts: int) -> dict[str, Any]:
    """Arguments of tenacity's `Retrying` and `AsyncRetrying`."""
    return {
        "retry": retry_if_exception(lambda error: _may_pass(call, error)),
        "wait": _seconds,
        "stop": stop_after_attempt(max_attempts),
        "reraise": True,
    }


@contextmanager
def telling_unreachable(url: httpx.URL) -> Iterator[None]:
    """Raises: UnreachableError, in place of what httpx raises."""
    try:
        yield
    except httpx.TransportError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        address = str(url).rstrip("/")
        raise UnreachableError(f"the service at {address} cannot be reached: {reason}") from error


def _may_pass(call: Call[Any], error: BaseException) -> bool:
    """Whether to send a call again: if that may help, and cannot do a thing twice."""
    if isinstance(error, UnreachableError):
        return call.is_repeatable or isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout)
    if not isinstance(error, ApiError):
        return False
    return (
        call.is_repeatable
        and error.status in TRANSIENT_STATUSES
        and (error.retry_after or 0) <= MAX_RETRY_AFTER_SECONDS
    )


def _seconds(state: RetryCallState) -> float:
    """Longer each time, by chance, so that many clients do not come back together; and as long as the service says."""
    error = state.outcome and state.outcome.exception()
    told = error.retry_after if isinstance(error, ApiError) else None
    return (told or 0) + jitter(state)
