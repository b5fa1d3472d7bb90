"""Noise schedules: alpha_t, sigma_t and lambda_t as functions of continuous time."""

import copy
import math
from abc import ABC, abstractmethod
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

ScheduleKind = Literal["discrete", "linear", "cosine"]

CONTINUOUS_T_MIN = 1e-3
MAX_FINAL_NOISE_TO_SIGNAL = 0.05  # images in -1..1 have 256 levels, 0.008 apart


class NoiseSchedule(ABC):
    """A forward process `x_t = alpha_t * x0 + sigma_t * eps` in continuous time, `t` in `(0, T]`.

    All methods are elementwise over tensors `t` of any shape, differentiable in `t`, and return `t`'s dtype.

    Attributes:
        T: The latest time, all noise. prior_std: The standard deviation of x_T.
        default_grid: The grid of `grids.make_timesteps` that suits its time.
    """

    T: float = 1.0
    prior_std: float = 1.0
    _t_start: float | None = None
    default_grid: Literal["uniform", "edm"] = "uniform"

    @property
    @abstractmethod
    def t_min(self) -> float:
        """The lowest time at which grids call the network."""

    @property
    def t_end(self) -> float:
        """The end of grids: `t_min`, or 0 if so much noise is left at `t_min` that one can see it."""
        return self.t_min

    @property
    def t_start(self) -> float:
        """The start of grids: `T`, unless `starting_at` gave a lower one."""
        return self.T if self._t_start is None else self._t_start

    def starting_at(self, t_start: float) -> Self:
        """The same process, whose grids start at `t_start`; see `sampling.starting_time` for how it is found.

        Raises:
            ValueError: `t_start` is outside `(t_min, T]`.
        """
        if not (self.t_min < t_start <= self.T or t_start == self.T):
            raise ValueError(f"t_start is {t_start}; accepted: above {self.t_min}, up to {self.T}")
        lowered = copy.copy(self)
        lowered._t_start = t_start
        return lowered

    @property
    def max_num_steps(self) -> int | None:
        """The most steps a grid may have: `N` for a network trained on `N` steps, else None, no limit."""
        return None

    @abstractmethod
    def marginal_log_mean_coeff(self, t: Tensor) -> Tensor:
        """`log alpha_t`."""

    @abstractmethod
    def marginal_std(self, t: Tensor) -> Tensor:
        """`sigma_t`."""

    @abstractmethod
    def inverse_lambda(self, lambda_t: Tensor) -> Tensor:
        """The `t` at which the schedule has the half log-SNR `lambda_t`."""

    @abstractmethod
    def model_input_time(self, t: Tensor) -> Tensor:
        """The network's input for time `t`."""

    @abstractmethod
    def time_of_model_input(self, t_input: Tensor) -> Tensor:
        """The inverse of `model_input_time`."""

    def marginal_alpha(self, t: Tensor) -> Tensor:
        """`alpha_t`."""
        return torch.exp(self.marginal_log_mean_coeff(t))

    def starting_std(self, t: Tensor) -> float:
        """The standard deviation of the noise to start from at `t`: `prior_std` at `T`."""
        if float(t) == self.T:
            return self.prior_std
        T = torch.tensor(self.T, dtype=t.dtype)
        return self.prior_std * float(self.marginal_std(t) / self.marginal_std(T))

    @property
    def can_start_later(self) -> bool:
        """Whether sampling may start below `T` in diffusers' pipelines, which then scale their noise down."""
        return True

    @property
    def starts_without_signal(self) -> bool:
        """Whether alpha at `T` is (nearly) 0, as in flow matching and after zero-SNR rescaling."""
        return float(self.marginal_alpha(torch.tensor(self.T, dtype=torch.float64))) < 1e-4

    def marginal_lambda(self, t: Tensor) -> Tensor:
        """Half the log signal-to-noise ratio, `lambda_t = log(alpha_t / sigma_t)`."""
        return self.marginal_log_mean_coeff(t) - torch.log(self.marginal_std(t))


