"""Cohorts: the images of one kind that a worker moves on together, of networks and of whole pipelines alike."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from service.registry.samples import SampleClaim
from service.registry.tables import Schedule
from service.shared.job_requests import SampleRequest
from timetuner_core.models.loading import DiffusionModel
from timetuner_core.sampling.rolling_batch import RollingBatch
from worker import metrics
from worker.conversion import guidance_of, rows_of
from worker.pipeline_sampling import PipelineBatch, ServedPipeline, rows_of_pipeline
from worker.runtime import Runtime, dtype_of
from worker.usage import SharedMeter


class Row(Protocol):
    """An image to make: whose it is, and the seed of its noise."""

    @property
    def owner(self) -> Hashable: ...

    @property
    def seed(self) -> int: ...


class Travelling(Protocol):
    """An image on its way: the step that was made last, of how many."""

    @property
    def row(self) -> Row: ...

    @property
    def step(self) -> int: ...

    @property
    def num_steps(self) -> int: ...


class Advance(Protocol):
    """The outcome of a step: see `rolling_batch.Advance`."""

    @property
    def done(self) -> Sequence[Row]: ...

    @property
    def images(self) -> Tensor | None: ...

    @property
    def travelling(self) -> Sequence[Travelling]: ...

    @property
    def failed(self) -> Sequence[tuple[Row, Exception]]: ...

    @property
    def flagged(self) -> Sequence[bool]: ...


class Batch(Protocol):
    """Images that move on together, of any kind of model: see `RollingBatch` and `PipelineBatch`."""

    @property
    def rows(self) -> Sequence[Travelling]: ...

    @property
    def room(self) -> int: ...

    def add(self, rows: Any) -> None: ...

    def discard(self, owner: Hashable) -> None: ...

    def step(self) -> Advance: ...

    def preview(self, advance: Any, rows: Sequence[int]) -> Tensor | None: ...

    def close(self) -> None: ...


@dataclass
class Cohort:
    """A batch, and the jobs whose rows are in it, by their ids.

    Attributes:
        most: how many rows this worker samples at once with this model.
        followed: requests of those jobs whose steps are published, as somebody may follow them.
        is_warm: whether it has made a step. The first one may compile the network.
        meter: what its jobs used so far.
        replaying: a context in which a step is made: see `Runtime.replaying`.
    """

    key: Hashable
    model_id: str
    batch: Batch
    most: int
    claims: dict[str, SampleClaim] = field(default_factory=dict)
    followed: dict[str, SampleRequest] = field(default_factory=dict)
    is_warm: bool = False
    meter: SharedMeter = field(default_factory=SharedMeter)
    replaying: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def num_staying(self) -> int:
        """How many rows will still be here after the next step, as far as that is known: pipelines do not tell."""
        leaving = self.batch.num_leaving if isinstance(self.batch, RollingBatch) else 0
        return len(self.batch.rows) - leaving

    def step(self) -> Advance:
        """Move every row on by one step, and note whose step it was."""
        with self.meter.step(self._moving()), self.replaying():
            return self.batch.step()

    def _moving(self) -> list[str]:
        """The job of each image that a step moves on."""
        rows = self.batch.rows
        if isinstance(self.batch, PipelineBatch):  # Images that are done may wait there for others of their job.
            rows = [moving for moving in self.batch.rows if not moving.result.is_over]
        return [str(each.row.owner) for each in rows]

    def add(self, claim: SampleClaim, request: SampleRequest, rows: Sequence[Row]) -> None:
        self.batch.add(rows)
        self.claims[claim.job_id] = claim
        # The steps of a job of low priority can be followed: the request that made it does not wait for its end.
        if request.previews or claim.job.priority:
            self.followed[claim.job_id] = request

    def pop(self, job_id: str) -> SampleClaim | None:
        """Take a job out. Its rows stay in the batch."""
        self.followed.pop(job_id, None)
        return self.claims.pop(job_id, None)


def cohort_for(
    runtime: Runtime, claim: SampleClaim, request: SampleRequest, schedule: Schedule | None, most: int
) -> tuple[Cohort, Sequence[Row]]:
    """A new cohort that a job fits into, and the job's rows. Cohorts of one key may take each other's jobs.

    Args:
        most: how many rows this worker samples at once.
    """
    loaded = runtime.load(claim.job.model_id, dtype_of(claim.job.dtype))
    if isinstance(loaded, ServedPipeline):
        return _for_pipeline(runtime, claim, request, schedule, loaded)
    return _for_network(runtime, claim, request, schedule, loaded, most)


def _for_pipeline(
    runtime: Runtime, claim: SampleClaim, request: SampleRequest, schedule: Schedule | None, served: ServedPipeline
) -> tuple[Cohort, Sequence[Row]]:
    model_id = claim.job.model_id
    rows = rows_of_pipeline(claim.job, request, served, schedule)
    most = runtime.most_rows = runtime.settings.part_size
    counter, meter = metrics.NETWORK_EVALUATIONS.labels(model_id), SharedMeter()

    def count(network_rows: int, network_calls: int) -> None:
        counter.inc(network_rows)
        meter.count(network_rows, network_calls)

    batch = PipelineBatch(served, max(most, len(rows)), count)
    return Cohort(("pipeline", model_id), model_id, batch, most, meter=meter), rows


def _for_network(
    runtime: Runtime,
    claim: SampleClaim,
    request: SampleRequest,
    schedule: Schedule | None,
    loaded: DiffusionModel,
    most: int,
) -> tuple[Cohort, Sequence[Row]]:
    model = loaded.clipped_as(request.clipping)
    rows = rows_of(claim.job, request, model, schedule)
    guidance = guidance_of(request)
    shapes = [None if c is None else tuple(c.shape) for c in (rows[0].condition, rows[0].uncond_condition)]
    dtype = dtype_of(claim.job.dtype)
    sizes_of = (claim.job.model_id, guidance, shapes[0], dtype)
    eta = float(request.eta)
    key: list[Any] = [claim.job.model_id, dtype, request.sampler, eta, guidance.type, guidance.guides]
    key += [guidance.rescale, guidance.interval, request.clipping, *shapes]
    is_learned = rows[0].solver_table is not None
    key.append(is_learned)
    sizes, meter = runtime.batch_sizes(*sizes_of), SharedMeter()
    batch = RollingBatch(
        model.watched(meter.count),
        request.sampler,
        guidance,
        eta,
        sizes,
        runtime.device,
        max(sizes[-1], most, len(rows)),  # More rows than the largest size take several calls a step.
        partial(runtime.keep_batch_sizes, *sizes_of),
        is_learned,
    )
    if not batch.mixes_steps:
        key.append(tuple(rows[0].call_times.tolist()))
    replaying = partial(runtime.replaying, claim.job.model_id, dtype)
    return Cohort(tuple(key), claim.job.model_id, batch, runtime.most_rows, meter=meter, replaying=replaying), rows
