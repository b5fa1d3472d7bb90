"""The plan of a comparison: its entrants and settings, and how much to spend on each."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from timetuner_core.catalog import GridName, GuidanceType
from timetuner_core.models.loading import BUILTINS, DiffusionModel, ModelFormatError, load_builtin, load_folder
from timetuner_core.samplers import Sampler, sampler_names
from timetuner_core.sampling.generate import Guidance
from timetuner_core.sampling.starting_time import find_starting_time
from timetuner_core.tuners import TUNERS, AnyTuner, Parameters, TeacherMatchingTuner, TunedSetting

BASELINE = "untuned"
# The built-in models that are compared by default. `fashion32` would not fit into half an hour beside the others.
COMPARED = tuple(name for name in BUILTINS if name != "fashion32")
GUIDANCE_TYPES: dict[str, GuidanceType] = {"cfg": "classifier-free", "classifier": "classifier"}


@dataclass(frozen=True)
class Effort:
    """The effort that a comparison spends on each entrant: enough to see which leads, and for the models that are
    compared by default in all under half an hour on two cores.

    Attributes:
        teacher_num_steps: of the teacher that judges. rows_at_once: samples per network batch while sampling.
        tuning_teacher_num_steps, noise_population: of end-to-end tuning's own teacher, and its initial noises.
        data_population: x0 that the per-step tuners and AYS draw from. batch_size: samples per iteration (and step).
        end_to_end_steps: sampler steps to differentiate through, so that every number of steps costs the same: with
            K of them, `end_to_end_steps / K` iterations, at most `end_to_end_iters`. lr: theirs, falling to 0, is
            `lr / K`, at most `max_lr`: more steps add up to the same move.
        solver_iters: iterations of `solver`, at most.
        per_step_iters: batches for Gauss-Newton, at most; tolerance: when it has enough. substeps: of
            `teacher_step`'s teacher.
        search_samples: that AYS and GITS estimate their costs on. path_samples: whose paths OSS and DC-Solver follow.
    """

    teacher_num_steps: int = 100
    rows_at_once: int = 128
    tuning_teacher_num_steps: int = 100
    noise_population: int = 128
    data_population: int = 256
    batch_size: int = 16
    end_to_end_steps: int = 200
    end_to_end_iters: int = 60
    lr: float = 0.2
    max_lr: float = 5e-2
    solver_iters: int = 6
    per_step_iters: int = 12
    tolerance: float = 5e-3
    substeps: int = 4
    search_samples: int = 64
    path_samples: int = 16

    def iters(self, num_steps: int) -> int:
        """The iterations of end-to-end tuning."""
        return max(1, min(self.end_to_end_iters, self.end_to_end_steps // num_steps))


# The one entrant that is no tuner of the registry: no schedule can carry what it finds.
PAS = "pas"
LD3_RELAXED_START = 0.001  # The authors' own.


@dataclass(frozen=True)
class Entrant:
    """A tuner of the registry, or `PAS`, and the grid it starts from.

    Attributes:
        grid: a named one, or `best`, whichever of the named ones comes closest to the teacher on the noise that tuning
            sees. The solver's tuner chooses by itself.
        parameters: what end-to-end tuning learns. with_ratios: whether the solver's tuner learns ratios.
        relaxed_start: LD3's relaxation, in end-to-end tuning.
    """

    objective: str
    grid: GridName | Literal["best"] = "default"
    parameters: Parameters = "t_ratios"
    with_ratios: bool = True
    relaxed_start: float = 0.0

    @property
    def follows_teacher(self) -> bool:
        """Whether its tuner, or the choice of its grid, needs a teacher's samples of the noise that tuning sees."""
        return self.grid == "best" or issubclass(TUNERS[self.objective], TeacherMatchingTuner)

    def tuner(self, effort: Effort, sampler: Sampler, num_steps: int) -> AnyTuner:
        """The tuner with the options that `effort` allows; `PAS` has none. A search takes its samples in one batch."""
        samples = effort.search_samples
        options: dict[str, Any] = {}
        if self.objective == "end_to_end":
            lr, iters = min(effort.max_lr, effort.lr / num_steps), effort.iters(num_steps)
            options = {"parameters": self.parameters, "start": "given", "lr": lr, "total_iters": iters}
            options["relaxed_start"] = self.relaxed_start
        elif self.objective == "solver":
            options = {"start": "best", "total_iters": effort.solver_iters, "with_ratios": self.with_ratios}
        elif self.objective in {"next_eps", "teacher_step"}:
            tune_type = "sequential" if sampler.history_length else "parallel"
            options = {"tune_type": tune_type, "total_iters": effort.per_step_iters, "tolerance": effort.tolerance}
        if self.objective == "teacher_step":
            options["substeps"] = effort.substeps
        if self.objective == "ays":
            options = {"num_samples": samples, "batch_size": samples}
        elif self.objective == "gits":
            options = {"population_size": samples, "batch_size": samples}
        elif self.objective in {"oss", "dc_solver"}:
            options = {"population_size": effort.path_samples, "batch_size": effort.path_samples}
            if self.objective == "dc_solver":
                options["teacher_num_steps"] = effort.tuning_teacher_num_steps
        elif self.objective not in {"ays_list", "dmn", "grid"}:
            options["batch_size"] = effort.batch_size
        make: Callable[..., AnyTuner] = TUNERS[self.objective]
        return make(objective=self.objective, **options)

    def rows(self, effort: Effort, sampler: Sampler, num_steps: int) -> float:
        """About how many samples tuning will put through the network, backward passes and small batches counted too."""
        if self.objective == "end_to_end":
            passes = 10 if self.relaxed_start else 4
            return passes * effort.iters(num_steps) * effort.batch_size * num_steps
        if self.objective == PAS:
            return (effort.tuning_teacher_num_steps + 2 * num_steps) * effort.noise_population
        if self.objective in {"solver", "oss", "dc_solver"}:
            return self.tuner(effort, sampler, num_steps).network_samples(TunedSetting(num_steps))
        if self.objective in {"next_eps", "teacher_step"}:
            calls = 5 if self.objective == "next_eps" else effort.substeps + 2
            return (calls * effort.per_step_iters * effort.batch_size + effort.data_population) * num_steps
        return 50 * effort.search_samples if self.objective in {"ays", "gits"} else 0