class NoiseScheduleVP(NoiseSchedule):
    """A variance-preserving forward process `x_t = alpha_t * x0 + sigma_t * eps`, `alpha_t**2 + sigma_t**2 = 1`.

    Time is continuous, `t` in `(0, T]`; `t = 0` is clean data (`alpha = 1`, `sigma = 0`).

    - `'discrete'`: a network trained on `N` steps. Training step `n = 1..N` sits at `t_n = n / N`;
      between them `log alpha_t` is piecewise linear, also from the exact `log alpha_0 = 0` to `t_1`,
      and beyond `T = 1` the last piece goes on. Give `betas` or `alphas_cumprod`, each of shape `(N,)`.
    - `'linear'`: the VP SDE of Score-SDE (Song et al. 2021, eq. 33),
      `log alpha_t = -t**2 (beta_1 - beta_0) / 4 - t beta_0 / 2`.
    - `'cosine'`: Nichol & Dhariwal 2021, eq. 17, cut at `T = 0.9946` as DPM-Solver (Lu et al. 2022) does.

    The table is kept in float64, whatever the dtype of `t`.

    Raises:
        ValueError: unknown `schedule`; for `'discrete'`, betas outside `(0, 1)` or alphas_cumprod that
            are not strictly decreasing inside `(0, 1)`.
    """

    def __init__(
        self,
        schedule: ScheduleKind = "discrete",
        betas: Tensor | None = None,
        alphas_cumprod: Tensor | None = None,
        continuous_beta_0: float = 0.1,
        continuous_beta_1: float = 20.0,
    ) -> None:
        if schedule not in ("discrete", "linear", "cosine"):
            raise ValueError(f"schedule is {schedule!r}; accepted: 'discrete', 'linear', 'cosine'")
        self.schedule = schedule
        self.T = 0.9946 if schedule == "cosine" else 1.0
        self.beta_0 = continuous_beta_0
        self.beta_1 = continuous_beta_1
        self.total_N = 1000
        if schedule == "discrete":
            table = _log_alpha_table(betas, alphas_cumprod)
            self.total_N = len(table) - 1
            self._tables = {table.device: table}

    @property
    def t_min(self) -> float:
        """The first training step, or 1e-3 in continuous time."""
        return 1.0 / self.total_N if self.schedule == "discrete" else CONTINUOUS_T_MIN

    @property
    def max_num_steps(self) -> int | None:
        return self.total_N if self.schedule == "discrete" else None

    def marginal_log_mean_coeff(self, t: Tensor) -> Tensor:
        if self.schedule == "linear":
            return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        if self.schedule == "cosine":
            # log(cos(a + b) / cos(a)) for a = the angle at t = 0, without cancellation near t = 0.
            b = t * (math.pi / 2 / (1 + _COSINE_S))
            return torch.log1p(-2 * torch.sin(b / 2) ** 2 - math.tan(_COSINE_ANGLE_0) * torch.sin(b))
        table = self._table(t.device)
        position = t.to(table.dtype) * self.total_N
        left = position.detach().floor().clamp(0, self.total_N - 1).long()
        value = table[left] + (position - left) * (table[left + 1] - table[left])
        return value.to(t.dtype)

    def marginal_std(self, t: Tensor) -> Tensor:
        """`sigma_t = sqrt(1 - alpha_t**2)`, without cancellation near `t = 0`."""
        return torch.sqrt(-torch.expm1(2.0 * self.marginal_log_mean_coeff(t)))

    def inverse_lambda(self, lambda_t: Tensor) -> Tensor:
        softplus = functional.softplus(-2.0 * lambda_t)  # = -2 log alpha_t
        if self.schedule == "linear":
            slope = self.beta_1 - self.beta_0
            root = torch.sqrt(self.beta_0**2 + 2.0 * slope * softplus)
            return 2.0 * softplus / (root + self.beta_0)
        log_alpha = -0.5 * softplus
        if self.schedule == "cosine":
            angle = torch.arccos(torch.exp(log_alpha) * math.cos(_COSINE_ANGLE_0))
            return (angle - _COSINE_ANGLE_0) * (2.0 * (1.0 + _COSINE_S) / math.pi)
        table = self._table(lambda_t.device)
        log_alpha = log_alpha.to(table.dtype)
        # The table falls, searchsorted wants it rising: the number of entries above the value.
        above = torch.searchsorted(-table, -log_alpha.detach().contiguous())
        left = (above - 1).clamp(0, self.total_N - 1)
        fraction = (log_alpha - table[left]) / (table[left + 1] - table[left])
        return ((left + fraction) / self.total_N).to(lambda_t.dtype)

    def model_input_time(self, t: Tensor) -> Tensor:
        """The network's input for time `t`: `(t - 1/N) * N` in `0..N-1` if discrete, else `t`."""
        return (t - 1.0 / self.total_N) * self.total_N if self.schedule == "discrete" else t

    def time_of_model_input(self, t_input: Tensor) -> Tensor:
        return (t_input + 1.0) / self.total_N if self.schedule == "discrete" else t_input

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = next(iter(self._tables.values())).to(device)
        return self._tables[device]


