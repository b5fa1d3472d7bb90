"""Sampling: all requests share batches, each at its own step. Jobs join and leave the batches at every step."""

import base64
import logging
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.exc import DBAPIError

from service.registry.database import is_away
from service.registry.samples import Ended, SampleClaim, claim_samples, ended, hand_back_samples
from service.registry.tables import JobState, Schedule
from service.registry.usage import Use
from service.shared.image_formats import to_preview
from service.shared.job_requests import SampleRequest
from worker import metrics
from worker.claiming import Claimer, Taken
from worker.cohorts import Advance, Cohort, cohort_for
from worker.lease import JobRefusedError, SampleLeases
from worker.results import Results, ids_of
from worker.runtime import Runtime

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.2  # A worker waits this long for new jobs before it stops: clients often send a next request.


class SampleServer:
    """Claims jobs, samples them step by step, and stores what is done, until there are no jobs.

    One thread samples. While the network makes a step, a second one claims jobs for the seats that will be free after
    it, and a third stores the results of the steps before.
    """

    def __init__(self, runtime: Runtime, idle_seconds: float = IDLE_SECONDS) -> None:
        self._runtime, self._idle_seconds = runtime, idle_seconds
        self._cohorts: list[Cohort] = []
        self._results = Results(runtime)
        self._looked_at = self._called_at = 0.0
        self._stop_by: float | None = None  # Jobs that are not done by then are handed back.

    @property
    def stopping(self) -> bool:
        """Whether the worker claims no more jobs."""
        return self._stop_by is not None

    def stop(self) -> None:
        """Claim no more jobs. Those that are not done after `drain_seconds` are handed back."""
        self._stop_by = time.monotonic() + self._runtime.settings.drain_seconds

    def serve_if_called(self) -> None:
        """Sample if a worker is requested. Tuning calls this often, so it asks the broker only every `IDLE_SECONDS`."""
        now = time.monotonic()
        if now - self._looked_at < IDLE_SECONDS:
            return
        self._looked_at = now
        if not self.stopping and self._runtime.bus.is_worker_requested():
            self.serve()

    def serve(self) -> None:
        """Sample until there are no jobs, and none comes for a moment."""
        self._runtime.bus.worker_started()
        seconds, watch = self._runtime.settings.lease_seconds, self._runtime.step_watch()
        with SampleLeases(self._runtime.registry, seconds, watch) as leases:
            try:
                while self._serve_until_idle(leases):
                    pass
            finally:
                self._results.wait()
                # Unfinished jobs are dropped after an error. Their leases expire, and another worker runs them.
                self._drop(*self._cohorts)

    def _serve_until_idle(self, leases: SampleLeases) -> bool:
        """Whether jobs may have come after the subscription ended."""
        served = False
        claim = partial(self._claim, leases)
        with Claimer(claim, self._runtime.bus.subscribe_to_work()) as claimer:
            while True:
                if self._cohorts or not self._results.is_busy:  # Results that hang are steps that do not advance.
                    leases.watch.advance()
                if self.stopping:
                    claimer.close()
                self._try_to_take(claimer, leases)
                if self._cohorts and self._stop_by is not None and time.monotonic() > self._stop_by:
                    self._hand_back(leases)
                if self._cohorts:
                    self._offer_seats(claimer)
                    self._move_on(leases)
                    served = True
                elif self.stopping:
                    break
                else:
                    self._offer_seats(claimer)
                    if claimer.wait(self._idle_seconds) and not self._results.is_busy:
                        break
        return (served or claimer.more) and not self.stopping

    @property
    def _most(self) -> int:
        """How many rows are sampled at once: what suits all models at work, or the model that was used last."""
        return min((cohort.most for cohort in self._cohorts), default=self._runtime.most_rows)

    def _offer_seats(self, claimer: Claimer) -> None:
        """Have jobs claimed for the seats that are free after the next step. If there are none, call other workers."""
        seats = self._most - sum(cohort.num_staying for cohort in self._cohorts)
        claimer.offer(seats, frozenset(cohort.model_id for cohort in self._cohorts))
        if seats <= 0 and claimer.more:
            self._call_others()

    def _try_to_take(self, claimer: Claimer, leases: SampleLeases) -> None:
        """Have the jobs join that were claimed. While the registry is away, running jobs go on."""
        try:
            taken = claimer.take()
            for one in taken:
                self._join_all(one, leases)
            self._results.enter([], [end for one in taken for end in one.late])
        except DBAPIError:
            if not self._cohorts:
                raise
            logger.exception("cannot look for jobs")

    def _claim(self, leases: SampleLeases, room: int, at_work: frozenset[str]) -> Taken:
        """Claim jobs that there is room for, from the claimer's thread."""
        runtime = self._runtime
        with metrics.CLAIM.time(), runtime.registry.write() as session:
            claims, late, more = claim_samples(
                session,
                runtime.owner,
                runtime.settings.lease_seconds,
                room,
                at_work or runtime.models_held(),
                only_these=bool(at_work),
                is_empty=not at_work,
            )
            schedules = {claim.job.schedule_id for claim in claims if claim.job.schedule_id}
            found = {schedule_id: session.get_one(Schedule, schedule_id) for schedule_id in schedules}
        leases.add(claims)
        return Taken(claims, found, late, more)

    def _join_all(self, taken: Taken, leases: SampleLeases) -> None:
        for claim in taken.claims:
            try:
                with leases.watch.slow():
                    self._join(claim, taken.schedules.get(claim.job.schedule_id or ""))
            except JobRefusedError as refusal:
                self._fail([claim], refusal, leases)
            except Exception as error:
                if is_away(error):  # The lease expires, and the job is claimed again.
                    leases.drop([claim.job_id])
                    continue
                logger.exception("%s failed", claim.job_id, extra=ids_of([claim]))
                self._fail([claim], error, leases)

    def _call_others(self) -> None:
        """Request another worker, because there is no room here."""
        now = time.monotonic()
        if now - self._called_at > IDLE_SECONDS:
            self._called_at = now
            self._runtime.bus.request_worker()

    def _join(self, claim: SampleClaim, schedule: Schedule | None) -> None:
        """Put a job's rows into a batch that they fit into, or into a new one."""
        request = SampleRequest.stored(claim.job.request)
        made, rows = cohort_for(self._runtime, claim, request, schedule, self._most)
        for cohort in self._cohorts:
            if cohort.key == made.key and cohort.batch.room >= len(rows):
                break
        else:
            cohort = made
            self._cohorts.append(cohort)
        cohort.add(claim, request, rows)

    def _move_on(self, leases: SampleLeases) -> None:
        """Move every batch on by one step."""
        self._give_up(leases)
        for cohort in list(self._cohorts):
            try:
                with metrics.STEP.time(), nullcontext() if cohort.is_warm else leases.watch.slow():
                    advance = cohort.step()
                cohort.is_warm = True
                leases.watch.advance()
                metrics.BATCH_ROWS.observe(len(advance.travelling))
                self._fail_rows(cohort, advance, leases)
                self._report(cohort, advance)
                self._hand_in(cohort, advance, leases)
            except Exception as error:
                logger.exception("a batch of %d failed", len(cohort.claims), extra=ids_of(cohort.claims.values()))
                self._fail(cohort.claims.values(), error, leases)
                self._drop(cohort)
                continue
            if not (cohort.batch.rows and cohort.claims):
                self._drop(cohort)

    def _drop(self, *cohorts: Cohort) -> None:
        """End what is left of cohorts."""
        for cohort in cohorts:
            self._cohorts.remove(cohort)
            cohort.batch.close()

    def _fail_rows(self, cohort: Cohort, advance: Advance, leases: SampleLeases) -> None:
        """End the jobs of which a row failed, though it was tried alone. No other job of the batch is concerned."""
        for row, error in advance.failed:
            if claim := cohort.pop(str(row.owner)):
                logger.error("%s failed at seed %d", claim.job_id, row.seed, exc_info=error, extra=ids_of([claim]))
                self._fail([claim], error, leases)
                if cohort.batch.rows:
                    cohort.batch.discard(claim.job_id)

    def _give_up(self, leases: SampleLeases) -> None:
        lost, cancelled = leases.given_up()
        for claim in (*lost, *cancelled):
            leases.drop([claim.job_id])
            for cohort in self._cohorts:
                if cohort.pop(claim.job_id):
                    cohort.batch.discard(claim.job_id)
        for claim in lost:
            self._used(claim)  # The worker that has it now tells what it used.
        self._submit([(claim, ended(claim.job, JobState.CANCELLED)) for claim in cancelled], None, None)
        self._drop(*[cohort for cohort in self._cohorts if not cohort.claims])

    def _report(self, cohort: Cohort, advance: Advance) -> None:
        """Publish the step of each job that may be followed, and a preview if its request asks for one."""
        if not cohort.followed:
            return
        steps: dict[str, list[Any]] = {}
        previews: dict[str, list[int]] = {}
        for k, travelling in enumerate(advance.travelling):
            job_id = str(travelling.row.owner)
            request = cohort.followed.get(job_id)
            if request is None:
                continue
            shown = cohort.claims[job_id].job.parent_id or job_id
            steps[shown] = [travelling.step, travelling.num_steps]
            if request.previews:
                previews.setdefault(shown, []).append(k)
        if steps:
            images = {}
            for shown, indices in previews.items():
                try:
                    images[shown] = self._preview(cohort, advance, indices)
                except Exception:  # Previews are not worth a job. Networks and devices have errors of their own.
                    logger.exception("no preview of %s", shown)
                    images[shown] = None
            self._runtime.bus.publish({"steps": steps, "previews": images})

    def _preview(self, cohort: Cohort, advance: Advance, rows: list[int]) -> str | None:
        images = cohort.batch.preview(advance, rows)
        preview = None if images is None else to_preview(images.float().cpu().numpy())
        return None if preview is None else base64.b64encode(preview).decode()

    def _hand_in(self, cohort: Cohort, advance: Advance, leases: SampleLeases) -> None:
        if advance.images is None:
            return
        with cohort.meter.waiting():
            images = advance.images.float().cpu().numpy()
        self._fail_not_finite(cohort, advance, images, leases)
        kept = [k for k, row in enumerate(advance.done) if str(row.owner) in cohort.claims]
        owners = list(dict.fromkeys(str(advance.done[k].owner) for k in kept))  # The rows of a job are adjacent.
        ends, first = [], 0
        for owner in owners:
            claim = cohort.claims[owner]
            cohort.pop(owner)
            flagged = _flagged(advance, owner)
            ends.append((claim, ended(claim.job, JobState.SUCCEEDED, row=first, flagged=flagged)))
            first += claim.job.num_images
        metrics.IMAGES.labels(cohort.model_id).inc(first)
        self._submit(ends, images[kept], leases)

    def _fail_not_finite(
        self, cohort: Cohort, advance: Advance, images: NDArray[np.float32], leases: SampleLeases
    ) -> None:
        """End the jobs with a NaN or an infinity in an image: no other job of the batch is concerned."""
        finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
        seeds: dict[str, int] = {}
        for k in np.flatnonzero(~finite).tolist():
            seeds.setdefault(str(advance.done[k].owner), advance.done[k].seed)
        for owner, seed in seeds.items():
            if claim := cohort.claims.pop(owner, None):
                message = f"the network's answers led to NaN or infinite values, first in the image of seed {seed}"
                self._fail([claim], ArithmeticError(message), leases)

    def _hand_back(self, leases: SampleLeases) -> None:
        """Hand unfinished jobs back, so that other workers run them."""
        claims = [claim for cohort in self._cohorts for claim in cohort.claims.values()]
        self._drop(*self._cohorts)
        leases.drop(claim.job_id for claim in claims)
        with self._runtime.registry.write() as session:
            hand_back_samples(session, claims)
        self._runtime.bus.request_worker()
        logger.info("handed back %d jobs", len(claims))

    def _fail(self, claims: Iterable[SampleClaim], error: Exception, leases: SampleLeases) -> None:
        message = str(error) if isinstance(error, JobRefusedError) else f"{type(error).__name__}: {error}"
        self._submit([(claim, ended(claim.job, JobState.FAILED, error=message)) for claim in claims], None, leases)

    def _submit(
        self,
        ends: list[tuple[SampleClaim, Ended]],
        images: NDArray[np.float32] | None,
        leases: SampleLeases | None,
    ) -> None:
        """Have results stored, with what the jobs used, and their leases dropped then."""
        if ends:
            ends = [(claim, replace(end, used=self._used(claim))) for claim, end in ends]
            self._results.hand_in(ends, images, leases)

    def _used(self, claim: SampleClaim) -> Use:
        """The use by a job that has ended here. It is told once."""
        meters = (cohort.meter for cohort in self._cohorts)
        return next((meter.take(claim.job_id) for meter in meters if claim.job_id in meter), Use())


def _flagged(advance: Advance, owner: str) -> list[int] | None:
    """Which of a job's images a safety checker held back; None without a checker."""
    if not advance.flagged:
        return None
    own = [flag for row, flag in zip(advance.done, advance.flagged, strict=True) if row.owner == owner]
    return [number for number, flag in enumerate(own) if flag]
