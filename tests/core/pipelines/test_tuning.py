"""`tune_pipeline` on tiny pipelines of all kinds that have a many-step teacher."""

import copy
import dataclasses
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    ConsistencyModelPipeline,
    FirstBlockCacheConfig,
    LCMScheduler,
)
from peft import LoraConfig
from torch import Tensor

from tests.core.pipelines.kinds import KINDS, Kind
from tests.core.pipelines.run import one_thread
from timetuner_core.grids import teacher_timesteps
from timetuner_core.integrations.diffusers import TimeTunerScheduler
from timetuner_core.pipelines.checks import read_prompts, split_prompts
from timetuner_core.pipelines.runs import Progress
from timetuner_core.pipelines.schedule import PipelineSchedule
from timetuner_core.pipelines.shared_calls import RunCancelledError
from timetuner_core.pipelines.tuning import PipelineState, tune_pipeline
from timetuner_core.tuning.levenberg import QUOTIENT_UNITS_IN_HALF_PRECISION, UNITS
from timetuner_core.tuning_setup import EVALUATION_SEEDS

pytestmark = pytest.mark.xdist_group("pipelines")

PROMPTS = ["a red square on a table", "a bad table", "red on red", "a table on a square", "a square"]
# The least that goes through all phases.
SMALLEST = {"num_steps": 2, "teacher_num_steps": 4, "total_iters": 1, "num_samples": 1, "num_held_out": 2}
TUNABLE = [kind for kind in KINDS if kind.name != "lcm"]
# These kinds are tuned in earnest: held-out images have to be closer to the teacher's.
TUNED_IN_EARNEST = ["sd15", "sdxl", "sd3", "flux", "pixart-sigma", "wan"]
IN_EARNEST = {"num_steps": 3, "teacher_num_steps": 20, "total_iters": 1, "num_samples": 3, "num_held_out": 6}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def by_name(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def call_of(kind: Kind) -> dict[str, Any]:
    """The arguments of a kind's call that are not the tuner's to set."""
    return {name: value for name, value in kind.call().items() if name not in ("prompt", "output_type")}


def tuned(kind: Kind, pipeline: Any, **options: Any) -> PipelineSchedule:
    prompts = PROMPTS if "prompt" in kind.call() else None
    return tune_pipeline(pipeline, prompts, **{**SMALLEST, **call_of(kind), **options})


def latents_by(pipeline: Any, scheduler: Any, kind: Kind, prompt: str, seed: int, **sizes: int) -> Tensor:
    """The answer of a plain call of the pipeline; where that is no tensor, the last sample of its scheduler."""
    samples = []
    step = scheduler.step
    scheduler.step = lambda *args, **kwargs: samples.append(out := step(*args, **kwargs)) or out
    pipeline.scheduler = scheduler
    call = kind.call() | ({"prompt": prompt} if "prompt" in kind.call() else {}) | sizes
    num_steps = scheduler.num_inference_steps
    output = pipeline(num_inference_steps=num_steps, generator=torch.Generator().manual_seed(seed), **call)
    first = next(iter(output.values()))
    return first if isinstance(first, Tensor) else samples[-1][0]


def assert_measured(schedule: PipelineSchedule, pipeline: Any, kind: Kind, rel: float = 1e-3) -> None:
    """Plain calls of the pipeline, from held-out prompts, are as far from the teacher's as the evaluation says."""
    own = pipeline.scheduler
    options = schedule.evaluation
    base = TimeTunerScheduler.from_schedule(own, {"timesteps": [1.0, 0.0]})
    grid = teacher_timesteps(base.noise_schedule, options["teacher_num_steps"])
    held_out = split_prompts(PROMPTS)[1]
    distances, largest = [], 0.0
    for i in range(options["num_samples"]):
        prompt, seed = held_out[i % len(held_out)], EVALUATION_SEEDS + i
        teacher = TimeTunerScheduler.from_schedule(own, {"timesteps": grid.tolist(), "sampler": schedule.sampler})
        taught = latents_by(pipeline, teacher, kind, prompt, seed).double()
        latents = latents_by(pipeline, schedule.scheduler(pipeline), kind, prompt, seed).double()
        distances.append(float((latents - taught).norm()))
        largest = max(largest, float(taught.norm()))
    pipeline.scheduler = own
    measured = schedule.evaluation["distances"]["tuned"]
    # Latents of untrained networks may be large, and are rounded by so much.
    assert sum(distances) / len(distances) == pytest.approx(measured, rel=rel, abs=1e-7 * largest)


@pytest.mark.parametrize("kind", TUNABLE, ids=lambda kind: kind.name)
def test_every_kind_with_a_teacher_is_tuned_and_samples_as_the_tuner_measured(kind: Kind) -> None:
    pipeline = kind.build()
    own = pipeline.scheduler
    components = dict(pipeline.components)
    schedule = tuned(kind, pipeline, **(IN_EARNEST if kind.name in TUNED_IN_EARNEST else {}))
    assert pipeline.components == components
    assert pipeline.scheduler is own
    assert_measured(schedule, pipeline, kind)
    if kind.name in TUNED_IN_EARNEST:
        assert schedule.evaluation["verdict"] == "accepted", schedule.evaluation["reason"]
        assert schedule.evaluation["distances"]["tuned"] < schedule.evaluation["distances"]["native"]


def test_a_cancelled_run_goes_on_to_the_numbers_of_an_unbroken_one() -> None:
    kind = by_name("flux")
    pipeline = kind.build()
    options = {"num_steps": 2, "total_iters": 2, "num_samples": 2}
    unbroken = tuned(kind, pipeline, **options)
    states: list[str] = []
    with pytest.raises(RunCancelledError):
        tuned(
            kind,
            pipeline,
            **options,
            on_state=lambda state: states.append(json.dumps(state.to_dict())),
            is_cancelled=lambda: len(states) == 1,
        )
    state = PipelineState.from_dict(json.loads(states[0]))
    assert state.iterations == 1
    resumed = tuned(kind, pipeline, **options, state=state)
    assert resumed.to_dict() | {"evaluation": None} == unbroken.to_dict() | {"evaluation": None}
    assert resumed.evaluation["distances"] == unbroken.evaluation["distances"]
    with pytest.raises(ValueError, match="state is that of another seed; accepted: one of the same run"):
        tuned(kind, pipeline, **options, state=state, seed=1)


def test_progress_rises_to_the_total_that_was_told_and_no_call_has_more_rows_than_allowed() -> None:
    kind = by_name("sd15")
    told: list[Progress] = []
    schedule = tuned(kind, kind.build(), num_samples=2, max_batch=6, on_progress=told.append)
    assert [each.phase for each in told[:1] + told[-1:]] == ["start", "evaluation"]
    assert all(later.done >= earlier.done for earlier, later in pairwise(told))
    assert told[-1].done == told[-1].total
    assert schedule.evaluation["largest_batch"] == 6


def test_a_schedule_is_kept_as_json_and_belongs_to_its_pipeline() -> None:
    kind = by_name("flux")
    pipeline = copy.deepcopy(kind.build())
    schedule = tuned(kind, pipeline)
    again = PipelineSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    call = call_of(kind)
    assert schedule.differences(pipeline, **call) == []
    assert schedule.differences(pipeline, **call | {"height": 32, "guidance_scale": 1.0}) == [
        "guidance_scale is 1.0, tuned for 3.0",
        "sizes.height is 32, tuned for 16",
    ]
    with pytest.raises(ValueError, match="pipeline is 'StableDiffusionPipeline', tuned for 'FluxPipeline'"):
        schedule.scheduler(by_name("sd15").build())
    # A LoRA that is fused changes the weights, and so do other adapters.
    with torch.no_grad():
        pipeline.transformer.context_embedder.weight += 1e-3
    with pytest.raises(ValueError, match=r"transformer.weights is .*; accepted: a pipeline like the tuned one"):
        schedule.scheduler(pipeline)
    assert schedule.scheduler(pipeline, override=True).num_inference_steps == 2
    with pytest.raises(ValueError, match="a schedule has the fields sampler; accepted: timesteps"):
        PipelineSchedule.from_dict({"sampler": "ddim"})


def test_a_tuned_pipeline_is_tuned_again() -> None:
    kind = by_name("flux")
    pipeline = kind.build()
    first = tuned(kind, pipeline)
    pipeline.scheduler = first.scheduler(pipeline)
    again = tuned(kind, pipeline, num_steps=3)
    assert again.scheduler(pipeline).num_inference_steps == 3


def test_bfloat16_is_tuned_beyond_the_rounding_of_its_times() -> None:
    kind = by_name("flux")
    pipeline = copy.deepcopy(kind.build()).to(torch.bfloat16)
    schedule = tuned(kind, pipeline, **IN_EARNEST)
    assert schedule.key["networks"]["transformer"]["dtype"] == "bfloat16"
    assert schedule.evaluation["verdict"] == "accepted", schedule.evaluation["reason"]
    assert_measured(schedule, pipeline, kind, rel=0.05)
    # Each quotient of a ratio tells the network another time, as the network rounds it.
    step = UNITS["t_ratio"] * QUOTIENT_UNITS_IN_HALF_PRECISION["t_ratio"]
    times = torch.linspace(1, 1000, 1000)
    assert bool(((times * (1 - step)).bfloat16() < times.bfloat16()).all())


def test_first_block_cache_is_tuned_with_runs_one_after_the_other() -> None:
    kind = by_name("flux")
    pipeline = copy.deepcopy(kind.build())
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    schedule = tuned(kind, pipeline)
    assert schedule.key["networks"]["transformer"]["cache"] == "FirstBlockCacheConfig"
    assert schedule.evaluation["largest_batch"] == 1
    assert_measured(schedule, pipeline, kind)


def test_one_schedule_is_tuned_for_several_sizes_and_belongs_to_those_between() -> None:
    kind = by_name("flux")
    pipeline = kind.build()
    schedule = tuned(kind, pipeline, height=[16, 32], width=[16, 24], num_samples=2, num_held_out=2)
    assert schedule.key["sizes"] == {"height": [16, 32], "width": [16, 24]}
    call = {name: value for name, value in call_of(kind).items() if name not in ("height", "width")}
    assert schedule.differences(pipeline, **call, height=24, width=16) == []
    assert schedule.differences(pipeline, **call, height=24, width=32) == ["sizes.width is 32, tuned for 16 to 24"]
    # Each size is compared with the teacher at that size.
    own = pipeline.scheduler
    base = TimeTunerScheduler.from_schedule(own, {"timesteps": [1.0, 0.0]})
    grid = teacher_timesteps(base.noise_schedule, SMALLEST["teacher_num_steps"]).tolist()
    distances = []
    for i, sizes in enumerate(({"height": 16, "width": 16}, {"height": 32, "width": 24})):
        teacher = TimeTunerScheduler.from_schedule(own, {"timesteps": grid, "sampler": schedule.sampler})
        ends = [
            latents_by(pipeline, scheduler, kind, split_prompts(PROMPTS)[1][0], EVALUATION_SEEDS + i, **sizes)
            for scheduler in (teacher, schedule.scheduler(pipeline))
        ]
        distances.append(float((ends[0] - ends[1]).norm()))
    pipeline.scheduler = own
    assert sum(distances) / 2 == pytest.approx(schedule.evaluation["distances"]["tuned"], rel=1e-3)


def test_one_schedule_is_tuned_for_an_interval_of_guidance_scales_and_belongs_to_those_between() -> None:
    kind = by_name("sd15")
    pipeline = kind.build()
    schedule = tuned(kind, pipeline, guidance_scale=[2, 5], num_samples=2, num_held_out=2)
    assert schedule.key["guidance_scale"] == [2, 5]
    call = {name: value for name, value in call_of(kind).items() if name != "guidance_scale"}
    assert schedule.differences(pipeline, 3.5, **call) == []
    assert schedule.differences(pipeline, 5.5, **call) == ["guidance_scale is 5.5, tuned for 2 to 5"]
    # Each scale is compared with the teacher at that scale.
    at_scales = schedule.evaluation["at_scales"]
    assert [each["guidance_scale"] for each in at_scales] == [2, 3.5, 5]
    for each in at_scales:
        plain_call = {**kind.call(), "guidance_scale": each["guidance_scale"]}
        guided = dataclasses.replace(kind, call=partial(dict, plain_call))
        assert_measured(dataclasses.replace(schedule, evaluation=schedule.evaluation | each), pipeline, guided)


@pytest.mark.parametrize("scales", [[5, 2], [2], [2, 3, 4], [2, "5"]], ids=str)
def test_what_is_no_interval_of_guidance_scales_is_refused(scales: Any) -> None:
    kind = by_name("sd15")
    with pytest.raises(ValueError, match="accepted: a number, or the lowest, then a higher one"):
        tuned(kind, kind.build(), guidance_scale=scales)


def test_a_lora_is_tuned_and_a_schedule_belongs_to_it_and_to_its_scale() -> None:
    kind = by_name("sd15")
    pipeline = copy.deepcopy(kind.build())
    before = tuned(kind, pipeline)
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    pipeline.unet.add_adapter(lora, adapter_name="ink")
    schedule = tuned(kind, pipeline)
    assert_measured(schedule, pipeline, kind)
    assert schedule.key["networks"]["unet"]["adapters"] == {"ink": pytest.approx(4.0)}
    assert schedule.differences(pipeline, **call_of(kind)) == []
    assert any("networks.unet.weights" in text for text in before.differences(pipeline, **call_of(kind)))
    pipeline.set_adapters(["ink"], [0.5])
    assert schedule.differences(pipeline, **call_of(kind)) == ["networks.unet.adapters.ink is 2.0, tuned for 4.0"]
    pipeline.unet.disable_adapters()
    assert schedule.differences(pipeline, **call_of(kind)) == ["networks.unet.adapters.ink is None, tuned for 4.0"]


def test_an_offloaded_pipeline_is_tuned_as_one_in_memory() -> None:
    """accelerate's hooks move networks before their calls. A CPU is a device as any other to them."""
    kind = by_name("sd15")
    pipeline = copy.deepcopy(kind.build())
    expected = tuned(kind, pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert tuned(kind, pipeline) == expected
    # Sequential offload keeps parameters on "meta" between calls.
    pipeline.enable_sequential_cpu_offload(device="cpu")
    assert next(pipeline.unet.parameters()).is_meta
    assert expected.differences(pipeline, **call_of(kind)) == []
    kept = pipeline.unet.conv_in._hf_hook.weights_map
    kept.dataset[f"{kept.prefix}weight"] += 1
    assert any("networks.unet.weights" in text for text in expected.differences(pipeline, **call_of(kind)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": [16, "32"]}, r"height is \[16, '32'\]; accepted: a size, or a list of sizes"),
        ({"height": [16, 32], "width": [16]}, "width has 1 sizes; accepted: 2, as the longest list has"),
        ({"prompts": []}, "prompts has 0 different ones; accepted: 2 or more"),
        ({"prompts": ["a square", "a square"]}, "prompts has 1 different ones; accepted: 2 or more"),
        ({"prompts": ["a square", " "]}, r"prompts\[1\] is ' '; accepted: a text that is not empty"),
        ({"prompts": ["a square", 3]}, r"prompts\[1\] is 3; accepted: a text"),
        ({"prompts": "no such file"}, "prompts is 'no such file' .*; accepted: a list of prompts, or the path"),
        ({"num_steps": 0}, "num_steps is 0; accepted: a whole number, 1 or more"),
        ({"num_steps": 6, "teacher_num_steps": 6}, "teacher_num_steps is 6; accepted: a whole number, 7 or more"),
        ({"num_held_out": 1}, "num_held_out is 1; accepted: a whole number, 2 or more"),
        ({"sampler": "heun"}, "sampler is 'heun'; accepted, without noise and with one call per step: ddim"),
        ({"sampler": "unknown"}, "sampler is 'unknown'; accepted: "),
        ({"guidence_scale": 3.0}, "no argument 'guidence_scale'; did you mean 'guidance_scale'"),
        ({"num_inference_steps": 4}, "num_inference_steps is 4, but the tuner sets it; accepted: .*height"),
        ({"ip_adapter_image": object()}, "ip_adapter_image is a object; accepted: numbers, texts"),
    ],
)
def test_bad_input_is_refused_before_any_work(options: dict[str, Any], message: str, no_calls: Any) -> None:
    pipeline = by_name("sd15").build()
    with no_calls(pipeline), pytest.raises(ValueError, match=message):
        tune_pipeline(pipeline, **{"prompts": PROMPTS, **options})


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    kind = by_name("sdxl-img2img")
    with pytest.raises(ValueError, match=r"`strength` of 0\.5 or more leaves a step"):
        tuned(kind, kind.build(), strength=0.1)


def test_pipelines_that_have_no_many_step_teacher_are_refused_by_name(no_calls: Any) -> None:
    lcm = by_name("lcm").build()
    distilled = by_name("sd15").build()
    distilled.scheduler = LCMScheduler.from_config(distilled.scheduler.config)
    unknown = by_name("sd15").build()
    unknown.scheduler = CogVideoXDDIMScheduler(snr_shift_scale=4.0)
    consistency = ConsistencyModelPipeline(by_name("ddpm").build().unet, CMStochasticIterativeScheduler())
    for pipeline, message in (
        (lcm, "LatentConsistencyModelPipeline, trained for few steps"),
        (consistency, "ConsistencyModelPipeline, trained for few steps"),
        (distilled, "pipeline.scheduler is a LCMScheduler, for networks trained for few steps"),
        (unknown, "_class_name is 'CogVideoXDDIMScheduler'; accepted: "),
    ):
        with no_calls(pipeline), pytest.raises(ValueError, match=message):
            tune_pipeline(pipeline, PROMPTS if "prompt" in inspect.signature(pipeline.__call__).parameters else None)


def test_prompts_are_refused_where_none_are_taken_and_ours_are_varied(tmp_path: Path, no_calls: Any) -> None:
    pipeline = by_name("ddpm").build()
    with no_calls(pipeline), pytest.raises(ValueError, match="prompts are given, which DDPMPipeline does not take"):
        tune_pipeline(pipeline, PROMPTS)
    ours = read_prompts(None)
    assert len(ours) == 64
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\n")
    assert split_prompts(read_prompts(tmp_path / "prompts.txt")) == (["a", "b", "c"], ["d"])
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    with pytest.raises(ValueError, match=r"prompts\[1\] is ''"):
        read_prompts(str(tmp_path / "prompts.txt"))


@pytest.fixture
def no_calls() -> Any:
    """Within it, a pipeline's networks may not be called."""

    @contextmanager
    def watched(pipeline: Any) -> Iterator[None]:
        def refuse(*_: Any) -> None:
            raise AssertionError("a network was called")

        networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        handles = [network.register_forward_pre_hook(refuse) for network in networks]
        yield
        for handle in handles:
            handle.remove()

    return watched
