"""From any network to `model_fn(x, t, condition, uncond_condition) -> eps` in continuous time."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from timetuner_core.noise_schedule import NoiseScheduleVP

ModelType = Literal["noise", "x_start", "v", "score"]
GuidanceType = Literal["uncond", "classifier", "classifier-free"]


class ModelFn(Protocol):
    """A guided noise prediction in continuous time."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        uncond_condition: Tensor | None = None,
    ) -> Tensor:
        """eps of shape `(B, ...)` for `x` of shape `(B, ...)` and `t` of shape `()` or `(B,)`."""
        ...


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


def model_wrapper(
    model: Callable[..., Tensor],
    noise_schedule: NoiseScheduleVP,
    model_type: ModelType = "noise",
    model_kwargs: Mapping[str, Any] | None = None,
    guidance_type: GuidanceType = "uncond",
    guidance_scale: float = 1.0,
    classifier_fn: Callable[..., Tensor] | None = None,
    classifier_kwargs: Mapping[str, Any] | None = None,
    cond_process_fn: Callable[[Any], Tensor] | None = None,
) -> ModelFn:
    """Wrap a network as a guided, continuous-time noise prediction model.

    Args:
        model: `model(x, t_input, **model_kwargs)`, with the condition as third argument if there is
            one. `x` is `(B, ...)`, `t_input` is `(B,)` as `NoiseScheduleVP.model_input_time` gives it.
        model_type: what the network predicts: `noise` eps, `x_start` x0, `v` = alpha eps - sigma x0
            (Salimans & Ho 2022), `score` = -eps / sigma.
        guidance_type: `uncond`; `classifier` (Dhariwal & Nichol 2021): eps - s sigma_t grad log q(c | x_t),
            where the network itself is given `uncond_condition`, if any, never `condition`;
            `classifier-free` (Ho & Salimans 2022): s eps(x, t, c) + (1 - s) eps(x, t), one batched call.
        guidance_scale: `s` above.
        classifier_fn: `classifier_fn(x, t_input, condition, **classifier_kwargs)`: log q(c | x_t), `(B,)`.
        cond_process_fn: applied to conditions before the network sees them (LDM's text encoder, say).

    Returns:
        `model_fn(x, t, condition=None, uncond_condition=None) -> eps`. Differentiable in `x` and `t`
        whenever gradients are enabled, classifier guidance included; works under `no_grad` too.
        An `uncond_condition` of fewer rows (1, say) is repeated to the batch.

    Raises:
        ValueError: unknown `model_type` or `guidance_type`; guidance without what it needs.
    """
    if model_type not in get_args(ModelType):
        raise ValueError(f"model_type is {model_type!r}; accepted: {', '.join(get_args(ModelType))}")
    if guidance_type not in get_args(GuidanceType):
        raise ValueError(f"guidance_type is {guidance_type!r}; accepted: {', '.join(get_args(GuidanceType))}")
    if guidance_type == "classifier" and classifier_fn is None:
        raise ValueError("guidance_type 'classifier' needs a classifier_fn")
    model_kwargs = dict(model_kwargs or {})
    classifier_kwargs = dict(classifier_kwargs or {})

    def process(condition: Any) -> Tensor:
        return cond_process_fn(condition) if cond_process_fn is not None else condition

    def input_time(x: Tensor, t: Tensor) -> Tensor:
        # Half precision would round time 999 to a multiple of 0.5 or worse.
        return noise_schedule.model_input_time(t).to(torch.promote_types(x.dtype, torch.float32))

    def predict_eps(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        args = (x, input_time(x, t)) if condition is None else (x, input_time(x, t), condition)
        output = model(*args, **model_kwargs)
        if model_type == "noise":
            return output
        alpha_t = expand_like(noise_schedule.marginal_alpha(t), x)
        sigma_t = expand_like(noise_schedule.marginal_std(t), x)
        if model_type == "x_start":
            return (x - alpha_t * output) / sigma_t
        if model_type == "v":
            return alpha_t * output + sigma_t * x
        return -sigma_t * output

    def classifier_guided(x: Tensor, t: Tensor, condition: Tensor, uncond_condition: Tensor | None) -> Tensor:
        assert classifier_fn is not None

        def log_prob(x: Tensor) -> Tensor:
            return classifier_fn(x, input_time(x, t), condition, **classifier_kwargs).sum()

        eps = predict_eps(x, t, uncond_condition)
        if guidance_scale == 0:
            return eps
        sigma_t = expand_like(noise_schedule.marginal_std(t), x)
        # torch.func.grad works inside no_grad and nests under autograd and forward mode alike.
        gradient: Tensor = torch.func.grad(log_prob)(x)
        return eps - guidance_scale * sigma_t * gradient

    def classifier_free(x: Tensor, t: Tensor, condition: Tensor, uncond_condition: Tensor | None) -> Tensor:
        if guidance_scale == 1:
            return predict_eps(x, t, condition)
        if uncond_condition is None:
            raise ValueError(f"classifier-free guidance at scale {guidance_scale} needs an uncond_condition")
        both = torch.cat([uncond_condition, condition])
        eps_uncond, eps_cond = predict_eps(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return eps_uncond + guidance_scale * (eps_cond - eps_uncond)

    def model_fn(
        x: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        uncond_condition: Tensor | None = None,
    ) -> Tensor:
        t = t.expand(len(x))
        if guidance_type == "uncond":
            return predict_eps(x, t, None)
        if condition is None:
            raise ValueError(f"guidance_type {guidance_type!r} needs a condition")
        condition = repeat_to_batch(process(condition), len(x))
        if uncond_condition is not None:
            uncond_condition = repeat_to_batch(process(uncond_condition), len(x))
        if guidance_type == "classifier":
            return classifier_guided(x, t, condition, uncond_condition)
        return classifier_free(x, t, condition, uncond_condition)

    return model_fn
