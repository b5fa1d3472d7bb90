"""Gaussian mixtures: models whose exact eps, class posterior and samples are known in closed form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from timetuner_core.guided_model import expand_like
from timetuner_core.noise_schedule import NoiseSchedule, NoiseScheduleVP


@dataclass(frozen=True)
class GaussianMixture:
    """`p(x0) = sum_k weights_k N(means_k, stds_k^2 I)`, component `k` belonging to class `classes_k`.

    Called like a network, `mixture(x, t_input, condition)`, it gives the exact
    `eps = -sigma_t grad log p_t(x_t | c)`, where `p_t` is the mixture of
    `N(alpha_t mu_k, (alpha_t^2 std_k^2 + sigma_t^2) I)`. Labels equal to `null_class_label`, and no
    condition at all, mean the whole mixture. Shapes: `means` `(K, *sample_shape)`, the rest `(K,)`.
    """

    noise_schedule: NoiseSchedule
    means: Tensor
    stds: Tensor
    weights: Tensor
    classes: Tensor

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.means.shape[1:])

    @property
    def num_classes(self) -> int:
        return int(self.classes.max()) + 1

    @property
    def null_class_label(self) -> int:
        return self.num_classes

    def to(self, device: torch.device | str) -> "GaussianMixture":
        tensors = (self.means, self.stds, self.weights, self.classes)
        return GaussianMixture(self.noise_schedule, *(tensor.to(device) for tensor in tensors))

    def __call__(self, x: Tensor, t_input: Tensor, condition: Tensor | None = None) -> Tensor:
        """The exact eps at `x` `(B, *sample_shape)`, `t_input` `(B,)`, for labels `(B,)` or None."""
        t = self.noise_schedule.time_of_model_input(t_input)
        alpha_t = self.noise_schedule.marginal_alpha(t)
        sigma_t = self.noise_schedule.marginal_std(t)
        log_joint = self._log_joint(x, t, condition)
        posterior = torch.softmax(log_joint, dim=1)  # (B, K)
        weight = posterior / self._variances(t)
        mean = (weight @ self.means.to(x.dtype).flatten(1)).reshape(x.shape)
        return expand_like(sigma_t, x) * (expand_like(weight.sum(dim=1), x) * x - expand_like(alpha_t, x) * mean)

    def log_class_posterior(self, x: Tensor, t_input: Tensor, condition: Tensor) -> Tensor:
        """log p(c | x_t) of each sample's own label, `(B,)`: a classifier for classifier guidance."""
        t = self.noise_schedule.time_of_model_input(t_input)
        return torch.logsumexp(self._log_joint(x, t, condition), 1) - torch.logsumexp(self._log_joint(x, t, None), 1)

    def log_density(self, x0: Tensor, condition: Tensor | None = None) -> Tensor:
        """log p(x0), or log p(x0 | c) for labels `(B,)`, at clean samples `(B, *sample_shape)`; `(B,)`."""
        variances = (self.stds.to(x0.dtype) ** 2).expand(len(x0), -1)
        log_joint = self._log_normals(x0, torch.ones_like(variances[:, :1]), variances)
        log_weights = self.weights.to(x0.dtype).log().expand(len(x0), -1)
        log_prior = self._of_class(log_weights, condition)
        constant = 0.5 * math.prod(self.sample_shape) * math.log(2 * math.pi)
        return torch.logsumexp(log_joint + log_prior, 1) - torch.logsumexp(log_prior, 1) - constant

    def sample(self, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Exact samples of x0 `(num_samples, *sample_shape)` and their class labels `(num_samples,)`."""
        k = torch.multinomial(self.weights.cpu(), num_samples, replacement=True, generator=generator)
        noise = torch.randn((num_samples, *self.sample_shape), generator=generator)
        means, stds = self.means.cpu()[k], self.stds.cpu()[k]
        return means + expand_like(stds, noise) * noise, self.classes.cpu()[k]

    def _variances(self, t: Tensor) -> Tensor:
        alpha_t, sigma_t = self.noise_schedule.marginal_alpha(t), self.noise_schedule.marginal_std(t)
        return alpha_t[:, None] ** 2 * self.stds.to(t.dtype) ** 2 + sigma_t[:, None] ** 2

    def _log_joint(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """log weights_k N(x_t; ...) up to a constant shared by all components, `(B, K)`."""
        log_normals = self._log_normals(x, self.noise_schedule.marginal_alpha(t)[:, None], self._variances(t))
        return self._of_class(self.weights.to(x.dtype).log() + log_normals, condition)

    def _log_normals(self, x: Tensor, alpha: Tensor, variances: Tensor) -> Tensor:
        """log N(x; alpha means_k, variances_k) without its constant, `(B, K)`, for `alpha` `(B, 1)`."""
        centres = alpha[..., None] * self.means.to(x.dtype).flatten(1)
        distances = (x.flatten(1)[:, None] - centres).square().sum(dim=2)
        return -0.5 * (distances / variances + math.prod(self.sample_shape) * variances.log())

    def _of_class(self, log_joint: Tensor, condition: Tensor | None) -> Tensor:
        """`(B, K)` with -inf for the components of other classes than asked for."""
        if condition is None:
            return log_joint
        other_class = (self.classes != condition[:, None]) & (condition[:, None] != self.null_class_label)
        return log_joint.masked_fill(other_class, -torch.inf)


def ring_mixture() -> GaussianMixture:
    """2-d: eight equal Gaussians on a ring, in four classes of two neighbours each."""
    angles = torch.arange(8) * (2 * math.pi / 8)
    means = 0.8 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return GaussianMixture(
        NoiseScheduleVP("linear"),
        means=means,
        stds=torch.full((8,), 0.1),
        weights=torch.full((8,), 1 / 8),
        classes=torch.arange(8) // 2,
    )


def gratings_mixture() -> GaussianMixture:
    """Image-shaped `(1, 8, 8)`: four classes of cosine gratings (four directions), two frequencies each."""
    position = (torch.arange(8) - 3.5) / 8
    y, x = torch.meshgrid(position, position, indexing="ij")
    means = [
        0.7 * torch.cos(2 * math.pi * frequency * (x * math.cos(angle) + y * math.sin(angle)))
        for angle in (0, math.pi / 4, math.pi / 2, 3 * math.pi / 4)
        for frequency in (1, 2)
    ]
    return GaussianMixture(
        NoiseScheduleVP("linear"),
        means=torch.stack(means)[:, None],
        stds=torch.tensor([0.2, 0.1] * 4),
        weights=torch.full((8,), 1 / 8),
        classes=torch.arange(8) // 2,
    )
