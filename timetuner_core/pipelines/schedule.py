"""A tuned schedule for pipelines, and what it belongs to."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from timetuner_core.integrations.time_tuner_scheduler import TimeTunerScheduler
from timetuner_core.models.schedulers import read_scheduler_config
from timetuner_core.models.tensors import dtype_name
from timetuner_core.pipelines.joining import content_of
from timetuner_core.pipelines.kinds import SHARED_NETWORKS

# Arguments of a call that have a field of their own in a key. All others that change latents are under `call`. Several
# sizes are an interval, [smallest, largest], and so may the guidance scale be.
SIZES = ("height", "width", "num_frames")

# Each parameter of a network is known by so many of its values. A LoRA that is fused changes nearly all of them.
VALUES_PER_PARAMETER = 16


@dataclass(frozen=True)
class PipelineSchedule:
    """A schedule that `tune_pipeline` found.

    Attributes:
        timesteps: `num_steps + 1` falling times. t_ratios: one per step.
        solver_table: the solver's coefficients, as `SolverTable.to_dict` writes them; None for the sampler's own.
        key: what the schedule belongs to, by field; see `differences`.
        evaluation: the verdict on prompts and seeds that the tuner has not seen, as `Evaluation.to_dict` writes it;
            besides, `distances` to the teacher, which of them the verdict is `compared_with`, and the costs. Of an
            interval of guidance scales it is that of the `guidance_scale` that decides, and `at_scales` has them all.
    """

    timesteps: list[float]
    t_ratios: list[float]
    sampler: str
    solver_table: dict[str, Any] | None
    key: dict[str, Any]
    evaluation: dict[str, Any]

    @property
    def num_steps(self) -> int:
        """The number to pass as `num_inference_steps`."""
        return len(self.t_ratios)

    def scheduler(self, pipeline: Any, *, override: bool = False) -> TimeTunerScheduler:
        """The scheduler for a pipeline like the one it was tuned on.

        Args:
            override: take it for another pipeline all the same.

        Raises:
            ValueError: which fields of the key differ from the pipeline's.
        """
        own = key_of(pipeline, None, {}) | {name: self.key[name] for name in _OF_THE_CALL}
        different = [] if override else _differences(self.key, own)
        if different:
            accepted = "a pipeline like the tuned one, or override=True"
            raise ValueError(f"the schedule belongs to another pipeline: {'; '.join(different)}; accepted: {accepted}")
        scheduler: TimeTunerScheduler = TimeTunerScheduler.from_schedule(pipeline.scheduler, asdict(self))
        return scheduler

    def differences(self, pipeline: Any, guidance_scale: float | None = None, **call: Any) -> list[str]:
        """The fields of a pipeline's call that do not match: one text for each, none if the schedule belongs to it."""
        return _differences(self.key, key_of(pipeline, guidance_scale, call))

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PipelineSchedule":
        """The schedule that `to_dict` wrote.

        Raises:
            ValueError: a field is missing, or not known.
        """
        names = [field.name for field in fields(cls)]
        if set(values) != set(names):
            raise ValueError(f"a schedule has the fields {', '.join(sorted(values))}; accepted: {', '.join(names)}")
        return cls(**values)


# These fields of a key belong to a call, the others to the pipeline itself.
_OF_THE_CALL = ("guidance_scale", "sizes", "call")


def key_of(pipeline: Any, guidance_scale: float | Sequence[float] | None, call: Mapping[str, Any]) -> dict[str, Any]:
    """The key that a schedule for such calls of a pipeline belongs to, in a form that JSON takes.

    Sizes and a guidance scale that are not given are None, the pipeline's default. Values that JSON does not take, such
    as images, are told by a digest.
    """
    networks = {name: part for name in SHARED_NETWORKS if (part := getattr(pipeline, name, None)) is not None}
    spec = read_scheduler_config({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
    noise_schedule = spec.noise_schedule
    times = torch.linspace(noise_schedule.t_min, noise_schedule.T, 16, dtype=torch.float64)
    levels = torch.stack([noise_schedule.marginal_alpha(times), noise_schedule.marginal_std(times)])
    return {
        "pipeline": type(pipeline).__name__,
        "networks": {name: _network_key(network) for name, network in networks.items()},
        "prediction": spec.model_type,
        "noise_schedule": content_of(levels.float().round(decimals=5)).hex(),
        "guidance_scale": list(guidance_scale) if isinstance(guidance_scale, Sequence) else guidance_scale,
        "sizes": {name: _size(call[name]) for name in SIZES if call.get(name) is not None},
        "call": {name: _plain(name, value) for name, value in sorted(call.items()) if name not in SIZES},
    }


def _size(value: Any) -> Any:
    """A size, or the interval of several."""
    return [min(value), max(value)] if isinstance(value, list | tuple) else value


def _network_key(network: Any) -> dict[str, Any]:
    cache = getattr(network, "_cache_config", None)
    return {
        "class": type(network).__name__,
        "dtype": dtype_name(network.dtype),
        "adapters": _adapters(network),
        "cache": None if cache is None else type(cache).__name__,
        "weights": _weights(network),
    }


def _adapters(network: Any) -> dict[str, float]:
    """The active adapters of a network, LoRAs among them, with their scales."""
    scales: dict[str, float] = {}
    for module in network.modules():
        scaling, active = getattr(module, "scaling", None), getattr(module, "active_adapters", None)
        is_off = getattr(module, "merged", False) or getattr(module, "_disable_adapters", False)
        if isinstance(scaling, Mapping) and isinstance(active, list) and not is_off:
            scales |= {name: float(scaling[name]) for name in active if name in scaling}
    return scales


def _weights(network: Any) -> str:
    """A digest of a network's parameters, by some values of each."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in network.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        values = _offloaded(network, name) if parameter.is_meta else parameter
        if not values.is_meta:
            flat = values.detach().reshape(-1)
            some: Tensor = flat[:: max(1, len(flat) // VALUES_PER_PARAMETER)].float().cpu()
            digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _offloaded(network: Any, name: str) -> Tensor:
    """A parameter that accelerate keeps elsewhere until its module is called; as it is, where nothing keeps it."""
    owner, _, own_name = name.rpartition(".")
    module = network.get_submodule(owner)
    kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    parameter: Tensor = getattr(module, own_name) if kept is None else kept[own_name]
    return parameter


def _plain(name: str, value: Any) -> Any:
    """An argument in a form that JSON takes. Raises: ValueError, for a value that cannot be told apart from others."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(name, each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(name, each) for key, each in value.items()}
    if isinstance(value, Tensor):
        return content_of(value).hex()
    if hasattr(value, "tobytes"):  # A picture, or an array of numpy.
        return hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
    accepted = "numbers, texts, tensors, arrays, pictures, and lists or dictionaries of these"
    raise ValueError(f"{name} is a {type(value).__name__}; accepted: {accepted}")


def _may_be_interval(name: str) -> bool:
    """Whether a field's list in a key is the least and the greatest value that a schedule belongs to."""
    return name == "guidance_scale" or name.startswith("sizes.")


def _differences(tuned: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each field in which a call differs from what a schedule was tuned for."""
    found = []
    for name in sorted({*tuned, *given}):
        before, now = tuned.get(name), given.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += _differences(before, now, f"{prefix}{name}.")
        elif isinstance(before, list) and _may_be_interval(f"{prefix}{name}") and isinstance(now, int | float):
            if not before[0] <= now <= before[1]:
                found.append(f"{prefix}{name} is {now}, tuned for {before[0]} to {before[1]}")
        elif before != now:
            found.append(f"{prefix}{name} is {now!r}, tuned for {before!r}")
    return found
