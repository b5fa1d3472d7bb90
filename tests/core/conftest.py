"""Networks with known answers, and the small tools that several files need."""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from timetuner_core import NoiseScheduleVP, TimeTuner, model_wrapper
from timetuner_core.models.loading import UNET_CONFIG, UNET_WEIGHTS
from timetuner_core.models.mixtures import GaussianMixture
from timetuner_core.noise_schedule import NoiseSchedule

torch.set_num_threads(1)

Network = Callable[..., Tensor]

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def crossed(**axes: Iterable[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """A test of every combination of the axes' values; a mapping's keys name its values.

    `make test` runs a diagonal, which meets every value of every axis. The other combinations are exhaustive.
    Along the diagonal each axis shifts by its own place after each of its rounds. Axes of equal length thus meet in
    several pairs.
    """
    named = [
        list((axis if isinstance(axis, Mapping) else {_name(value): value for value in axis}).items())
        for axis in axes.values()
    ]
    diagonal = {
        tuple((i + axis * (i // len(values))) % len(values) for axis, values in enumerate(named))
        for i in range(max(map(len, named)))
    }
    combinations = []
    for place in itertools.product(*(range(len(values)) for values in named)):
        names, values = zip(*(axis[i] for axis, i in zip(named, place, strict=True)), strict=True)
        marks = () if place in diagonal else (pytest.mark.exhaustive,)
        combinations.append(pytest.param(*values, id="-".join(names), marks=marks))
    return pytest.mark.parametrize(list(axes), combinations)


def _name(value: Any) -> str:
    name: str = getattr(value, "__name__", str(value))
    return name


class Recorded:
    """A network that remembers the arguments of its calls."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append(args)
        return self.network(*args, **kwargs)

    @property
    def batch_sizes(self) -> list[int]:
        return [len(x) for x, *_ in self.calls]

    @property
    def times(self) -> list[float]:
        """The time of each call's first sample, as the network saw it."""
        return [t_input[0].item() for _, t_input, *_ in self.calls]


def normals(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_betas(num_steps: int) -> Tensor:
    """DDPM's betas, scaled so that any number of steps ends as noisy as its thousand; float64."""
    return torch.linspace(0.1, 20.0, num_steps, dtype=torch.float64).clamp(max=0.9 * num_steps) / num_steps


def small_mixture(noise_schedule: NoiseSchedule | None = None) -> GaussianMixture:
    """Three unequal 2-d Gaussians in two classes, in float64."""
    return GaussianMixture(
        noise_schedule or NoiseScheduleVP("linear"),
        means=torch.tensor([[0.9, -0.2], [-0.6, 0.7], [-0.3, -0.8]], dtype=torch.float64),
        stds=torch.tensor([0.15, 0.3, 0.2], dtype=torch.float64),
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        classes=torch.tensor([0, 1, 0]),
    )


def predicting(network: Network, noise_schedule: NoiseSchedule, model_type: str) -> Network:
    """The answer of an eps-predicting network as a network of another type would give it."""

    def converted(x: Tensor, t_input: Tensor, *condition: Tensor) -> Tensor:
        eps = network(x, t_input, *condition)
        t = noise_schedule.time_of_model_input(t_input)
        alpha_t, sigma_t = (
            coefficient(t).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
            for coefficient in (noise_schedule.marginal_alpha, noise_schedule.marginal_std)
        )
        x0 = (x - sigma_t * eps) / alpha_t
        return {"noise": eps, "x_start": x0, "v": alpha_t * eps - sigma_t * x0, "score": -eps / sigma_t}[model_type]

    return converted


def tuner_of(network: Network, noise_schedule: NoiseSchedule, **wrapper_kwargs: Any) -> TimeTuner:
    return TimeTuner(model_wrapper(network, noise_schedule, **wrapper_kwargs), noise_schedule)


def tiny_unet(**config: Any) -> Any:
    """A random diffusers U-Net for 4x4 images of one channel."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return UNet2DModel(**(defaults | config)).eval().requires_grad_(False)


def save_model(folder: Path, unet: Any, metadata: dict[str, Any] | None = None, **scheduler_config: Any) -> Path:
    """Write a diffusers-format folder, as diffusers itself does."""
    from diffusers import DDPMScheduler

    unet.save_pretrained(folder / Path(UNET_CONFIG).parent, safe_serialization=Path(UNET_WEIGHTS).suffix != ".bin")
    DDPMScheduler(**scheduler_config).save_pretrained(folder / "scheduler")
    if metadata is not None:
        (folder / "timetuner.json").write_text(json.dumps(metadata))
    return folder
