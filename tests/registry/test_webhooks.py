"""The outbox of webhooks: each attempt is made by one sender, once the job is over, until the last."""

from datetime import timedelta

import pytest
from sqlalchemy import update

from service.registry.database import Registry
from service.registry.jobs import finish
from service.registry.tables import JobState, SampleJob, TuningJob, Webhook
from service.registry.types import utc_now
from service.registry.webhooks import Delivery, end_webhook, take_due_webhooks
from tests.registry.test_jobs import THREADS, at_once

pytestmark = pytest.mark.both_engines

RETRY_SECONDS = 60.0


def take(registry: Registry) -> list[Delivery]:
    with registry.write() as session:
        return take_due_webhooks(session, RETRY_SECONDS, limit=10)


@pytest.fixture
def jobs(registry: Registry, model_id: str) -> tuple[str, str]:
    """A tuning job and a sampling job that are queued, each with a webhook."""
    with registry.write() as session:
        tuning = TuningJob(model_id=model_id, request={})
        sampling = SampleJob(model_id=model_id, request={}, request_hash="", num_images=1)
        session.add_all([tuning, sampling])
        session.flush()
        session.add(Webhook(tuning_job_id=tuning.id, url="https://example.org/tuning"))
        session.add(Webhook(sample_job_id=sampling.id, url="https://example.org/sampling"))
    return tuning.id, sampling.id


@pytest.fixture
def ended(registry: Registry, jobs: tuple[str, str]) -> tuple[str, str]:
    with registry.write() as session:
        for job_class, job_id in zip((TuningJob, SampleJob), jobs, strict=True):
            finish(session, session.get_one(job_class, job_id), JobState.FAILED, "it had to")
    return jobs


def test_nothing_is_told_of_a_job_that_is_not_over(registry: Registry, jobs: tuple[str, str]) -> None:
    assert take(registry) == []


def test_an_attempt_is_made_by_one_of_many_senders(registry: Registry, ended: tuple[str, str]) -> None:
    taken = [delivery for deliveries in at_once(lambda _: take(registry)) for delivery in deliveries]
    assert THREADS > 1
    assert sorted(delivery.job.id for delivery in taken) == sorted(ended)
    assert take(registry) == []


def test_an_attempt_that_nobody_ended_is_made_again_later(registry: Registry, ended: tuple[str, str]) -> None:
    first = {delivery.webhook.id for delivery in take(registry)}
    with registry.write() as session:
        session.execute(update(Webhook).values(next_attempt_at=utc_now() - timedelta(seconds=1)))
    again = take(registry)
    assert {delivery.webhook.id for delivery in again} == first
    with registry.read() as session:
        assert {session.get_one(Webhook, webhook_id).attempt for webhook_id in first} == {2}


def test_what_was_delivered_or_given_up_is_not_told_again(registry: Registry, ended: tuple[str, str]) -> None:
    delivered, given_up = take(registry)
    with registry.write() as session:
        end_webhook(session, delivered.webhook.id, None, utc_now())
        end_webhook(session, given_up.webhook.id, "answered 500")
    assert take(registry) == []
    with registry.read() as session:
        assert session.get_one(Webhook, delivered.webhook.id).delivered_at is not None
        assert session.get_one(Webhook, given_up.webhook.id).error == "answered 500"
