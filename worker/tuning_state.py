"""The state of tuning, stored in the registry, so that interrupted jobs continue and the results of tasks merge."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, selectinload
from torch import Tensor

from service.registry.database import is_away
from service.registry.jobs import add_event
from service.registry.tables import Job, TuningJob, TuningJobStep
from timetuner_core.samplers.solver_table import SolverTable
from timetuner_core.tuning.problem import TuningState
from worker.lease import Lease
from worker.metrics import TUNING_ITERATIONS
from worker.tuned_sampler import TunedSampler
from worker.tuning_progress import TuningProgress

logger = logging.getLogger(__name__)

# A transaction on the tuning job with its row locked. It fails once this worker may not write to the job any more.
Write = Callable[[], AbstractContextManager[tuple[Session, Job]]]


def tune(
    sampler: TunedSampler,
    state: TuningState,
    lease: Lease,
    write: Write,
    save_seconds: float,
    steps: list[int] | None = None,
) -> None:
    """Tune to the end, and save `state` about every `save_seconds`, so that another worker can continue from there.

    While the database is away, tuning goes on and the state is saved later.

    Args:
        steps: tune and save only these; then the rest of `state` is not looked at.
    """
    sampler.progress.store = partial(store_progress, write)
    saved = time.monotonic()
    iterations = TUNING_ITERATIONS.labels(sampler.model_id)
    for _ in sampler.tune(state, steps):
        iterations.inc()
        if time.monotonic() - saved > save_seconds:
            try:
                saved = _save(sampler, state, write, steps, saved)
            except DBAPIError as error:
                if not is_away(error):
                    raise
                logger.warning("the database is away; to be saved later: %s", error.orig)
        # Samples, which may go first, are watched and charged by themselves.
        with lease.watch.paused(), lease.meter.paused():
            sampler.runtime.give_way()
    lease.persist(lambda: _save(sampler, state, write, steps, saved))


def read_job(session: Session, job_id: str) -> TuningJob:
    """A tuning job and its steps, loaded so that they can be read after the session."""
    return session.get_one(TuningJob, job_id, options=[selectinload(TuningJob.steps)])


def load_state(job: TuningJob, timesteps: Tensor) -> TuningState:
    """The saved state of a job, or the start on the grid `timesteps`, `(num_steps + 1,)`."""
    state = TuningState.start(timesteps)
    if job.timesteps is not None:
        state.timesteps = torch.tensor(job.timesteps, dtype=torch.float64)
    if job.solver_table is not None:
        state.solver_table = SolverTable.from_dict(job.solver_table)
    for row in job.steps:
        i = row.step_index
        if len(row.memory) != state.memory.shape[1]:
            continue  # Another version saved it, and this version's tuners cannot continue from it.
        state.t_ratios[i], state.iterations[i], state.done[i] = row.t_ratio, row.iterations, row.done
        state.memory[i] = torch.tensor(row.memory, dtype=torch.float64)
        state.loss[i] = math.nan if row.loss is None else row.loss
        state.initial_loss[i] = math.nan if row.initial_loss is None else row.initial_loss
    return state


def step_rows(job_id: str, state: TuningState, steps: Iterable[int]) -> Iterator[TuningJobStep]:
    """The state of these steps as rows to be merged."""
    for i in steps:
        loss, initial_loss = float(state.loss[i]), float(state.initial_loss[i])
        yield TuningJobStep(
            job_id=job_id,
            step_index=i,
            t_ratio=float(state.t_ratios[i]),
            iterations=int(state.iterations[i]),
            memory=state.memory[i].tolist(),
            loss=loss if math.isfinite(loss) else None,
            initial_loss=initial_loss if math.isfinite(initial_loss) else None,
            done=bool(state.done[i]),
        )


def _save(sampler: TunedSampler, state: TuningState, write: Write, steps: list[int] | None, since: float) -> float:
    """Store the state of `steps`, and add this worker's calls and time since `since` to the job. Returns the time now.

    Raises:
        ArithmeticError: a state that no sampler can use, and no database keep.
    """
    now = time.monotonic()
    table = state.solver_table
    coefficients = () if table is None else (table.a, table.b)
    for tensor in (state.t_ratios, state.timesteps, state.memory, *coefficients):
        if not bool(torch.isfinite(tensor).all()):
            raise ArithmeticError(f"tuning diverged, to t_ratios {state.t_ratios.tolist()}")
    with write() as (session, job):
        assert isinstance(job, TuningJob)
        for row in step_rows(job.id, state, range(len(state.t_ratios)) if steps is None else steps):
            session.merge(row)
        if steps is None:
            job.timesteps = state.timesteps.tolist()
            job.solver_table = None if state.solver_table is None else state.solver_table.to_dict()
        job.network_calls += sampler.network_calls
        job.tuning_seconds += now - since
        job.losses = 0
        _note_progress(session, job, load_state(job, sampler.timesteps), sampler)
    sampler.network_calls = 0
    return now


def store_progress(write: Write, progress: TuningProgress) -> None:
    """Store how far the job is, while its state does not change: the teacher samples, or the result is evaluated."""
    try:
        with write() as (session, job):
            assert isinstance(job, TuningJob)
            job.progress = max(job.progress, progress.share)
            add_event(session, job, "progress", progress=job.progress, **progress.described())
    except DBAPIError as error:
        if not is_away(error):
            raise
        logger.warning("the database is away; progress is stored later: %s", error.orig)


def _note_progress(session: Session, job: TuningJob, state: TuningState, sampler: TunedSampler) -> None:
    """Store the job's progress, which counts the steps of all workers, and add an event."""
    share = torch.where(state.done, 1.0, state.iterations / sampler.total_iters)
    sampler.progress.tuned(float(share[sampler.tuned_steps].mean()))
    job.progress = max(job.progress, sampler.progress.share)
    losses = state.loss[state.loss.isfinite()]
    event: dict[str, Any] = {"progress": job.progress, "t_ratios": state.t_ratios.tolist()}
    event |= sampler.progress.described()
    if len(losses):
        event["loss"] = float(losses.sum())
    add_event(session, job, "progress", **event)
