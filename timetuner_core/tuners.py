"""Every tuner by name: what it is given, and how it is run. Each ends in a grid and ratios."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor

from timetuner_core.catalog import GridName
from timetuner_core.grids import make_timesteps, teacher_timesteps
from timetuner_core.rivals.ays import ays_timesteps
from timetuner_core.rivals.dmn import dmn_timesteps
from timetuner_core.rivals.gits import gits_timesteps
from timetuner_core.tuning.end_to_end import tune_end_to_end
from timetuner_core.tuning.per_step import tune_per_step
from timetuner_core.tuning.problem import TuningProblem, TuningState


@dataclass(frozen=True)
class Tuner:
    """A tuner by name.

    Attributes:
        population: what `TuningProblem.population` must hold: data x0, initial noise x_T, or whatever.
        run: `(problem, state, **options)`, an iterator that updates `state` as it goes; from a state that another
            run left behind it goes on, and from one that is done it yields nothing.
    """

    population: Literal["data", "noise", "none"]
    run: Callable[..., Iterator[TuningState]]


def _end_to_end(
    problem: TuningProblem,
    state: TuningState,
    teacher_num_steps: int = 50,
    start: Literal["given", "best"] = "given",
    **options: Any,
) -> Iterator[TuningState]:
    """`best` starts with the best of the named grids."""
    schedule = problem.noise_schedule
    names = get_args(GridName) if start == "best" else ()
    starts = [make_timesteps(schedule, problem.num_steps, name) for name in names]
    teacher = teacher_timesteps(schedule, teacher_num_steps)
    return tune_end_to_end(problem, state, teacher, starts=starts, **options)


def _search(
    search: Callable[..., Tensor], problem: TuningProblem, state: TuningState, **options: Any
) -> Iterator[TuningState]:
    """A search for a grid: over in one go."""
    if not bool(state.done.all()):
        state.timesteps = search(problem, **options).double().cpu()
        state.done[:] = True
        yield state


def _as_it_is(problem: TuningProblem) -> Tensor:
    return problem.timesteps


TUNERS: dict[str, Tuner] = {
    "end_to_end": Tuner("noise", _end_to_end),
    "next_eps": Tuner("data", partial(tune_per_step, objective="next_eps")),
    "teacher_step": Tuner("data", partial(tune_per_step, objective="teacher_step")),
    "ays": Tuner("data", partial(_search, ays_timesteps)),
    "gits": Tuner("noise", partial(_search, gits_timesteps)),
    "dmn": Tuner("none", partial(_search, dmn_timesteps)),
    "grid": Tuner("none", partial(_search, _as_it_is)),
}
