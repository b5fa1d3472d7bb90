"""Every tuner in every setting, from the same noise: the harness behind `timetuner compare`."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from timetuner_core.compare.plan import (
    BASELINE,
    ENTRANTS,
    ComparedSetting,
    Effort,
    Entrant,
    Group,
    Plan,
    PlanError,
    load_model,
    parse_guidance,
)
from timetuner_core.compare.processes import one_thread, workers
from timetuner_core.compare.trial import METRICS, Outcome, Trajectories, run_setting, teach
from timetuner_core.grids import make_timesteps
from timetuner_core.samplers import get_sampler

__all__ = [
    "BASELINE",
    "ENTRANTS",
    "METRICS",
    "ComparedSetting",
    "Comparison",
    "Effort",
    "Entrant",
    "Group",
    "Outcome",
    "Plan",
    "PlanError",
    "Trajectories",
    "parse_guidance",
    "run",
]

Done = Callable[[float], None]


@dataclass(frozen=True)
class Comparison:
    """All outcomes, in the plan's order; and trajectories of each group that has any."""

    plan: Plan
    outcomes: list[Outcome]
    trajectories: dict[Group, Trajectories]
    seconds: float
    jobs: int


def run(plan: Plan, jobs: int = 1, done: Done = lambda _: None) -> Comparison:
    """Compare, in `jobs` processes of one thread each; the figures do not depend on how many.

    Args:
        done: called with the share of all work that was just finished.
    """
    started = time.monotonic()
    refusals = {setting: _refusal(setting) for setting in plan.settings}
    settings = [setting for setting, reason in refusals.items() if reason is None]
    groups = list(dict.fromkeys(setting.group for setting in settings))
    tasks: list[Group | ComparedSetting] = [*groups, *settings]
    costs = {task: _guess_cost(plan, task) for task in tasks}

    def finished(task: Group | ComparedSetting) -> None:
        done(costs[task] / sum(costs.values()))

    with workers(min(jobs, max(1, len(settings)))) as in_workers:
        groups.sort(key=lambda group: -costs[group])
        teachings = in_workers(partial(teach, plan), {group: (group,) for group in groups}, finished)
        settings.sort(key=lambda setting: -costs[setting])
        trials = {setting: (setting, teachings[setting.group]) for setting in settings}
        results = in_workers(partial(run_setting, plan), trials, finished)
    outcomes = []
    for setting, reason in refusals.items():
        if reason is None:
            outcomes += results[setting].outcomes
        else:
            outcomes += [Outcome(setting, entrant, reason=reason) for entrant in plan.entrants]
    trajectories = {s.group: drawn for s in plan.settings if s in results and (drawn := results[s].trajectories)}
    return Comparison(plan, outcomes, trajectories, time.monotonic() - started, jobs)


def _refusal(setting: ComparedSetting) -> str | None:
    """The reason why no entrant applies to a setting, or None."""
    model, guidance = load_model(setting.group.model), parse_guidance(setting.group.guidance)
    if guidance.type not in model.guidance_types:
        accepted = ", ".join(model.guidance_types)
        return f"guidance is {setting.group.guidance!r}; accepted for this model: {accepted}"
    if guidance.type != "uncond" and model.draw_conditions is None:
        return "the model came without conditions to draw; accepted: guidance 'uncond'"
    try:
        make_timesteps(model.noise_schedule, setting.num_steps)
    except ValueError as error:
        return str(error)
    return None


def _guess_cost(plan: Plan, task: Group | ComparedSetting) -> float:
    """Seconds of one core that a task will take, by the samples it puts through the network."""
    effort = plan.effort
    group = task if isinstance(task, Group) else task.group
    if isinstance(task, Group):
        rows: float = (
            plan.num_samples * effort.teacher_num_steps + effort.noise_population * effort.tuning_teacher_num_steps
        )
    else:
        sampler = get_sampler(group.sampler)
        tuning = sum(ENTRANTS[name].rows(effort, sampler, task.num_steps) for name in plan.entrants)
        rows = tuning + len(plan.entrants) * plan.num_samples * task.num_steps
    calls = get_sampler(group.sampler).calls_per_step * (2 if parse_guidance(group.guidance).type != "uncond" else 1)
    return rows * calls * _seconds_per_row(group.model)


@cache
@torch.no_grad()
def _seconds_per_row(model_name: str) -> float:
    """Seconds that one row of an unguided batch takes on one core."""
    model = load_model(model_name)
    x, t = torch.zeros(64, *model.sample_shape), torch.full((64,), model.noise_schedule.T)
    model_fn = model.model_fn(model.guidance_types[0], 1.0)
    condition = None if model.draw_conditions is None else model.draw_conditions(len(x), torch.Generator())
    seconds = []
    with one_thread():
        for _ in range(3):
            started = time.process_time()
            model_fn(x, t, condition)
            seconds.append(time.process_time() - started)
    return min(seconds) / len(x)
