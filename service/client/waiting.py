"""Waiting for jobs: how long, how often to look, and what to show meanwhile."""

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from service.client.errors import WaitTimeoutError
from service.client.results import Job, ModelRegistrationFields, TuningJobFields

J = TypeVar("J", bound=Job)
Refresh: TypeAlias = Callable[[], J]
AsyncRefresh: TypeAlias = Callable[[], Awaitable[J]]
Progress: TypeAlias = bool | Callable[[J], None]  # True shows a bar. A function shows what it likes.
MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.1, 1.0


@dataclass
class Patience:
    """When to look at a job again, and when to stop waiting: `timeout` seconds from now; None: never."""

    timeout: float | None
    started: float = field(default_factory=time.monotonic)
    pause: float = MIN_POLL_SECONDS / 1.5

    def next_pause(self, job: Job | ModelRegistrationFields) -> float:
        """Seconds until the next look. Raises: WaitTimeoutError."""
        self.pause = min(MAX_POLL_SECONDS, self.pause * 1.5)
        if self.timeout is None:
            return self.pause
        left = self.started + self.timeout - time.monotonic()
        if left <= 0:
            raise WaitTimeoutError(f"job {job.id} is {job.state} after {self.timeout:g} s; it goes on")
        return min(self.pause, left)


def doing(job: Job) -> str:
    """The phase of a tuning job that runs, else the job's state."""
    phase = job.phase if isinstance(job, TuningJobFields) else None
    return phase if phase is not None and job.state == "running" else job.state


def remaining(job: Job) -> str | None:
    """How long a job will probably go on, such as `1:05`, if that is known."""
    seconds = job.remaining_seconds if isinstance(job, TuningJobFields) else None
    return None if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextmanager
def showing(progress: Progress[Any], job: Job) -> Iterator[Callable[[Any], None]]:
    """A function that shows how far a job is."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    form = "{desc}: {percentage:3.0f} %|{bar}| {elapsed}{postfix}"
    with tqdm(total=1.0, desc=f"{job.id} {doing(job)}", bar_format=form) as bar:

        def show(job: Job) -> None:
            bar.set_description_str(f"{job.id} {doing(job)}", refresh=False)
            left = remaining(job)
            bar.set_postfix_str(f"{left} left" if left else "", refresh=False)
            bar.n = job.progress
            bar.refresh()

        yield show