ENTRANTS: dict[str, Entrant] = {
    BASELINE: Entrant("grid"),
    "uniform": Entrant("grid", "uniform"),
    "quadratic": Entrant("grid", "quadratic"),
    "log_snr": Entrant("grid", "log_snr"),
    "edm": Entrant("grid", "edm"),
    "ays": Entrant("ays"),
    "ays_list": Entrant("ays_list"),
    "gits": Entrant("gits"),
    "oss": Entrant("oss"),
    "dc_solver": Entrant("dc_solver", "best"),
    PAS: Entrant(PAS, "best"),
    "dmn": Entrant("dmn"),
    "ld3": Entrant("end_to_end", "best", "timesteps"),
    "ld3_relaxed": Entrant("end_to_end", "best", "timesteps", relaxed_start=LD3_RELAXED_START),
    "timetuner": Entrant("next_eps"),
    "teacher_step": Entrant("teacher_step"),
    "end_to_end": Entrant("end_to_end"),
    "end_to_end_grid": Entrant("end_to_end", "best", "both"),
    "bns": Entrant("solver", with_ratios=False),
    "solver": Entrant("solver"),
}


class PlanError(ValueError):
    """An option of a comparison that cannot be. name: the field of `Plan`."""

    def __init__(self, name: str, value: object, accepted: str) -> None:
        super().__init__(f"{name} is {value!r}; accepted: {accepted}")
        self.name, self.value, self.accepted = name, value, accepted