class NoiseScheduleFlow(NoiseSchedule):
    """Flow matching (Lipman et al. 2023; Liu et al. 2023): `alpha = 1 - sigma`, `sigma_t = t` if `shift` is 1.

    `sigma_t = shift t / (1 + (shift - 1) t)` (Esser et al. 2024, eq. 23) spends more of a uniform grid at high
    noise. The network is fed `num_train_timesteps * sigma_t`; one training step means that it is fed sigma itself and
    was trained on all of them. At `t = 1` alpha would be 0; it is kept at 1e-6, so that lambda_t is finite.

    Raises:
        ValueError: `shift` or `num_train_timesteps` not above 0.
    """

    def __init__(self, shift: float = 1.0, num_train_timesteps: int = 1000) -> None:
        if not shift > 0 or not num_train_timesteps > 0:
            raise ValueError(f"shift is {shift}, num_train_timesteps is {num_train_timesteps}; accepted: above 0")
        self.shift = shift
        self.num_train_timesteps = num_train_timesteps

    @property
    def t_min(self) -> float:
        return 1.0 / self.num_train_timesteps if self.num_train_timesteps > 1 else CONTINUOUS_T_MIN

    @property
    def t_end(self) -> float:
        return _end_of_grids(self)

    @property
    def can_start_later(self) -> bool:
        """False: diffusers' pipelines of flow models start from noise of standard deviation 1."""
        return False

    def marginal_log_mean_coeff(self, t: Tensor) -> Tensor:
        alpha_t = (1.0 - t) / (1.0 + (self.shift - 1.0) * t)
        return torch.log(alpha_t.clamp(min=1e-6))

    def marginal_std(self, t: Tensor) -> Tensor:
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def inverse_lambda(self, lambda_t: Tensor) -> Tensor:
        return self._time_of_sigma(torch.sigmoid(-lambda_t))

    def model_input_time(self, t: Tensor) -> Tensor:
        return self.num_train_timesteps * self.marginal_std(t)

    def time_of_model_input(self, t_input: Tensor) -> Tensor:
        return self._time_of_sigma(t_input / self.num_train_timesteps)

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma / (self.shift - (self.shift - 1.0) * sigma)


class NoiseScheduleEDM(NoiseSchedule):
    """Variance exploding, in the terms of EDM (Karras et al. 2022): `alpha_t = 1`, `sigma_t = t`, `T = sigma_max`.

    The network is fed `log(sigma) / 4`, EDM's c_noise.

    Raises:
        ValueError: not `0 < sigma_min < sigma_max`.
    """

    default_grid = "edm"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min is {sigma_min}, sigma_max is {sigma_max}; accepted: 0 < sigma_min < sigma_max")
        self.sigma_min = sigma_min
        self.T = self.prior_std = sigma_max

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_end(self) -> float:
        return _end_of_grids(self)

    def marginal_log_mean_coeff(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def marginal_std(self, t: Tensor) -> Tensor:
        return t

    def inverse_lambda(self, lambda_t: Tensor) -> Tensor:
        return torch.exp(-lambda_t)

    def model_input_time(self, t: Tensor) -> Tensor:
        return torch.log(t) / 4

    def time_of_model_input(self, t_input: Tensor) -> Tensor:
        return torch.exp(4 * t_input)


def _end_of_grids(schedule: NoiseSchedule) -> float:
    lambda_t = schedule.marginal_lambda(torch.tensor(schedule.t_min, dtype=torch.float64))
    return 0.0 if math.exp(-float(lambda_t)) > MAX_FINAL_NOISE_TO_SIGNAL else schedule.t_min


_COSINE_S = 0.008
_COSINE_ANGLE_0 = _COSINE_S / (1.0 + _COSINE_S) * math.pi / 2.0


def _log_alpha_table(betas: Tensor | None, alphas_cumprod: Tensor | None) -> Tensor:
    """`log alpha` at `t = 0, 1/N, ..., 1`: float64, shape `(N + 1,)`."""
    if (betas is None) == (alphas_cumprod is None):
        raise ValueError("a discrete schedule takes one of betas and alphas_cumprod")
    if betas is not None:
        betas = torch.as_tensor(betas).double()
        if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must have shape (N,) with every value inside (0, 1)")
        log_alpha = 0.5 * torch.log1p(-betas).cumsum(0)
    else:
        acp = torch.as_tensor(alphas_cumprod).double()
        falling = acp.ndim == 1 and len(acp) > 0 and bool((acp[1:] < acp[:-1]).all())
        if not falling or not bool(((acp > 0) & (acp < 1)).all()):
            raise ValueError("alphas_cumprod must have shape (N,) and fall strictly inside (0, 1)")
        log_alpha = 0.5 * torch.log(acp)
    return torch.cat([log_alpha.new_zeros(1), log_alpha])
