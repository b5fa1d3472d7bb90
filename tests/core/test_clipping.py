"""x0 is clipped as each sampler's diffusers class clips it, step by step, and not where that class does not."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor

from tests.core.conftest import normals, save_model, tiny_unet
from timetuner_core import model_wrapper
from timetuner_core.clipping import CLIP_RULES, Clipping, clipping_text
from timetuner_core.integrations.diffusers import TimeTunerScheduler
from timetuner_core.models.describing import describe
from timetuner_core.models.folder_files import ModelFormatError
from timetuner_core.models.loading import load_folder
from timetuner_core.models.schedulers import read_scheduler_config
from timetuner_core.samplers import SAMPLERS, sample_steps

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`algorithm_types:FutureWarning")]

NUM_STEPS = 8  # divides 1000, without which DDIM's steps are not those of its grid
CLIP: dict[str, Any] = {"clip_sample": True, "clip_sample_range": 0.7}
THRESHOLD: dict[str, Any] = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
NEITHER: dict[str, Any] = {"clip_sample": False}
TRAILING = {"timestep_spacing": "trailing"}
TO_T_MIN = {"lower_order_final": False, "final_sigmas_type": "sigma_min", "solver_order": 2}


class Case(NamedTuple):
    """A diffusers scheduler with its options, our name for it, and where its grid ends."""

    scheduler: str
    options: dict[str, Any]
    sampler: str
    ends_at_t_min: bool = False


DDIM = Case("DDIMScheduler", TRAILING, "ddim")
DDPM = Case("DDPMScheduler", TRAILING, "ddpm")
HEUN = Case("HeunDiscreteScheduler", TRAILING, "heun")
EULER = Case("EulerDiscreteScheduler", TRAILING, "euler")
DPM = Case("DPMSolverMultistepScheduler", TO_T_MIN, "dpmpp_2m", True)
UNIPC = Case("UniPCMultistepScheduler", TO_T_MIN, "unipc_2", True)
DEIS = Case("DEISMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, "deis", True)
CASES = [
    *((case, clipping) for case in (DDIM, DDPM) for clipping in (CLIP, THRESHOLD, {**CLIP, **THRESHOLD}, NEITHER)),
    *((HEUN, clipping) for clipping in (CLIP, THRESHOLD, NEITHER)),
    *((case, clipping) for case in (EULER, DPM, UNIPC, DEIS) for clipping in (CLIP, THRESHOLD)),
]


def network(x: Tensor, t_input: Tensor) -> Tensor:
    """An eps that leaves x0 far outside -1..1, differently in each sample."""
    return 0.7 * x + 0.2 * x.flip(-1)


def theirs(case: Case, clipping: dict[str, Any], x: Tensor) -> tuple[Any, list[Tensor]]:
    """The scheduler of a configuration that may have fields of another class, and x_t after each of its calls."""
    scheduler_class = getattr(diffusers, case.scheduler)
    config = json.loads(scheduler_class(**case.options).to_json_string())  # Files have this form.
    scheduler = scheduler_class.from_config({**config, **clipping})
    scheduler.set_timesteps(NUM_STEPS)
    divides_by_alpha = case.sampler in ("heun", "euler")
    noise = {"generator": torch.Generator().manual_seed(1)} if case.sampler == "ddpm" else {}
    after = []
    if divides_by_alpha:
        x = x * (1 + scheduler.sigmas[0].double() ** 2).sqrt()
    for k, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if divides_by_alpha else x
        x = scheduler.step(network(scaled, t), t, x, **noise).prev_sample
        after.append(x / (1 + scheduler.sigmas[k + 1].double() ** 2).sqrt() if divides_by_alpha else x)
    return scheduler, after[::2] if case.sampler == "heun" else after


@pytest.mark.parametrize(
    ("case", "clipping"), CASES, ids=lambda value: value.sampler if isinstance(value, Case) else "-".join(value)
)
def test_every_step_is_that_of_diffusers(case: Case, clipping: dict[str, Any]) -> None:
    x_T = normals(3, 1, 4, 4)
    scheduler, expected = theirs(case, clipping, x_T)
    saved = json.loads(scheduler.to_json_string())
    spec = read_scheduler_config({**saved, **clipping, "_class_name": case.scheduler})
    schedule = spec.noise_schedule
    times = schedule.time_of_model_input(scheduler.timesteps.double().unique_consecutive())
    grid = torch.cat([times, torch.tensor([schedule.t_min if case.ends_at_t_min else 0.0], dtype=torch.float64)])
    model_fn = model_wrapper(network, schedule, spec.model_type, clipping=spec.clipping)
    step_fn = SAMPLERS[case.sampler].step_fn(model_fn, schedule)
    generator = torch.Generator().manual_seed(1)
    actual = [x for x, _ in sample_steps(step_fn, x_T, grid, torch.ones(NUM_STEPS), generator=generator)]
    if case.sampler == "heun":  # The first call of its step is no step yet.
        actual, expected = actual[-1:], expected[-1:]
    for ours, their_x in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, their_x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clipping", [CLIP, THRESHOLD])
def test_a_model_that_clips_has_other_samples_than_one_that_does_not(clipping: dict[str, Any]) -> None:
    x_T = normals(3, 1, 4, 4)
    clipped, free = (theirs(DDIM, options, x_T)[1][-1] for options in (clipping, NEITHER))
    assert (clipped - free).abs().max() > 0.1


@pytest.mark.parametrize(
    "field", [{"clip_sample_range": 0}, {"dynamic_thresholding_ratio": 1.5}, {"sample_max_value": "big"}]
)
def test_clipping_that_makes_no_sense_is_refused_by_name(field: dict[str, Any]) -> None:
    with pytest.raises(ModelFormatError, match=next(iter(field))):
        read_scheduler_config({"_class_name": "DDIMScheduler", "thresholding": True, **field})


@pytest.mark.parametrize(
    ("clipping", "text"),
    [
        (None, "none"),
        (Clipping(1.0), "clip_sample_range=1"),
        (Clipping(None, 0.995, 1.5), "dynamic_thresholding_ratio=0.995,sample_max_value=1.5"),
        (Clipping(0.7, 0.9), "clip_sample_range=0.7,dynamic_thresholding_ratio=0.9"),
    ],
)
def test_a_clipping_is_written_and_read_by_the_names_of_a_scheduler_s_configuration(
    clipping: Clipping | None, text: str
) -> None:
    assert clipping_text(clipping) == text
    assert Clipping.parse(text) == clipping
    assert clipping_text(Clipping.parse(",".join(reversed(text.split(","))))) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "clip_sample",
        "clip_sample_range=",
        "clip_sample_range=0",
        "clip_sample_range=nan",
        "clip_sample_range=inf",
        "clip_sample_range=1,clip_sample_range=2",
        "clip_sample=1",
        "dynamic_thresholding_ratio=1.1",
        "sample_max_value=2",
        "none,clip_sample_range=1",
    ],
)
def test_a_text_that_is_no_clipping_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="accepted: "):
        Clipping.parse(text)


def test_a_model_is_clipped_as_asked_for_and_not_as_its_configuration_says(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_unet(), clip_sample=True, clip_sample_range=0.7)
    model = load_folder(tmp_path)
    assert describe(model)["clipping"] == "clip_sample_range=0.7"
    noise, timesteps = 3 * normals(2, 1, 4, 4).float(), torch.tensor([0.9, 0.5, 0.001], dtype=torch.float64)

    def predicted(clipping: str | None) -> Tensor:
        model_fn = model.clipped_as(clipping).model_fn("uncond", 1.0)
        return model_fn.predict_for("ddim", noise, timesteps[0]).x0

    assert float(predicted(None).abs().max()) == pytest.approx(0.7)
    assert torch.equal(predicted(None), predicted("clip_sample_range=0.7"))
    assert float(predicted("clip_sample_range=0.2").abs().max()) == pytest.approx(0.2)
    assert float(predicted("none").abs().max()) > 1


@pytest.mark.parametrize(
    ("sampler", "ignored"),
    [("ddim", []), ("heun", ["dynamic_thresholding_ratio"]), ("dpmpp_2m", ["clip_sample_range"])],
)
def test_a_sampler_says_what_of_a_clipping_it_ignores(sampler: str, ignored: list[str]) -> None:
    assert CLIP_RULES[sampler].ignores(Clipping(1.0, 0.9)) == ignored
    assert CLIP_RULES[sampler].ignores(None) == []


def test_a_tuned_pipeline_keeps_the_clipping_of_its_schedule(tmp_path: Path) -> None:
    base = diffusers.DDIMScheduler(clip_sample=False)
    schedule = {"timesteps": [1.0, 0.5, 0.001], "t_ratios": [1.0, 1.0], "clipping": "clip_sample_range=0.2"}
    TimeTunerScheduler.from_schedule(base, schedule).save_pretrained(tmp_path)
    for scheduler, largest in (
        (TimeTunerScheduler.from_pretrained(tmp_path), 0.2),
        (TimeTunerScheduler.from_schedule(base, {**schedule, "clipping": None}), None),
    ):
        scheduler.set_timesteps(2)
        x = 3 * normals(2, 1, 4, 4).float()
        x0 = scheduler.step(torch.zeros_like(x), scheduler.timesteps[0], x).pred_original_sample
        assert (float(x0.abs().max()) == pytest.approx(largest)) if largest else float(x0.abs().max()) > 1
