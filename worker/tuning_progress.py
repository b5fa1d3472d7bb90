"""How far a tuning job is, counted in network calls over all its phases: teacher, start, tuning, evaluation."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from service.shared.job_requests import TuningJobRequest
from timetuner_core.evaluation.worth import UntunedCurve
from timetuner_core.tuners import MAX_START_SAMPLES, TeacherMatchingTuner, TunedSetting
from timetuner_core.tuning_setup import Experiment

PhaseName = Literal["teacher", "start", "tuning", "evaluation"]


@dataclass
class Phase:
    """A part of a job. `total` is an estimate of its network calls, and `done` is at most that."""

    name: PhaseName
    total: int
    done: int = 0


def phases_of(
    request: TuningJobRequest,
    experiment: Experiment,
    curves: Mapping[float, UntunedCurve],
    *,
    resumed: bool,
    checks_teacher: bool,
) -> list[Phase]:
    """The phases of an attempt at a job, in order.

    A tuner that stops early makes fewer calls than its phase has. One that makes none has 1, so that it is a phase.

    Args:
        curves: The untuned sampler's curves that are known, by the guidance scale. The others are measured.
        resumed: An earlier attempt has begun to tune, so that the grid to start from is known.
        checks_teacher: The evaluation's teacher is checked first.
    """
    tuner, evaluation, num_steps = request.tuner, request.evaluation, request.num_steps
    sampler, schedule = experiment.sampler, experiment.model.noise_schedule
    has_data = experiment.model.draw_data is not None
    setting = TunedSetting(num_steps, sampler.calls_per_step, sampler.history_length, has_data, False)
    batch_size, at_scales = getattr(tuner, "batch_size", 1), experiment.at_scales()
    population = getattr(tuner, "population_size", 0)
    batches = math.ceil(population / (evaluation.batch_size if tuner.population == "data" else batch_size))
    teacher = start = 0
    if teacher_num_steps := tuner.teacher_steps(setting):
        teacher = batches * experiment.teacher_calls(teacher_num_steps)
    if checks_teacher:
        teacher += experiment.check_calls(evaluation.teacher_num_steps)
    if isinstance(tuner, TeacherMatchingTuner) and not resumed:
        compared = math.ceil(min(population, MAX_START_SAMPLES) / batch_size)
        for grids in (tuner.starts(schedule, num_steps), tuner.free_starts(schedule, num_steps)):
            start += compared * sum(map(sampler.network_calls, grids)) if len(grids) > 1 else 0
    totals: dict[PhaseName, int] = {
        "teacher": teacher,
        "start": start,
        "tuning": max(1, math.ceil(tuner.network_samples(setting) / batch_size)),
        "evaluation": sum(_evaluation_calls(request, each, curves.get(scale)) for scale, each in at_scales.items()),
    }
    return [Phase(name, total) for name, total in totals.items() if total]


def _evaluation_calls(request: TuningJobRequest, experiment: Experiment, curve: UntunedCurve | None) -> int:
    how, num_steps = request.evaluation, request.num_steps
    calls = experiment.evaluation_calls(num_steps, how.teacher_num_steps, 0, how.num_samples, curve)
    if curve is not None:
        return calls
    return calls + experiment.curve_calls(num_steps, how.teacher_num_steps, how.num_samples)


class TuningProgress:
    """Counts the network calls of one attempt at a job."""

    def __init__(
        self, phases: list[Phase], save_seconds: float, store: Callable[["TuningProgress"], None] | None = None
    ) -> None:
        """`store` is called from `count`, about every `save_seconds`, except while tuning stores its own state."""
        self.phases = phases
        self.store = store
        self.stores_itself = False
        self._current = 0
        self._save_seconds = save_seconds
        self._started = self._stored = time.monotonic()

    @property
    def phase(self) -> Phase:
        """The phase that is going on."""
        return self.phases[self._current]

    @property
    def share(self) -> float:
        """The part of all calls that is done, 0 to 1."""
        return sum(phase.done for phase in self.phases) / sum(phase.total for phase in self.phases)

    @property
    def remaining_seconds(self) -> float | None:
        """An estimate, by the time that this attempt took so far; None before anything is done."""
        share = self.share
        return (time.monotonic() - self._started) * (1 - share) / share if share else None

    def count(self) -> None:
        """Count a network call. Phases before tuning follow each other as their calls are done."""
        if self.phase.done >= self.phase.total and self.phase.name in ("teacher", "start"):
            self._current += 1
        phase = self.phase
        if not (phase.name == "tuning" and self.stores_itself):
            phase.done = min(phase.total, phase.done + 1)
        if self.store is not None and time.monotonic() - self._stored > self._save_seconds:
            self.store(self)
            self._stored = time.monotonic()

    def enter(self, name: PhaseName) -> None:
        """Begin a phase. Those before it are done."""
        while self.phase.name != name:
            self.phase.done = self.phase.total
            self._current += 1

    def evaluate_more(self, calls: int) -> None:
        """Count so many calls more for the evaluation, which is undecided and takes more noises."""
        self.phase.total += calls

    def tuned(self, share: float) -> None:
        """Note which part of all iterations is done. Until the first is, the phase stays what it was."""
        if share > 0 and self.phase.name != "evaluation":
            self.enter("tuning")
            self.phase.done = max(self.phase.done, math.floor(share * self.phase.total))

    def described(self) -> dict[str, Any]:
        """The progress as an event of the job holds it."""
        phases = [{"name": phase.name, "done": phase.done, "total": phase.total} for phase in self.phases]
        return {"phase": self.phase.name, "phases": phases, "remaining_seconds": self.remaining_seconds}
