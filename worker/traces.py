"""Spans of jobs: sampling jobs belong to their request's trace, and each tuning job begins a trace."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, get_current_span, set_span_in_context
from pydantic import ValidationError

from service.registry.jobs import Claim
from service.registry.samples import Ended, SampleClaim
from service.registry.tables import JobState
from service.registry.types import utc_now
from service.shared.job_requests import SampleRequest
from service.shared.telemetry import KINDS, TRACER, context_of, is_tracing

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def trace_samples(ends: Iterable[tuple[SampleClaim, Ended]], handed_in: datetime) -> None:
    """Make the spans of jobs whose results were stored.

    Each job has a span for its wait, and one from its claim until now, with children for its steps and for storing. All
    are made afterwards, because the jobs of a batch share the code that runs them.
    """
    if not is_tracing():  # Spans that go nowhere would take a tenth of the time for storing.
        return
    now = utc_now()
    for claim, end in ends:
        job, began = claim.job, claim.claimed_at
        parent = context_of(job.traceparent)
        _past("wait", parent, job.created_at, began)
        attributes: dict[str, str | int] = {"timetuner.job.id": job.id, "timetuner.model.id": job.model_id}
        attributes["timetuner.num_images"] = job.num_images
        span = TRACER.start_span("sampling", parent, SpanKind.CONSUMER, attributes, start_time=_nanoseconds(began))
        if span.is_recording():
            with suppress(ValidationError):  # The job failed because its request cannot be read.
                span.set_attribute("timetuner.num_steps", SampleRequest.stored(job.request).num_steps)
        _note_end(span, end.state, end.error)
        inside = set_span_in_context(span)
        _past("steps", inside, began, handed_in)
        _past("store", inside, handed_in, now)
        span.end(_nanoseconds(now))


def tuning_span(claim: Claim) -> AbstractContextManager[Span]:
    """The current span while a tuning job or a task of one is run."""
    return TRACER.start_as_current_span(KINDS[claim.job_class], attributes={"timetuner.job.id": claim.job_id})


def tuning_ended(state: JobState, error: str | None) -> None:
    """How the job of the current span ended."""
    _note_end(get_current_span(), state, error)


def _note_end(span: Span, state: JobState, error: str | None) -> None:
    span.set_attribute("timetuner.job.state", state.value)
    if error is not None:
        span.set_status(StatusCode.ERROR, error)


def _past(name: str, parent: Context, began: datetime, over: datetime) -> None:
    TRACER.start_span(name, parent, start_time=_nanoseconds(began)).end(_nanoseconds(over))


def _nanoseconds(time: datetime) -> int:
    return (time - EPOCH) // timedelta(microseconds=1) * 1000