class Group(NamedTuple):
    """Settings that share a teacher."""

    model: str
    guidance: str
    sampler: str

    def __str__(self) -> str:
        return f"{Path(self.model).name}, {self.guidance}, {self.sampler}"


class ComparedSetting(NamedTuple):
    """A group and a number of steps."""

    group: Group
    num_steps: int

    def __str__(self) -> str:
        return f"{self.group}, {self.num_steps} steps"


@dataclass(frozen=True)
class Plan:
    """A comparison; all of it is decided by `seed`.

    Attributes:
        models: built-in names or diffusers-format folders. guidances: see `parse_guidance`.
        entrants: of `ENTRANTS`; the baseline is always among them.

    Raises:
        PlanError: a field that cannot be.
    """

    models: tuple[str, ...] = COMPARED
    num_steps: tuple[int, ...] = (3, 5, 8, 10, 20)
    guidances: tuple[str, ...] = ("uncond",)
    samplers: tuple[str, ...] = ("ddim", "dpmpp_2m")
    entrants: tuple[str, ...] = tuple(ENTRANTS)
    num_samples: int = 256
    seed: int = 0
    effort: Effort = Effort()

    def __post_init__(self) -> None:
        for name in ("models", "num_steps", "guidances", "samplers", "entrants"):
            values = tuple(dict.fromkeys(getattr(self, name)))
            if not values:
                raise PlanError(name, "", "one or more")
            object.__setattr__(self, name, values)
        object.__setattr__(self, "entrants", (BASELINE, *(e for e in self.entrants if e != BASELINE)))
        for number in self.num_steps:
            _check_whole("num_steps", number, 1, 1000)
        for text in self.guidances:
            parse_guidance(text)
        for name, values, known in (
            ("samplers", self.samplers, sampler_names()),
            ("entrants", self.entrants, list(ENTRANTS)),
        ):
            for value in values:
                if value not in known:
                    raise PlanError(name, value, ", ".join(known))
        _check_whole("num_samples", self.num_samples, 16, 50_000)
        _check_whole("seed", self.seed, 0, 2**31 - 1)
        for model in self.models:
            load_model(model)

    @property
    def groups(self) -> list[Group]:
        return list(itertools.starmap(Group, itertools.product(self.models, self.guidances, self.samplers)))

    @property
    def settings(self) -> list[ComparedSetting]:
        return list(itertools.starmap(ComparedSetting, itertools.product(self.groups, self.num_steps)))

    @property
    def drawn_num_steps(self) -> int:
        """How many steps the trajectories that are drawn have: about five, which still fit into a picture."""
        return min(self.num_steps, key=lambda num_steps: (abs(num_steps - 5), num_steps))


def parse_guidance(text: str) -> Guidance:
    """`uncond`, `cfg:SCALE` (classifier-free) or `classifier:SCALE`.

    Raises:
        PlanError: anything else.
    """
    if text == "uncond":
        return Guidance("uncond", 1.0)
    kind, _, scale = text.partition(":")
    try:
        guidance = Guidance(GUIDANCE_TYPES[kind], float(scale))
    except (KeyError, ValueError):
        guidance = None
    if guidance is None or not 0 <= guidance.scale <= 1000:
        raise PlanError("guidances", text, "uncond, cfg:SCALE or classifier:SCALE, such as cfg:2, scale 0 to 1000")
    return guidance


@cache
def load_model(name: str) -> DiffusionModel:
    """A built-in model, or a folder's.

    Raises:
        PlanError: neither, or a folder that does not hold a model.
    """
    if name in BUILTINS:
        return load_builtin(name)
    if not Path(name).is_dir():
        raise PlanError("models", name, f"{', '.join(BUILTINS)}, or a diffusers-format folder")
    try:
        model = load_folder(Path(name))
        return model.starting_at(find_starting_time(model).t)
    except ModelFormatError as error:
        raise PlanError("models", name, f"a diffusers-format folder ({error})") from error


def _check_whole(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise PlanError(name, value, f"{least} to {most}")
