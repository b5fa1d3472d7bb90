"""Guided predictions of x0 and eps in continuous time, by any network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from timetuner_core.catalog import GuidanceType, ModelType
from timetuner_core.clipping import CLIP_RULES, Clipping
from timetuner_core.noise_schedule import NoiseSchedule


class Prediction(NamedTuple):
    """The x0 and eps that a network predicts in `x_t = alpha_t x0 + sigma_t eps`, both of x_t's shape."""

    x0: Tensor
    eps: Tensor


def expand_like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape `()` or `(B,)`, in `x`'s dtype, ready to multiply `x` of shape `(B, ...)`."""
    return coefficient.to(x.dtype).reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def repeat_to_batch(condition: Tensor, batch_size: int) -> Tensor:
    """`condition` repeated along its first dimension until it has `batch_size` rows.

    Raises:
        ValueError: `batch_size` is not a multiple of the rows given.
    """
    rows = len(condition)
    if rows == 0 or batch_size % rows:
        raise ValueError(
            f"a condition has {rows} rows for a batch of {batch_size}; "
            "accepted: as many rows as samples, or a divisor of that number, such as 1"
        )
    return condition if rows == batch_size else condition.repeat(batch_size // rows, *[1] * (condition.ndim - 1))


@dataclass(frozen=True)
class GuidedModel:
    """A network as `model_wrapper` wraps it; see there for the fields.

    Called with `(x, t, condition, uncond_condition)` it gives the guided eps, of x's shape `(B, ...)`; `t` is
    `()` or `(B,)`. `predict` gives x0 too, and takes the ratio that moves the network's conditioning.
    """

    network: Callable[..., Tensor]
    noise_schedule: NoiseSchedule
    model_type: ModelType = "noise"
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    guidance_type: GuidanceType = "uncond"
    guidance_scale: float | Tensor = 1.0
    classifier_fn: Callable[..., Tensor] | None = None
    classifier_kwargs: Mapping[str, Any] = field(default_factory=dict)
    cond_process_fn: Callable[[Any], Tensor] | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    sigma_data: float = 0.5
    clipping: Clipping | None = None

    def __call__(
        self, x: Tensor, t: Tensor, condition: Tensor | None = None, uncond_condition: Tensor | None = None
    ) -> Tensor:
        return self.predict(x, t, 1.0, condition, uncond_condition).eps

    def predict(
        self,
        x: Tensor,
        t: Tensor,
        t_ratio: Tensor | float = 1.0,
        condition: Tensor | None = None,
        uncond_condition: Tensor | None = None,
    ) -> Prediction:
        """x0 and eps at x_t, the network conditioned on `t * t_ratio`: alpha_t and sigma_t stay at `t`.

        Raises:
            ValueError: guidance without its condition, or a condition whose rows do not fit the batch.
        """
        t_input = self._input_time(x, t * t_ratio)
        t = t.to(x.device).expand(len(x))
        if self.guidance_type == "uncond":
            return self._prediction(x, t, self._output(x, t, t_input, None))
        condition = self._rows(condition, x)
        if condition is None:
            raise ValueError(f"guidance_type {self.guidance_type!r} needs a condition")
        uncond_condition = self._rows(uncond_condition, x)
        if self.guidance_type == "classifier":
            return self._classifier_guided(x, t, t_input, condition, uncond_condition)
        return self._prediction(x, t, self._classifier_free(x, t, t_input, condition, uncond_condition))

    def predict_for(
        self,
        sampler: str,
        x: Tensor,
        t: Tensor,
        t_ratio: Tensor | float = 1.0,
        condition: Tensor | None = None,
        uncond_condition: Tensor | None = None,
    ) -> Prediction:
        """`predict`, with x0 clipped as the diffusers class of a sampler by that name clips it."""
        prediction = self.predict(x, t, t_ratio, condition, uncond_condition)
        rule = None if self.clipping is None else CLIP_RULES.get(sampler)
        if rule is None or self.clipping is None:
            return prediction
        x0 = rule.clip(self.clipping, prediction.x0)
        if x0 is None:
            return prediction
        if not rule.eps_follows:
            return Prediction(x0, prediction.eps)
        t = t.to(x.device).expand(len(x))
        alpha_t = expand_like(self.noise_schedule.marginal_alpha(t), x)
        sigma_t = expand_like(self.noise_schedule.marginal_std(t), x)
        return Prediction(x0, (x - alpha_t * x0) / sigma_t)

    def input_scale(self, t: Tensor) -> Tensor:
        """The factor of x_t in the network's input: c_in for EDM's networks, else 1; of t's shape."""
        return self._edm_coefficients(t)[0] if self.model_type == "edm" else torch.ones_like(t)

    def _input_time(self, x: Tensor, t: Tensor) -> Tensor:
        # Half precision would round time 999 to a multiple of 0.5 or worse.
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.noise_schedule.model_input_time(t).to(x.device, dtype).expand(len(x))

    def _rows(self, condition: Any, x: Tensor) -> Tensor | None:
        if condition is None:
            return None
        processed: Tensor = condition if self.cond_process_fn is None else self.cond_process_fn(condition)
        return repeat_to_batch(processed, len(x))

    def _output(self, x: Tensor, t: Tensor, t_input: Tensor, condition: Tensor | None) -> Tensor:
        """The network's own output, unguided."""
        if self.model_type == "edm":
            x = expand_like(self.input_scale(t), x) * x
        args = (x, t_input) if condition is None else (x, t_input, condition)
        return self.network(*args, **self.model_kwargs)

    def _prediction(self, x: Tensor, t: Tensor, output: Tensor) -> Prediction:
        """x0 and eps from a network's output, each linear in it."""
        alpha_t = expand_like(self.noise_schedule.marginal_alpha(t), x)
        sigma_t = expand_like(self.noise_schedule.marginal_std(t), x)
        if self.model_type == "noise":
            return Prediction((x - sigma_t * output) / alpha_t, output)
        if self.model_type == "score":
            return Prediction((x + sigma_t**2 * output) / alpha_t, -sigma_t * output)
        if self.model_type == "v":
            norm = alpha_t**2 + sigma_t**2
            return Prediction((alpha_t * x - sigma_t * output) / norm, (sigma_t * x + alpha_t * output) / norm)
        if self.model_type == "flow":
            norm = alpha_t + sigma_t
            return Prediction((x - sigma_t * output) / norm, (x + alpha_t * output) / norm)
        x0 = output
        if self.model_type == "edm":
            _, c_skip, c_out = (expand_like(c, x) for c in self._edm_coefficients(t))
            x0 = c_skip * x + c_out * output
        return Prediction(x0, (x - alpha_t * x0) / sigma_t)

    def _edm_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_in, c_skip and c_out (Karras et al. 2022, table 1) for x_t, which EDM divides by alpha_t."""
        alpha_t = self.noise_schedule.marginal_alpha(t)
        sigma = self.noise_schedule.marginal_std(t) / alpha_t
        norm = sigma**2 + self.sigma_data**2
        return norm.rsqrt() / alpha_t, self.sigma_data**2 / norm / alpha_t, sigma * self.sigma_data * norm.rsqrt()

    def _scale(self, t: Tensor, unguided: float) -> float | Tensor:
        """The guidance scale at `t` `(B,)`: `unguided` outside the interval."""
        constant = isinstance(self.guidance_scale, float | int) and self.guidance_scale == unguided
        if self.guidance_interval is None or constant:
            return self.guidance_scale
        low, high = self.guidance_interval
        inside = (t >= low) & (t <= high)
        if not bool(inside.any()):
            return unguided
        scale = torch.as_tensor(self.guidance_scale, dtype=t.dtype, device=t.device)
        return torch.where(inside, scale, unguided)

    def _classifier_guided(
        self, x: Tensor, t: Tensor, t_input: Tensor, condition: Tensor, uncond_condition: Tensor | None
    ) -> Prediction:
        classifier_fn = self.classifier_fn
        assert classifier_fn is not None

        def log_prob(x: Tensor) -> Tensor:
            return classifier_fn(x, t_input, condition, **self.classifier_kwargs).sum()

        x0, eps = self._prediction(x, t, self._output(x, t, t_input, uncond_condition))
        scale = self._scale(t, 0.0)
        if isinstance(scale, float | int) and scale == 0:
            return Prediction(x0, eps)
        # This works inside no_grad, under autograd, forward mode and checkpoints; torch.func.grad fails under the last.
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            x_grad = x + torch.zeros_like(x, requires_grad=True)
            (gradient,) = torch.autograd.grad(log_prob(x_grad), x_grad, create_graph=create_graph)
        alpha_t = expand_like(self.noise_schedule.marginal_alpha(t), x)
        sigma_t = expand_like(self.noise_schedule.marginal_std(t), x)
        shift = expand_like(torch.as_tensor(scale, dtype=x.dtype, device=x.device), x) * sigma_t * gradient
        return Prediction(x0 + sigma_t / alpha_t * shift, eps - shift)

    def _classifier_free(
        self, x: Tensor, t: Tensor, t_input: Tensor, condition: Tensor, uncond_condition: Tensor | None
    ) -> Tensor:
        scale = self._scale(t, 1.0)
        if isinstance(scale, float | int) and scale == 1:
            return self._output(x, t, t_input, condition)
        if uncond_condition is None:
            raise ValueError(f"classifier-free guidance at scale {self.guidance_scale} needs an uncond_condition")
        both = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([t_input, t_input]))
        uncond, cond = self._output(*both, torch.cat([uncond_condition, condition])).chunk(2)
        guided = uncond + expand_like(torch.as_tensor(scale, dtype=x.dtype, device=x.device), x) * (cond - uncond)
        if self.guidance_rescale == 0:
            return guided
        axes = tuple(range(1, x.ndim))
        same_std = guided * (cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
        return torch.lerp(guided, same_std, self.guidance_rescale)


def model_wrapper(
    model: Callable[..., Tensor],
    noise_schedule: NoiseSchedule,
    model_type: ModelType = "noise",
    model_kwargs: Mapping[str, Any] | None = None,
    guidance_type: GuidanceType = "uncond",
    guidance_scale: float | Tensor = 1.0,
    classifier_fn: Callable[..., Tensor] | None = None,
    classifier_kwargs: Mapping[str, Any] | None = None,
    cond_process_fn: Callable[[Any], Tensor] | None = None,
    *,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float = 0.0,
    sigma_data: float = 0.5,
    clipping: Clipping | None = None,
) -> GuidedModel:
    """Wrap a network as a guided, continuous-time model.

    Args:
        model: `model(x, t_input, **model_kwargs)`, with the condition as third argument if there is
            one. `x` is `(B, ...)`, `t_input` is `(B,)` as `NoiseSchedule.model_input_time` gives it.
        model_type: what the network predicts: `noise` eps; `x_start` x0; `v` = alpha eps - sigma x0 (Salimans &
            Ho 2022); `score` = -eps / sigma; `flow` = eps - x0 (Liu et al. 2023); `edm` F of EDM's
            preconditioning for data of standard deviation `sigma_data` (Karras et al. 2022, table 1).
        guidance_type: `uncond`; `classifier` (Dhariwal & Nichol 2021): eps - s sigma_t grad log q(c | x_t),
            where the network itself is given `uncond_condition`, if any, never `condition`;
            `classifier-free` (Ho & Salimans 2022): s eps(x, t, c) + (1 - s) eps(x, t), one batched call.
        guidance_scale: `s` above, one for all or `(B,)`.
        classifier_fn: `classifier_fn(x, t_input, condition, **classifier_kwargs)`: log q(c | x_t), `(B,)`.
        cond_process_fn: applied to conditions before the network sees them (LDM's text encoder, say).
        guidance_interval: `(low, high)`, times outside of which there is no guidance: only the conditional
            network (or, with a classifier, only the unconditional one) is used (Kynkäänniemi et al. 2024).
        guidance_rescale: how far, 0 to 1, to bring a classifier-free prediction's standard deviation back to
            the conditional one's (Lin et al. 2024, eq. 16).
        clipping: of x0, for the samplers whose diffusers class does so; see `clipping.CLIP_RULES`.

    Returns:
        `model_fn(x, t, condition=None, uncond_condition=None) -> eps`, see `GuidedModel`. Differentiable in
        `x` and `t` whenever gradients are enabled, classifier guidance included; works under `no_grad` too.
        An `uncond_condition` of fewer rows (1, say) is repeated to the batch.

    Raises:
        ValueError: unknown `model_type` or `guidance_type`; guidance without what it needs, or with what it
            cannot use.
    """
    if model_type not in get_args(ModelType):
        raise ValueError(f"model_type is {model_type!r}; accepted: {', '.join(get_args(ModelType))}")
    if guidance_type not in get_args(GuidanceType):
        raise ValueError(f"guidance_type is {guidance_type!r}; accepted: {', '.join(get_args(GuidanceType))}")
    if guidance_type == "classifier" and classifier_fn is None:
        raise ValueError("guidance_type 'classifier' needs a classifier_fn")
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale is {guidance_rescale}; accepted: 0 to 1")
    if guidance_rescale and guidance_type != "classifier-free":
        raise ValueError(f"guidance_rescale is for guidance_type 'classifier-free', not {guidance_type!r}")
    if guidance_interval is not None and guidance_type == "uncond":
        raise ValueError("guidance_interval is for a guidance_type other than 'uncond'")
    if guidance_interval is not None and not guidance_interval[0] < guidance_interval[1]:
        raise ValueError(f"guidance_interval is {guidance_interval}; accepted: (low, high), low below high")
    return GuidedModel(
        model,
        noise_schedule,
        model_type,
        dict(model_kwargs or {}),
        guidance_type,
        guidance_scale,
        classifier_fn,
        dict(classifier_kwargs or {}),
        cond_process_fn,
        guidance_interval,
        guidance_rescale,
        sigma_data,
        clipping,
    )
