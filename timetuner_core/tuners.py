# ruff: noqa: RUF009 (`option` makes a dataclass field, as `field` does)
"""Every tuner by name: its options, what it costs, what it refuses, and how it is run. Each ends in a grid and ratios.

A tuner is one class here. Its fields are the options that requests give: pydantic reads their types, bounds and
descriptions, and the API's document shows them. A service that only reads and checks requests needs no PyTorch, so
`run` imports the computation when it is called.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

from timetuner_core.catalog import NAMED_GRIDS, SamplerFacts
from timetuner_core.tuning.solver_columns import COMPARED_PER_SAMPLE, rows_per_sample, samples_held

if TYPE_CHECKING:
    from torch import Tensor

    from timetuner_core.tuning.problem import TuningProblem, TuningState

# A teacher is checked on as many samples, in as many runs: as it is, with half its steps, from another starting time,
# and on the grid that diffusers takes by default.
TEACHER_CHECK_SAMPLES = 32
TEACHER_CHECK_RUNS = 4
# The KL divergence to a mixture is measured on at most so many samples: each needs a Jacobian.
MAX_KL_SAMPLES = 128
# The grids to begin with are compared on as many noises.
MAX_START_SAMPLES = 64
# A schedule is compared with the untuned sampler at so many times its steps, on so many noises.
WORTH_STEP_FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0)
MAX_WORTH_SAMPLES = 128
# A schedule for an interval of guidance scales is evaluated at both ends and in the middle.
EVALUATED_SCALES = 3

# Tuning a pipeline begins with the best of the uniform grid, log_snr, and the grid of the pipeline's own scheduler.
MAX_STARTS_OF_PIPELINES = 3

TuneType = Literal["sequential", "parallel"]
Optimizer = Literal["gauss_newton", "adam"]
Parameters = Literal["t_ratios", "timesteps", "both"]
Population = Literal["data", "noise", "none"]


@dataclass(frozen=True)
class TunedSetting:
    """The setting that a tuner's options are checked, and its costs counted, against.

    Attributes:
        calls_per_step: how often the sampler calls the network per step. history_length: the sampler's.
        has_data: whether data came with the model.
        timesteps_given: whether the grid to start from is explicit or named, other than by default.
    """

    num_steps: int
    calls_per_step: int = 1
    history_length: int = 0
    has_data: bool = False
    timesteps_given: bool = False

    @property
    def num_calls(self) -> int:
        """The network calls of a sample, at most: a step to time 0 takes one."""
        return self.num_steps * self.calls_per_step


class OptionError(ValueError):
    """An option that does not fit the setting. name: the option; accepted: what would fit."""

    def __init__(self, tuner: "Tuner", name: str, accepted: str) -> None:
        self.name, self.value, self.accepted = name, getattr(tuner, name), accepted
        super().__init__(f"{name} is {self.value!r}; accepted: {accepted}")


def in_whole_batches(num_samples: int, batch_size: int) -> int:
    """Samples in as many whole batches as hold `num_samples`."""
    return math.ceil(num_samples / batch_size) * batch_size


def option(default: Any, description: str | None = None, **bounds: float) -> Any:
    """An option of a tuner: `ge`, `gt` and `le` are its bounds."""
    return field(default=default, metadata=bounds | ({"description": description} if description else {}))


def batch_size_option(description: str | None = "Samples per iteration (and per step, if per step).") -> Any:
    return option(16, description, ge=1, le=1024)


def population_size_option(default: int, description: str) -> Any:
    return option(default, description, ge=1, le=65_536)


def teacher_option(description: str | None = None) -> Any:
    return option(50, description, ge=1, le=1000)


def start_option() -> Any:
    return option(
        None,
        "The grid to begin with: `timesteps`, or the named one whose samples are nearest; null: the latter "
        "unless `timesteps` are given.",
    )


def num_candidates_option() -> Any:
    return option(None, "Times to choose from; null: enough.", ge=2, le=4096)


@dataclass(kw_only=True)
class Tuner:
    """A tuner with its options.

    Attributes:
        label: a line for people to choose it by.
        population: what `TuningProblem.population` must hold: data x0, initial noise x_T, or anything.
        takes_guidance_interval: whether it tunes one schedule for an interval of guidance scales.
        matches_results: whether it compares end results, which a sampler that adds noise makes different each time.
        has_long_iterations: whether one may take minutes, so that its network calls tell how far it is.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (pydantic's own name)

    label: ClassVar[str]
    population: ClassVar[Population]
    takes_guidance_interval: ClassVar[bool] = False
    matches_results: ClassVar[bool] = False
    has_long_iterations: ClassVar[bool] = False
    if TYPE_CHECKING:
        # Each tuner declares its own name, in its own place among the fields: stored requests keep their order.
        objective: str

    def check(self, setting: TunedSetting) -> None:
        """Raise OptionError for an option that does not fit the setting."""

    def teacher_steps(self, setting: TunedSetting) -> int | None:
        """The steps of the tuner's own teacher, if it has one to follow or to make its data."""
        return None

    def samples_at_once(self, setting: TunedSetting) -> int:
        """Samples that are in memory together: a network batch, or a grid search's candidates."""
        return 0

    def network_samples(self, setting: TunedSetting) -> int:
        """Samples put through the network at most, while tuning; guidance, teachers and starts are not counted."""
        return 0

    @property
    def max_starts(self) -> int:
        """Grids at most that the population is sampled on, to begin with the best of them."""
        return 0

    def tuned_steps(self, num_steps: int) -> list[int]:
        """The steps that the tuner changes."""
        return list(range(num_steps))

    @property
    def is_spread(self) -> bool:
        """Whether each step is a task of its own."""
        return False

    @property
    def iterations(self) -> int:
        """The iterations after which a step is done at the latest. A search for a grid has one."""
        return 1

    def run(
        self, problem: "TuningProblem", state: "TuningState", steps: Sequence[int] | None = None
    ) -> "Iterator[TuningState]":
        """Tune from wherever `state` is, which is updated in place and given after each iteration.

        A state that is done is given no more.

        Args:
            steps: only these, for a tuner whose steps do not depend on each other; None is all.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class TeacherMatchingTuner(Tuner):
    """A tuner that brings the sampler's result to a many-step teacher's, from the same initial noise. Needs no data."""

    population = "noise"
    takes_guidance_interval = True
    matches_results = True
    if TYPE_CHECKING:
        # Each tuner declares its options itself, in their own places among the fields, and with their own defaults.
        start: Literal["given", "best"] | None
        total_iters: int
        teacher_num_steps: int

    def check(self, setting: TunedSetting) -> None:
        if self.start == "best" and setting.timesteps_given:
            raise OptionError(self, "start", "'given' where timesteps are given")

    def teacher_steps(self, setting: TunedSetting) -> int | None:
        return self.teacher_num_steps

    @property
    def max_starts(self) -> int:
        return len(NAMED_GRIDS) if self.start == "best" else 0

    @property
    def iterations(self) -> int:
        return self.total_iters

    def teacher_timesteps(self, problem: "TuningProblem") -> "Tensor":
        """The teacher's grid, `(teacher_num_steps + 1,)`."""
        from timetuner_core.grids import teacher_timesteps

        return teacher_timesteps(problem.noise_schedule, self.teacher_num_steps)

    def starts(self, noise_schedule: Any, num_steps: int) -> "list[Tensor]":
        """The grids to begin with the best of: those of all names, or none if the problem's own is to be kept."""
        from timetuner_core.grids import start_grids

        return start_grids(noise_schedule, num_steps) if self.start == "best" else []

    def free_starts(self, noise_schedule: Any, num_steps: int) -> "list[Tensor]":
        """The grids with a free first step, of which the best one is tried besides the best of the `starts`."""
        return []


@dataclass(kw_only=True)
class EndToEndTuner(TeacherMatchingTuner):
    """All steps together, so that the sampler's result matches a many-step teacher's. Needs no data."""

    label = "end to end: grid and ratios together, against a teacher"

    objective: Literal["end_to_end"] = "end_to_end"
    parameters: Parameters = option("both", "What is learned: one ratio per step, the grid, or both.")
    start: Literal["given", "best"] | None = start_option()
    batch_size: int = batch_size_option()
    lr: float = option(1e-2, "Adam's learning rate, falling to 0.", gt=0, le=1)
    total_iters: int = option(100, ge=1, le=10_000)
    population_size: int = population_size_option(256, "Initial noises to tune on.")
    teacher_num_steps: int = teacher_option()
    relaxed_start: float = option(
        0.0,
        "LD3's relaxation c: a sample may start within c D / num_steps**2 of the teacher's x_T, in its standard "
        "deviation, where D is the number of values; its authors take 0.001.",
        ge=0,
        le=1,
    )

    def samples_at_once(self, setting: TunedSetting) -> int:
        """A network batch, and once more those of relaxed starts: both runs are held for one backward pass."""
        return (2 if self.relaxed_start else 1) * self.batch_size

    def network_samples(self, setting: TunedSetting) -> int:
        forward_and_recomputed = 2
        # A relaxed start is found by a run of its own, whose steps are recomputed twice.
        runs = forward_and_recomputed + (3 if self.relaxed_start else 0)
        steps = self.total_iters * setting.num_steps
        return runs * self.batch_size * steps * setting.calls_per_step

    def run(
        self,
        problem: "TuningProblem",
        state: "TuningState",
        steps: Sequence[int] | None = None,
        *,
        target: "Tensor | None" = None,
        recompute: bool = True,
    ) -> "Iterator[TuningState]":
        """See `tune_end_to_end` for `target` and `recompute`."""
        from timetuner_core.tuning.end_to_end import tune_end_to_end

        return tune_end_to_end(
            problem,
            state,
            self.teacher_timesteps(problem),
            self.parameters,
            lr=self.lr,
            total_iters=self.total_iters,
            starts=self.starts(problem.noise_schedule, problem.num_steps),
            target=target,
            recompute=recompute,
            relaxed_start=self.relaxed_start,
        )


@dataclass(kw_only=True)
class SolverTuner(TeacherMatchingTuner):
    """Grid, ratios and the solver's coefficients together, against a many-step teacher, from forward calls alone.

    Needs no data and no backward pass.
    """

    label = "solver: grid, ratios and coefficients, against a teacher, without a backward pass"
    has_long_iterations = True

    objective: Literal["solver"]
    start: Literal["given", "best"] | None = start_option()
    batch_size: int = batch_size_option(
        "Samples per iteration for the derivatives, and per network batch; candidates are compared on twice as many "
        "others."
    )
    total_iters: int = option(10, "At most; it ends after three without improvement.", ge=1, le=1000)
    population_size: int = population_size_option(128, "Initial noises to tune on.")
    teacher_num_steps: int = option(100, ge=1, le=1000)
    with_ratios: bool = option(True, "Whether ratios are learned; without them it is the solver of BNS and S4S.")

    def samples_at_once(self, setting: TunedSetting) -> int:
        """A network batch, or the runs of one sample's difference quotients: of large samples, each has its turn."""
        return max(self.batch_size, samples_held(setting.num_calls, calls_per_step=setting.calls_per_step))

    def network_samples(self, setting: TunedSetting) -> int:
        num_calls, per_step = setting.num_calls, setting.calls_per_step
        rows = rows_per_sample(num_calls, calls_per_step=per_step, with_ratios=self.with_ratios)
        tuning = self.total_iters * self.batch_size * rows
        if self.start != "best":
            return tuning
        # The first iteration is made from two grids. Both results are compared on the whole population.
        compared = 2 * in_whole_batches(self.population_size, self.batch_size) * num_calls
        return tuning + self.batch_size * rows + compared

    def run(
        self,
        problem: "TuningProblem",
        state: "TuningState",
        steps: Sequence[int] | None = None,
        *,
        target: "Tensor | None" = None,
    ) -> "Iterator[TuningState]":
        """See `tune_solver` for `target`."""
        from timetuner_core.tuning.solver import tune_solver

        return tune_solver(
            problem,
            state,
            self.teacher_timesteps(problem),
            total_iters=self.total_iters,
            with_ratios=self.with_ratios,
            starts=self.starts(problem.noise_schedule, problem.num_steps),
            free_starts=self.free_starts(problem.noise_schedule, problem.num_steps),
            target=target,
        )

    def free_starts(self, noise_schedule: Any, num_steps: int) -> "list[Tensor]":
        from timetuner_core.grids import start_grids_with_free_step

        return start_grids_with_free_step(noise_schedule, num_steps) if self.start == "best" else []

    @property
    def max_starts(self) -> int:
        return 2 * super().max_starts


@dataclass(kw_only=True)
class DataTuner(Tuner):
    """A tuner that draws from data."""

    population = "data"

    batch_size: int = batch_size_option()
    population_size: int = population_size_option(1024, "Data to draw from.")
    data: Literal["auto", "model", "generated"] = option(
        "auto", "The data that came with the model, or the teacher's samples; auto: the former if any."
    )
    teacher_num_steps: int = teacher_option("The steps of the teacher that generates data, if any.")

    def check(self, setting: TunedSetting) -> None:
        super().check(setting)
        if self.data == "model" and not setting.has_data:
            raise OptionError(self, "data", "'generated' or 'auto', as no data came with this model")

    def teacher_steps(self, setting: TunedSetting) -> int | None:
        return self.teacher_num_steps if self.data == "generated" or not setting.has_data else None


@dataclass(kw_only=True)
class PerStepTuner(DataTuner):
    """One ratio per step, each by an objective of its own."""

    tune_type: TuneType = option("parallel")
    spread: bool = option(True, "If parallel: one task per step, over all tuning workers; else one batch.")
    optimizer: Optimizer = option("gauss_newton", "The published optimiser is `adam`.")
    lr: float | None = option(None, "Adam's learning rate; for Adam only, 0.002 if null.", gt=0, le=1)
    total_iters: int | None = option(
        None, "Per step, at most; 500 with Adam and 64 with Gauss-Newton if null.", ge=1, le=10_000
    )
    tolerance: float | None = option(
        None, "Enough when a ratio's standard error is below; for Gauss-Newton only, 0.002 if null.", ge=1e-6, le=1
    )

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on the optimiser, so that a stored request keeps them."""
        is_adam = self.optimizer == "adam"
        self.total_iters = self.total_iters or (500 if is_adam else 64)
        if is_adam and self.lr is None:
            self.lr = 2e-3
        if not is_adam and self.tolerance is None:
            self.tolerance = 2e-3

    def check(self, setting: TunedSetting) -> None:
        super().check(setting)
        if self.tune_type == "parallel" and setting.history_length:
            raise OptionError(self, "tune_type", "for a multistep sampler 'sequential'")
        if self.optimizer == "adam" and self.tolerance is not None:
            raise OptionError(self, "tolerance", "null, or the optimizer 'gauss_newton'")
        if self.optimizer == "gauss_newton" and self.lr is not None:
            raise OptionError(self, "lr", "null, or the optimizer 'adam'")

    def samples_at_once(self, setting: TunedSetting) -> int:
        in_one_batch = self.tune_type == "parallel" and not self.spread
        return self.batch_size * (setting.num_steps if in_one_batch else 1)

    def network_samples(self, setting: TunedSetting) -> int:
        residuals_per_batch = 2 if self.optimizer == "gauss_newton" else 1
        calls = self.target_calls(setting) + residuals_per_batch * self.residual_calls(setting)
        steps = len(self.tuned_steps(setting.num_steps))
        tuning = steps * self.batch_size * self.iterations * calls
        if self.tune_type == "parallel":
            return tuning
        # The population goes on from each step to the next one that is tuned.
        population = in_whole_batches(self.population_size, self.batch_size)
        return tuning + max(0, steps - 1) * population * setting.calls_per_step

    def target_calls(self, setting: TunedSetting) -> int:
        """Network calls for what a step's residual is measured against."""
        raise NotImplementedError

    def residual_calls(self, setting: TunedSetting) -> int:
        """Network calls for one residual."""
        raise NotImplementedError

    @property
    def is_spread(self) -> bool:
        return self.tune_type == "parallel" and self.spread

    @property
    def iterations(self) -> int:
        return self.total_iters or 0

    def run(
        self, problem: "TuningProblem", state: "TuningState", steps: Sequence[int] | None = None
    ) -> "Iterator[TuningState]":
        from timetuner_core.tuning.per_step import tune_per_step

        given = {"lr": self.lr, "tolerance": self.tolerance, "substeps": getattr(self, "substeps", None)}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        options["steps"] = None if steps is None else list(steps)
        return tune_per_step(
            problem,
            state,
            self.objective,  # type: ignore[arg-type]  # one of the two below
            self.tune_type,
            self.optimizer,
            total_iters=self.iterations,
            **options,
        )


@dataclass(kw_only=True)
class NextEpsTuner(PerStepTuner):
    """The published objective: the network predicts after a step what it predicted before. The last keeps ratio 1."""

    label = "next_eps: the published procedure, step by step"

    objective: Literal["next_eps"]

    def target_calls(self, setting: TunedSetting) -> int:
        return 1

    def residual_calls(self, setting: TunedSetting) -> int:
        return setting.calls_per_step + 1  # The network is called once more where the step ends.

    def tuned_steps(self, num_steps: int) -> list[int]:
        return list(range(num_steps - 1))


@dataclass(kw_only=True)
class TeacherStepTuner(PerStepTuner):
    """Each step ends where the same sampler gets in many."""

    label = "teacher_step: each step against a teacher's"
    matches_results = True

    objective: Literal["teacher_step"]
    substeps: int = option(8, "The teacher's steps for one of the sampler's.", ge=2, le=64)

    def target_calls(self, setting: TunedSetting) -> int:
        return self.substeps * setting.calls_per_step

    def residual_calls(self, setting: TunedSetting) -> int:
        return setting.calls_per_step


@dataclass(kw_only=True)
class GridSearch(Tuner):
    """A search for a grid, over in one go: the ratios stay 1."""

    def search(self, problem: "TuningProblem") -> "Tensor":
        """The best grid, `(num_steps + 1,)`."""
        raise NotImplementedError

    def run(
        self, problem: "TuningProblem", state: "TuningState", steps: Sequence[int] | None = None
    ) -> "Iterator[TuningState]":
        problem.check_one_scale(self.objective)
        if not bool(state.done.all()):
            state.timesteps = self.search(problem).double().cpu()
            state.done[:] = True
            yield state


@dataclass(kw_only=True)
class CandidateSearch(GridSearch):
    """A search that chooses its grid's times from candidates.

    Attributes:
        least_candidates: how many there are if no number is given, or four per step if that is more.
    """

    least_candidates: ClassVar[int] = 61
    if TYPE_CHECKING:
        # Each search declares it in its own place among the fields.
        num_candidates: int | None

    def check(self, setting: TunedSetting) -> None:
        super().check(setting)
        if self.num_candidates is not None and self.num_candidates <= setting.num_steps:
            raise OptionError(self, "num_candidates", f"null, or more than num_steps, which is {setting.num_steps}")

    def candidates(self, num_steps: int) -> int:
        return self.num_candidates or max(self.least_candidates, 4 * num_steps)


@dataclass(kw_only=True)
class AysTuner(DataTuner, CandidateSearch):
    """Align Your Steps (Sabour, Fidler & Kreis 2024): the grid of least bound on the KL divergence."""

    label = "ays: Align Your Steps"
    least_candidates = 40

    objective: Literal["ays"]
    num_candidates: int | None = num_candidates_option()
    num_samples: int = option(64, "Data to estimate the bound on.", ge=1, le=4096)

    def samples_at_once(self, setting: TunedSetting) -> int:
        return self.batch_size * self.candidates(setting.num_steps)

    def network_samples(self, setting: TunedSetting) -> int:
        return self.candidates(setting.num_steps) * in_whole_batches(self.num_samples, self.batch_size)

    def search(self, problem: "TuningProblem") -> "Tensor":
        from timetuner_core.rivals.ays import ays_timesteps

        return ays_timesteps(problem, self.num_candidates, self.num_samples)


@dataclass(kw_only=True)
class AysListTuner(GridSearch):
    """The noise levels that AYS's authors published for three models, interpolated. Asks the network nothing."""

    label = "ays_list: the levels that AYS's authors published"
    population = "none"

    objective: Literal["ays_list"]
    levels_of: Literal["sd15", "sdxl", "svd"] = option("sd15", "The model that the levels were found for.")

    def search(self, problem: "TuningProblem") -> "Tensor":
        from timetuner_core.rivals.ays_list import ays_list_timesteps

        return ays_list_timesteps(problem, self.levels_of)


@dataclass(kw_only=True)
class GitsTuner(CandidateSearch):
    """GITS (Chen et al., ICML 2024): the grid that stays nearest a many-step trajectory, by dynamic programming."""

    label = "gits: nearest to a many-step trajectory"
    population = "noise"

    objective: Literal["gits"]
    batch_size: int = batch_size_option(None)
    population_size: int = population_size_option(256, "Initial noises whose trajectories are followed.")
    num_candidates: int | None = num_candidates_option()
    discount: float = option(1.15, "The factor of the cost, per step; above 1, late steps weigh more.", gt=0, le=10)

    def samples_at_once(self, setting: TunedSetting) -> int:
        return self.batch_size * self.candidates(setting.num_steps)

    def network_samples(self, setting: TunedSetting) -> int:
        steps = self.candidates(setting.num_steps) - 1
        return steps * in_whole_batches(self.population_size, self.batch_size)

    def search(self, problem: "TuningProblem") -> "Tensor":
        from timetuner_core.rivals.gits import gits_timesteps

        return gits_timesteps(problem, self.num_candidates, self.discount, self.population_size)


@dataclass(kw_only=True)
class OssTuner(CandidateSearch):
    """OSS (Pei et al. 2025): the grid by which the sampler's own path stays nearest to a many-step trajectory."""

    label = "oss: the sampler's own path nearest to a many-step trajectory"
    population = "noise"

    objective: Literal["oss"]
    batch_size: int = batch_size_option(None)
    population_size: int = population_size_option(32, "Initial noises whose paths are followed.")
    num_candidates: int | None = num_candidates_option()

    def samples_at_once(self, setting: TunedSetting) -> int:
        paths_and_trajectory = 3  # Those to the candidates before, those to the next ones, and the trajectory.
        return paths_and_trajectory * self.population_size * self.candidates(setting.num_steps)

    def network_samples(self, setting: TunedSetting) -> int:
        per_step_and_trajectory = setting.num_steps + 1
        samples = in_whole_batches(self.population_size, self.batch_size)
        return per_step_and_trajectory * (self.candidates(setting.num_steps) - 1) * samples

    def search(self, problem: "TuningProblem") -> "Tensor":
        from timetuner_core.rivals.oss import oss_timesteps

        return oss_timesteps(problem, self.num_candidates, self.population_size)


@dataclass(kw_only=True)
class DcSolverTuner(Tuner):
    """DC-Solver (Zhao et al., ECCV 2024): x0 is compensated in each step of a sampler, by a ratio of its own.

    The grid stays, and the solver that results is a table. Needs no data and no backward pass through the network.
    """

    label = "dc_solver: the sampler with compensated x0, against a teacher step by step"
    population = "noise"
    matches_results = True

    objective: Literal["dc_solver"]
    batch_size: int = batch_size_option(None)
    population_size: int = population_size_option(16, "Initial noises whose paths are followed.")
    teacher_num_steps: int = option(100, "Of the trajectory that each step is compared with.", ge=1, le=1000)

    def check(self, setting: TunedSetting) -> None:
        if setting.calls_per_step != 1:
            raise OptionError(self, "objective", "another, for a sampler that calls the network twice per step")

    def samples_at_once(self, setting: TunedSetting) -> int:
        trajectory_and_path = 2 * (setting.num_steps + 1)
        return trajectory_and_path * self.population_size

    def network_samples(self, setting: TunedSetting) -> int:
        teacher_and_path = self.teacher_num_steps + 2 * setting.num_steps  # The teacher's steps divide the sampler's.
        return teacher_and_path * in_whole_batches(self.population_size, self.batch_size)

    def run(
        self, problem: "TuningProblem", state: "TuningState", steps: Sequence[int] | None = None
    ) -> "Iterator[TuningState]":
        from timetuner_core.rivals.dc_solver import dc_solver_table

        if not bool(state.done.all()):
            state.solver_table = dc_solver_table(problem, self.teacher_num_steps, self.population_size)
            state.done[:] = True
            yield state


@dataclass(kw_only=True)
class DmnTuner(GridSearch):
    """DMN (Xue et al., CVPR 2024): the grid of least bound on the result's error. Asks the network nothing."""

    label = "dmn: bound on the result's error"
    population = "none"

    objective: Literal["dmn"]
    power: float = option(2.0, "The network's error is taken as sigma ** power / alpha.", ge=0, le=10)

    def search(self, problem: "TuningProblem") -> "Tensor":
        from timetuner_core.rivals.dmn import dmn_timesteps

        return dmn_timesteps(problem, self.power)


@dataclass(kw_only=True)
class GridTuner(GridSearch):
    """Nothing is tuned: `timesteps` is evaluated against the default grid."""

    label = "grid: nothing is tuned"
    population = "none"

    objective: Literal["grid"]

    def search(self, problem: "TuningProblem") -> "Tensor":
        return problem.timesteps


@dataclass(kw_only=True)
class PipelineTuner(Tuner):
    """Grid, ratios and the solver's coefficients of a whole pipeline, against its own samples of many steps.

    `timetuner_core.pipelines.tuning.tune_pipeline` runs it.
    """

    label = "pipeline: a whole pipeline, against its own samples of many steps"
    population = "none"
    takes_guidance_interval = True
    matches_results = True
    has_long_iterations = True

    objective: Literal["pipeline"]
    total_iters: int = option(4, "At most; it ends after three without improvement.", ge=1, le=1000)
    num_samples: int = option(
        8, "Images of the Jacobian in each iteration; candidates are compared on twice as many others.", ge=1, le=1024
    )
    max_batch: int = option(16, "Rows of one call of the network. A guided image mostly has two.", ge=1, le=1024)

    def check(self, setting: TunedSetting) -> None:
        raise OptionError(self, "objective", "another, for a model that is a network and no pipeline")

    @property
    def iterations(self) -> int:
        return self.total_iters

    def image_steps(self, num_steps: int, teacher_num_steps: int, num_held_out: int, num_scales: int = 1) -> int:
        """Steps of single images at most, those of teacher, starts and evaluation among them.

        Args:
            num_scales: guidance scales that the result is evaluated at.
        """
        taught = (1 + COMPARED_PER_SAMPLE) * self.num_samples
        steps = taught * (teacher_num_steps + num_steps * MAX_STARTS_OF_PIPELINES)
        steps += self.total_iters * self.num_samples * rows_per_sample(num_steps)
        return steps + num_scales * num_held_out * (teacher_num_steps + 3 * num_steps)


AnyTuner: TypeAlias = (
    EndToEndTuner
    | SolverTuner
    | NextEpsTuner
    | TeacherStepTuner
    | AysTuner
    | AysListTuner
    | GitsTuner
    | OssTuner
    | DcSolverTuner
    | DmnTuner
    | GridTuner
    | PipelineTuner
)
TUNERS: dict[str, type[AnyTuner]] = {
    get_args(tuner.__annotations__["objective"])[0]: tuner for tuner in get_args(AnyTuner)
}

# With more calls, learning the solver takes more rows than `end_to_end` does, and only mixtures have been measured.
MAX_CALLS_OF_DEFAULT_SOLVER = 10


def default_tuner(num_steps: int, sampler: SamplerFacts, eta: float) -> AnyTuner:
    """The tuner of a job that names none: `solver` where it applies and its gain is known, else `end_to_end`."""
    if sampler.is_table and eta == 0 and num_steps * sampler.calls_per_step <= MAX_CALLS_OF_DEFAULT_SOLVER:
        return SolverTuner(objective="solver")
    return EndToEndTuner()
