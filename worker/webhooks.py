"""Sending webhooks: signed, repeated until they are accepted, and only to allowed addresses."""

import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpcore

from service.registry.database import Registry
from service.registry.tables import SampleJob
from service.registry.types import utc_now
from service.registry.webhooks import Delivery, end_webhook, receiver_of, take_due_webhooks
from service.shared.addresses import Network, is_allowed
from service.shared.logs import about
from service.shared.settings import Settings

logger = logging.getLogger(__name__)

MAX_PARALLEL_ATTEMPTS = 8
POLL_SECONDS = 0.5
ATTEMPT_SECONDS = 10.0  # An attempt may take this long, from the look-up of the name to the end of the response.
HTTP_GONE = 410  # Receivers answer this to get no more webhooks.


class ForbiddenAddressError(Exception):
    """A host name resolves to an address that webhooks must not reach."""


class WebhookSender:
    """Sends what is due, from a thread, until it is stopped."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._pool = ThreadPoolExecutor(MAX_PARALLEL_ATTEMPTS, "webhooks")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop once the current attempts have ended."""
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        under_way: dict[Future[None], str] = {}
        while not self._stop.wait(POLL_SECONDS):
            under_way = {attempt: receiver for attempt, receiver in under_way.items() if not attempt.done()}
            if len(under_way) == MAX_PARALLEL_ATTEMPTS:
                continue
            free, busy = MAX_PARALLEL_ATTEMPTS - len(under_way), Counter(under_way.values())
            try:
                with self._registry.write() as session:
                    due = take_due_webhooks(session, self._settings.webhook_retry_seconds, free, busy)
            except Exception:  # The database is away. The next poll tries again.
                logger.exception("cannot look for webhooks")
                continue
            under_way |= {self._pool.submit(self._try, one): receiver_of(one.webhook.url) for one in due}

    def _try(self, delivery: Delivery) -> None:
        try:
            self._deliver(delivery)
        except Exception:  # The database is away. The attempt is made again.
            logger.exception("what became of webhook %s cannot be stored", delivery.webhook.id)

    def _deliver(self, delivery: Delivery) -> None:
        webhook, job = delivery.webhook, delivery.job
        last = webhook.attempt + 1 >= self._settings.webhook_attempts
        with about(job_id=job.id, request_id=job.request_id):
            try:
                status = post(webhook.url, webhook.id, body_of(delivery), self._settings)
                error = None if status // 100 == 2 else f"answered {status}"
                last = last or status == HTTP_GONE
            except ForbiddenAddressError as refusal:
                error, last = str(refusal), True
            except Exception as fault:  # Look-ups, connections, TLS and responses have errors of many types.
                error = f"{type(fault).__name__}: {fault}"
            if error is not None:
                logger.warning("webhook %s: %s%s", webhook.id, error, "; given up" if last else "")
            if error is None or last:
                with self._registry.write() as session:
                    end_webhook(session, webhook.id, error, utc_now() if error is None else None)


def body_of(delivery: Delivery) -> bytes:
    """The body of a webhook: how the job ended, and where to read more."""
    job = delivery.job
    kind, path = ("sampling", "samples") if isinstance(job, SampleJob) else ("tuning", "tuning-jobs")
    data = {"id": job.id, "state": job.state, "error": job.error, "request_id": job.request_id}
    finished = (job.finished_at or utc_now()).isoformat()
    content = {"type": f"{kind}.{job.state}", "timestamp": finished, "data": {**data, "url": f"/v1/{path}/{job.id}"}}
    return json.dumps(content).encode()


def post(url: str, webhook_id: str, body: bytes, settings: Settings) -> int:
    """Post a webhook and return the status. Redirects are not followed, and the response's body is not read.

    Raises:
        ForbiddenAddressError, or an error of the network.
    """
    timestamp = str(int(time.time()))
    headers = [
        ("host", urlsplit(url).netloc),
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("user-agent", "timetuner"),
        ("webhook-id", webhook_id),
        ("webhook-timestamp", timestamp),
        ("webhook-signature", signature(settings.webhook_secret, webhook_id, timestamp, body)),
    ]
    backend = GuardedBackend(settings.webhook_networks, time.monotonic() + ATTEMPT_SECONDS)
    with (
        httpcore.ConnectionPool(ssl_context=ssl.create_default_context(), network_backend=backend) as pool,
        pool.stream("POST", url, headers=headers, content=body) as response,
    ):
        return response.status


def signature(secret: str, webhook_id: str, timestamp: str, body: bytes) -> str:
    """The signature by the Standard Webhooks specification, version 1."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = b".".join([webhook_id.encode(), timestamp.encode(), body])
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


class GuardedBackend(httpcore.NetworkBackend):
    """Connects only to addresses that it has checked. A name is looked up once, so it cannot change in between."""

    def __init__(self, networks: Iterable[Network], deadline: float) -> None:
        self._networks = list(networks)
        self._deadline = deadline
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(sockaddr[0]).partition("%")[0] for *_, sockaddr in found))
        for address in addresses:
            if not is_allowed(ipaddress.ip_address(address), self._networks):
                raise ForbiddenAddressError(f"{host} is {address}; accepted: names of public addresses")
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return self._connect(address, port, socket_options)
        return self._connect(addresses[-1], port, socket_options)

    def _connect(self, address: str, port: int, socket_options: Any) -> httpcore.NetworkStream:
        left = seconds_left(self._deadline)
        return BoundedStream(self._backend.connect_tcp(address, port, left, None, socket_options), self._deadline)


class BoundedStream(httpcore.NetworkStream):
    """A connection with a deadline for all its reads and writes together."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, seconds_left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, seconds_left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        inside = self._stream.start_tls(ssl_context, server_hostname, seconds_left(self._deadline))
        return BoundedStream(inside, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def seconds_left(deadline: float) -> float:
    """The seconds until the deadline. Raises: httpcore.ReadTimeout, if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the attempt took too long")
    return left
