"""A receiver of webhooks that hangs does not delay those of others."""

import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from sqlalchemy import select

from service.registry.database import Registry
from service.registry.tables import JobState, SampleJob, Webhook
from service.registry.types import utc_now
from service.registry.webhooks import MAX_PARALLEL_PER_RECEIVER
from service.shared.settings import Settings
from tests.stack import wait_until
from worker import webhooks
from worker.webhooks import MAX_PARALLEL_ATTEMPTS, WebhookSender


@pytest.fixture
def released() -> Iterator[threading.Event]:
    released = threading.Event()
    yield released
    released.set()


def test_a_hanging_receiver_delays_no_other(
    registry: Registry, model_id: str, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging: list[str] = []

    def post(url: str, *_: object) -> int:
        if urlsplit(url).hostname == "hangs.example":
            hanging.append(url)
            released.wait(60)
        return 200

    monkeypatch.setattr(webhooks, "post", post)
    urls = ["https://hangs.example/hook"] * (2 * MAX_PARALLEL_ATTEMPTS) + ["https://fine.example/hook"]
    with registry.write() as session:
        for url in urls:
            job = SampleJob(model_id=model_id, request={}, request_hash="", num_images=1, state=JobState.SUCCEEDED)
            job.finished_at = utc_now()
            session.add(job)
            session.flush()
            session.add(Webhook(sample_job_id=job.id, url=url))

    def delivered() -> int:
        with registry.read() as session:
            return len(session.scalars(select(Webhook).where(Webhook.delivered_at.is_not(None))).all())

    sender = WebhookSender(registry, Settings(webhook_retry_seconds=600))
    sender.start()
    try:
        wait_until(lambda: delivered() == 1, "delivery", 10)
        assert len(hanging) == MAX_PARALLEL_PER_RECEIVER
        released.set()
        wait_until(lambda: delivered() == len(urls), "deliveries", 30)
    finally:
        released.set()
        sender.stop()
