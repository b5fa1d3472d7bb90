"""Few-step samplers, by name; all take a time grid and one `t_ratio` per step."""

from importlib.metadata import entry_points

from timetuner_core.catalog import SAMPLER_ENTRY_POINTS, sampler_names
from timetuner_core.samplers.base import (
    Generators,
    Past,
    Sampler,
    SamplerStep,
    Step,
    StepFn,
    adds_noise,
    history_length,
    initial_noise,
    latest,
    remember,
    sample,
    sample_steps,
    step_noise,
    with_history,
)
from timetuner_core.samplers.multistep import MULTISTEP
from timetuner_core.samplers.onestep import ONESTEP

SAMPLERS = {sampler.name: sampler for sampler in (*ONESTEP, *MULTISTEP)}


def get_sampler(name: str | Sampler) -> Sampler:
    """A sampler of `SAMPLERS`, or one that an installed package names in its entry points `timetuner.samplers`.

    A `Sampler` in place of a name, such as a learned solver, is given back.

    Raises:
        ValueError: no such name.
        TypeError: an entry point that is no `Sampler`.
    """
    if isinstance(name, Sampler):
        return name
    if name in SAMPLERS:
        return SAMPLERS[name]
    for entry in entry_points(group=SAMPLER_ENTRY_POINTS, name=name):
        sampler = entry.load()
        if not isinstance(sampler, Sampler):
            raise TypeError(f"entry point {entry.value!r} gives a {type(sampler).__name__}; accepted: a Sampler")
        return sampler
    raise ValueError(f"sampler is {name!r}; accepted: {', '.join(sampler_names())}")


__all__ = [
    "SAMPLERS",
    "Generators",
    "Past",
    "Sampler",
    "SamplerStep",
    "Step",
    "StepFn",
    "adds_noise",
    "get_sampler",
    "history_length",
    "initial_noise",
    "latest",
    "remember",
    "sample",
    "sample_steps",
    "sampler_names",
    "step_noise",
    "with_history",
]
