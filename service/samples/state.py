"""State of the sampling endpoints, made once per application. Endpoints get it as `Samples`."""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from fastapi import Depends, Request

from service.samples.admission import Admission
from service.samples.catalog import Catalog
from service.samples.job_events import JobEvents
from service.samples.submissions import Submissions
from service.samples.submitting import submit_all
from service.state import AppState


@dataclass(frozen=True)
class SamplesState:
    """The queue's admission, the way of requests into the registry, and the events of jobs.

    Attributes:
        image_shapes: each model's image shape by the model's id. A model never changes, so no entry expires.
    """

    events: JobEvents
    admission: Admission
    submissions: Submissions
    image_shapes: dict[str, list[int]] = field(default_factory=dict)


def samples_state(state: AppState) -> SamplesState:
    """The sampling state of an application."""
    settings = state.settings
    admission = Admission(state.registry, settings.max_queued_jobs, settings.max_queue_seconds)
    submit = partial(submit_all, state.registry, settings, Catalog())
    events = JobEvents(settings.broker_url, admission.ended)
    return SamplesState(events, admission, Submissions(submit, state.bus.announce_samples))


async def _samples(request: Request) -> SamplesState:
    samples: SamplesState = request.app.state.samples
    return samples


Samples = Annotated[SamplesState, Depends(_samples)]
