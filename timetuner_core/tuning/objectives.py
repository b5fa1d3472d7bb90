"""The objectives of single steps: the ratio r_i of step i is tuned for the least mean square of a residual.

Step i goes from x_t at `t` to `x_s(r_i)` at `s` by any one-step sampler, its network conditioned on `t * r_i`. Samples
of several steps share a network batch: `t`, `s` and `r_i` are `(B,)`, one per sample.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from timetuner_core.samplers import sample
from timetuner_core.tuning.draws import Batch

Residual = Callable[[Tensor], Tensor]


def next_eps_residual(batch: Batch) -> Residual:
    """The published objective (TimeTuner, Xia et al., CVPR 2024): eps after the step is what it was before.

    `r_i = argmin E || eps(x_t, t) - eps(x_s(r_i), s) ||^2`
    """
    x_t, t, s, eps = batch.x_t, batch.t, batch.s, batch.eps
    with torch.no_grad():
        eps_t = eps(x_t, t)

    def residual(r_i: Tensor) -> Tensor:
        x_s = batch.step(r_i)
        return eps_t - eps(x_s, s)

    return residual


def teacher_step_residual(batch: Batch, substeps: int) -> Residual:
    """The step ends where the same sampler gets from the same x_t in `substeps` even steps, untuned: at `x_s*`.

    `r_i = argmin E || x_s* - x_s(r_i) ||^2`
    """
    x_t, t, s = batch.x_t, batch.t, batch.s
    fractions = torch.arange(substeps + 1, dtype=torch.float64, device=x_t.device) / substeps
    times = torch.lerp(t[None], s[None], fractions[:, None])  # (substeps + 1, B)
    with torch.no_grad():
        x_s_star = sample(batch.problem.step_fn, x_t, times, torch.ones(substeps), **batch.step_kwargs)

    def residual(r_i: Tensor) -> Tensor:
        return x_s_star - batch.step(r_i)

    return residual
