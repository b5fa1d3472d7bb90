"""The outbox of webhooks. A row is made with its job and is due when the job is over."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from service.registry.tables import FINAL_STATES, SampleJob, TuningJob, Webhook
from service.registry.types import utc_now

BACKOFF_FACTOR = 4
MAX_PARALLEL_PER_RECEIVER = 2
MAX_LOOKED_AT = 1000  # Webhooks of busy receivers may be in front of those that can be sent.


@dataclass(frozen=True)
class Delivery:
    """A webhook to be sent now, and the job whose end it tells."""

    webhook: Webhook
    job: TuningJob | SampleJob


def receiver_of(url: str) -> str:
    """The host and port of a webhook."""
    return urlsplit(url).netloc


def take_due_webhooks(
    session: Session, retry_seconds: float, limit: int, busy: Mapping[str, int] | None = None
) -> list[Delivery]:
    """Take the webhooks to be sent now, the oldest first.

    A receiver gets up to `MAX_PARALLEL_PER_RECEIVER` at a time, so that one that hangs does not delay others'. `busy`
    has the number of attempts at each that are being made.

    Their next attempt is scheduled first. So no other process sends them meanwhile, and an attempt whose process is
    killed is made again.
    """
    now = utc_now()
    over = or_(TuningJob.state.in_(FINAL_STATES), SampleJob.state.in_(FINAL_STATES))
    query = select(Webhook, TuningJob, SampleJob).outerjoin(TuningJob).outerjoin(SampleJob)
    query = query.where(Webhook.next_attempt_at <= now, over).order_by(Webhook.next_attempt_at).limit(MAX_LOOKED_AT)
    taken: list[Delivery] = []
    attempts = Counter(busy or {})
    for webhook, tuning_job, sample_job in session.execute(query).all():
        receiver = receiver_of(webhook.url)
        if len(taken) == limit:
            break
        if attempts[receiver] >= MAX_PARALLEL_PER_RECEIVER:
            continue
        wait = timedelta(seconds=retry_seconds * BACKOFF_FACTOR**webhook.attempt)
        unchanged = (Webhook.id == webhook.id, Webhook.attempt == webhook.attempt, Webhook.next_attempt_at.is_not(None))
        values = {"attempt": webhook.attempt + 1, "next_attempt_at": now + wait}
        take = update(Webhook).where(*unchanged).values(values).returning(Webhook.id)
        if session.scalar(take, execution_options={"synchronize_session": False}) is not None:
            taken.append(Delivery(webhook, tuning_job or sample_job))
            attempts[receiver] += 1
    return taken


def end_webhook(session: Session, webhook_id: str, error: str | None, delivered_at: datetime | None = None) -> None:
    """Make no more attempts: the webhook was delivered, or is given up with an error."""
    values = {"next_attempt_at": None, "delivered_at": delivered_at, "error": error[:2000] if error else None}
    session.execute(update(Webhook).where(Webhook.id == webhook_id).values(values))
