"""`DiffusionModel`: a frozen network with all that sampling and tuning need to know of it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from timetuner_core.catalog import GuidanceType, ModelType
from timetuner_core.clipping import Clipping
from timetuner_core.guided_model import GuidedModel, model_wrapper
from timetuner_core.models.mixtures import GaussianMixture
from timetuner_core.noise_schedule import NoiseSchedule


def _identity(x: Tensor) -> Tensor:
    return x


def _no_grid(num_steps: int) -> Tensor | None:
    return None


@dataclass(frozen=True)
class DiffusionModel:
    """A frozen network with all that sampling and tuning need to know of it.

    A condition is a class label per sample, `(B,)`, or a tensor per sample, `(B, L, D)`: a text encoder's output,
    say.

    Attributes:
        network: `network(x, t_input, condition=None)`; `classifier(x, t_input, labels) -> log p(c | x_t)` or None.
        sample_shape: of the network's x: the latents', if there is a VAE.
        num_classes: 0 unless the condition is a class label.
        null_class_label: the label that stands for "no class", which classifier-free guidance needs.
        num_bytes: of all weights and buffers on the device, a VAE's included.
        draw_data: `(num_samples, generator) -> (x0, conditions or None)`, x0 `(num_samples, *sample_shape)`, or
            None if the model came without data.
        reference: a fixed set of data `(P, *image_shape)` to measure distances to, or None.
        image_shape: what `decode` gives; `sample_shape` if there is no VAE.
        encode: `(B, *image_shape)`, a VAE's in -1..1, to `(B, *sample_shape)`; `decode`: back.
        condition_shape: `(L, D)` of tensor conditions, L None if any length will do; None for classes or nothing.
        uncond_condition: what stands for "no condition": the null class label `(1,)`, or a tensor `(1, L, D)`.
        draw_conditions: `(num_samples, generator) -> conditions`, or None if there are none to draw: classes
            uniformly, tensors from the data.
        sigma_data: of EDM's preconditioning, if `model_type` is `edm`.
        clipping: of x0, as its scheduler's configuration says; None for none.
        stock_timesteps: the grid `(num_steps + 1,)` that diffusers takes by default for its scheduler's configuration,
            from a number of steps; None where there is none.
        features: `(B, *image_shape) -> (B, F)`, a space that suits its images, to measure distances in; or None.
        mixture: the exact distribution of its data, where that is known.
        dtype: of the network's weights and activations.
    """

    network: Callable[..., Tensor]
    classifier: Callable[..., Tensor] | None
    noise_schedule: NoiseSchedule
    model_type: ModelType
    sample_shape: tuple[int, ...]
    num_classes: int
    null_class_label: int | None
    num_parameters: int
    num_bytes: int
    draw_data: Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]] | None
    reference: Tensor | None
    image_shape: tuple[int, ...]
    encode: Callable[[Tensor], Tensor] = _identity
    decode: Callable[[Tensor], Tensor] = _identity
    condition_shape: tuple[int | None, int] | None = None
    uncond_condition: Tensor | None = None
    draw_conditions: Callable[[int, torch.Generator], Tensor] | None = None
    sigma_data: float = 0.5
    clipping: Clipping | None = None
    stock_timesteps: Callable[[int], Tensor | None] = _no_grid
    features: Callable[[Tensor], Tensor] | None = None
    mixture: GaussianMixture | None = None
    dtype: torch.dtype = torch.float32

    @property
    def is_conditional(self) -> bool:
        return self.num_classes > 0 or self.condition_shape is not None

    @property
    def guidance_types(self) -> tuple[GuidanceType, ...]:
        """The kinds of guidance this model can be sampled with; without an `uncond_condition`, classifier-free is
        for scale 1 only, or with one that the caller brings."""
        types: list[GuidanceType] = []
        if not self.is_conditional or self.uncond_condition is not None:
            types.append("uncond")
        if self.classifier is not None:
            types.append("classifier")
        if self.is_conditional:
            types.append("classifier-free")
        return tuple(types)

    def model_fn(
        self,
        guidance_type: GuidanceType,
        guidance_scale: float | Tensor,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
    ) -> GuidedModel:
        """The guided model; see `model_wrapper`."""
        return model_wrapper(
            self.network,
            self.noise_schedule,
            self.model_type,
            guidance_type=guidance_type,
            guidance_scale=guidance_scale,
            classifier_fn=self.classifier,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            sigma_data=self.sigma_data,
            clipping=self.clipping,
        )

    def starting_at(self, t_start: float) -> Self:
        """The same model, whose named grids and teachers start at `t_start`. Raises: ValueError, outside its times."""
        return dataclasses.replace(self, noise_schedule=self.noise_schedule.starting_at(t_start))

    def clipped_as(self, clipping: str | None) -> Self:
        """The same model, with x0 clipped as `clipping_text` says; None leaves its own. Raises: ValueError."""
        return self if clipping is None else dataclasses.replace(self, clipping=Clipping.parse(clipping))

    def watched(self, before_call: Callable[[int], None]) -> Self:
        """The same model, which calls `before_call(num_samples)` before each network call; that may raise to stop."""

        def network(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            before_call(len(x))
            return self.network(x, *args, **kwargs)

        return dataclasses.replace(self, network=network)

    def conditions(self, guidance_type: GuidanceType, condition: Tensor | None) -> dict[str, Tensor | None]:
        """`condition` and `uncond_condition` for `model_fn`, from conditions `(B,)` or `(B, L, D)`."""
        if guidance_type == "uncond":
            return {"condition": None, "uncond_condition": None}
        if guidance_type == "classifier" or condition is None or self.uncond_condition is None:
            return {"condition": condition, "uncond_condition": None}
        return {"condition": condition, "uncond_condition": self.uncond_condition.to(condition)}


def draw_classes(num_classes: int) -> Callable[[int, torch.Generator], Tensor]:
    """Class labels `(num_samples,)`, uniform."""

    def draw(num_samples: int, generator: torch.Generator) -> Tensor:
        return torch.randint(num_classes, (num_samples,), generator=generator)

    return draw


def draw_rows(conditions: Tensor) -> Callable[[int, torch.Generator], Tensor]:
    """Rows of `conditions` `(P, ...)`, with replacement."""

    def draw(num_samples: int, generator: torch.Generator) -> Tensor:
        return conditions[torch.randint(len(conditions), (num_samples,), generator=generator)]

    return draw
