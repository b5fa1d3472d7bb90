"""Runs of one pipeline that share the calls of its network: the same images by fewer calls."""

import copy
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from tests.core.pipelines.kinds import KINDS, Kind
from tests.core.pipelines.run import one_thread
from timetuner_core.grids import make_timesteps
from timetuner_core.integrations.diffusers import TimeTunerScheduler
from timetuner_core.pipelines.joining import NetworkCall, join, split
from timetuner_core.pipelines.shared_calls import Request, Result, RunCancelledError, SharedCalls

pytestmark = pytest.mark.xdist_group("pipelines")

MAX_DIFFERENCE = 1e-4
NUM_STEPS = (4, 8, 5)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def by_name(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def scheduler_of(pipeline: Any, num_steps: int, t_ratios: list[float] | None = None) -> Any:
    own = pipeline.scheduler
    schedule = TimeTunerScheduler.from_schedule(own, {"timesteps": [1.0, 0.0]}).noise_schedule
    grid = make_timesteps(schedule, num_steps).tolist()
    return TimeTunerScheduler.from_schedule(own, {"timesteps": grid, "sampler": "dpmpp_2m", "t_ratios": t_ratios})


def request(pipeline: Any, kind: Kind, num_steps: int, seed: int, **options: Any) -> Request:
    """A run of the kind's call. A scheduler and `is_remembered` may be among the options, which else are the call's."""
    scheduler = options.pop("scheduler", None) or scheduler_of(pipeline, num_steps)
    is_remembered = options.pop("is_remembered", False)
    generator = torch.Generator().manual_seed(seed)
    call = {**kind.call(), "num_inference_steps": num_steps, "generator": generator, **options}
    return Request(call, scheduler, is_remembered)


def alone(pipeline: Any, request: Request) -> Tensor:
    """The latents of a plain call."""
    own, pipeline.scheduler = pipeline.scheduler, request.scheduler
    request.call["generator"].manual_seed(request.call["generator"].initial_seed())
    output = next(iter(pipeline(**request.call).values()))
    pipeline.scheduler = own
    return output


def assert_all_close(results: Sequence[Result], expected: Sequence[Tensor]) -> None:
    for result, latents in zip(results, expected, strict=True):
        torch.testing.assert_close(result.latents, latents, atol=MAX_DIFFERENCE, rtol=0)


@pytest.fixture
def rows_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Notes the rows of each call of a network."""

    def noted(network: Any) -> list[int]:
        rows: list[int] = []
        handle = network.register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
        )
        handles.append(handle)
        return rows

    handles: list[Any] = []
    yield noted
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "pixart-sigma", "wan"])
def test_runs_of_4_8_and_5_steps_take_as_many_calls_as_the_longest(name: str) -> None:
    kind = by_name(name)
    pipeline = kind.build()
    requests = [request(pipeline, kind, num_steps, seed) for seed, num_steps in enumerate(NUM_STEPS)]
    expected = [alone(pipeline, each) for each in requests]
    shared = SharedCalls(pipeline)
    for _ in range(2):  # The first run checks each kind of call by one more.
        before = shared.num_calls
        again = [request(pipeline, kind, num_steps, seed) for seed, num_steps in enumerate(NUM_STEPS)]
        results = shared.run(again)
        assert_all_close(results, expected)
    assert shared.num_calls - before == (16 if name == "wan" else 8)
    assert sum(result.num_calls for result in results) == (34 if name == "wan" else 17)


@pytest.mark.parametrize("name", ["sana", "hunyuan-dit"])
def test_prompts_of_other_lengths_with_several_images_each_are_not_mixed_up(name: str) -> None:
    """These pipelines give images the other prompt's mask with a list of prompts and `num_images_per_prompt`."""
    kind = by_name(name)
    pipeline = kind.build()
    prompts = ["a red square on a table", "a square"]

    def requests() -> list[Request]:
        return [request(pipeline, kind, 2, seed, prompt=prompt) for prompt in prompts for seed in (0, 1)]

    expected = [alone(pipeline, each) for each in requests()]
    for result, latents in zip(SharedCalls(pipeline).run(requests()), expected, strict=True):
        assert float((result.latents - latents).abs().max() / latents.abs().max()) < 1e-6
    assert not torch.allclose(expected[0], expected[2], rtol=1e-3)


def test_an_error_ends_its_own_run_only() -> None:
    kind = by_name("sd15")
    pipeline = kind.build()
    expected = alone(pipeline, request(pipeline, kind, 4, 0))
    threads = threading.active_count()  # The first call of a pipeline starts a thread of tqdm's.
    wrong = [
        request(pipeline, kind, 4, 1, prompt=3),
        request(pipeline, kind, 3, 2, scheduler=scheduler_of(pipeline, 4)),
    ]
    results = SharedCalls(pipeline).run([wrong[0], request(pipeline, kind, 4, 0), wrong[1]])
    assert_all_close(results[1:2], [expected])
    with pytest.raises(ValueError, match="`prompt` has to be of type"):
        _ = results[0].latents
    with pytest.raises(ValueError, match="num_inference_steps is 3; accepted: 4"):
        _ = results[2].latents
    assert threading.active_count() == threads


def test_an_error_of_the_network_is_that_of_the_run_whose_rows_it_is() -> None:
    kind = by_name("sd15")
    pipeline = kind.build()

    def refuse(_: Any, args: tuple[Any, ...]) -> None:
        if bool((torch.as_tensor(args[1]).flatten() > 990).any()):
            raise RuntimeError("this time is not accepted")

    expected = alone(pipeline, request(pipeline, kind, 2, 0, scheduler=scheduler_of(pipeline, 2, [0.9, 1.0])))
    handle = pipeline.unet.register_forward_pre_hook(refuse)
    fine = request(pipeline, kind, 2, 0, scheduler=scheduler_of(pipeline, 2, [0.9, 1.0]))
    try:
        failed, result = SharedCalls(pipeline).run([request(pipeline, kind, 2, 1), fine])
    finally:
        handle.remove()
    assert_all_close([result], [expected])
    with pytest.raises(RuntimeError, match="this time is not accepted"):
        _ = failed.latents


def test_rows_of_a_call_and_threads_are_bounded(rows_of: Any) -> None:
    kind = by_name("sd15")
    pipeline = kind.build()
    requests = [request(pipeline, kind, 2, seed) for seed in range(5)]
    expected = [alone(pipeline, each) for each in requests]
    rows = rows_of(pipeline.unet)
    most = threading.active_count() + 3
    counts = []
    shared = SharedCalls(pipeline, max_batch=5, max_threads=3, check_rows=False)
    again = [request(pipeline, kind, 2, seed) for seed in range(5)]
    results = shared.run(again, lambda: bool(counts.append(threading.active_count())))
    assert_all_close(results, expected)
    assert max(rows) == 4  # Guided, a run has two rows.
    assert sum(rows) == 2 * 2 * 5
    assert max(counts) <= most
    (result,) = SharedCalls(pipeline, max_batch=1).run([request(pipeline, kind, 2, 0)])
    with pytest.raises(ValueError, match="max_batch is 1; accepted: 2 or more, the rows of one run"):
        _ = result.latents


@pytest.mark.parametrize("max_threads", [1, 8])
def test_runs_that_begin_alike_take_no_calls_until_they_differ(max_threads: int, rows_of: Any) -> None:
    kind = by_name("flux")
    pipeline = kind.build()

    def requests() -> list[Request]:
        ratios = [None, [1.0, 1.0, 1.0, 0.9], [1.0, 1.0, 0.9, 1.0]]
        schedulers = [scheduler_of(pipeline, 4, each) for each in ratios]
        return [
            request(pipeline, kind, 4, 0, scheduler=scheduler, is_remembered=number == 0)
            for number, scheduler in enumerate(schedulers)
        ]

    expected = [alone(pipeline, each) for each in requests()]
    rows = rows_of(pipeline.transformer)
    shared = SharedCalls(pipeline, max_threads=max_threads, check_rows=False)
    assert_all_close(shared.run(requests()), expected)
    assert sum(rows) == 4 + 1 + 2
    shared.forget()
    shared.run(requests()[:1])
    assert sum(rows) == 4 + 1 + 2 + 4


def test_a_network_whose_rows_depend_on_each_other_is_called_for_each_run_alone() -> None:
    kind = by_name("flux")
    pipeline = kind.build()
    handle = pipeline.transformer.register_forward_hook(lambda _, args, output: (output[0] - output[0].mean(0) / 2,))
    try:
        requests = [request(pipeline, kind, num_steps, seed) for seed, num_steps in enumerate((2, 3))]
        expected = [alone(pipeline, each) for each in requests]
        again = [request(pipeline, kind, num_steps, seed) for seed, num_steps in enumerate((2, 3))]
        assert_all_close(SharedCalls(pipeline).run(again), expected)
    finally:
        handle.remove()


class TwoControls(torch.nn.Module):
    """Adds up two parts, as `MultiControlNetModel` does: its scales are a list, and not one for each row."""

    def forward(self, sample: Tensor, conditioning_scale: list[float]) -> Tensor:
        parts = zip((sample, 3 * sample.square()), conditioning_scale, strict=False)
        return torch.stack([scale * part for part, scale in parts]).sum(0)


def test_scales_of_several_parts_are_not_taken_from_another_call() -> None:
    network, samples = TwoControls(), torch.arange(8.0).reshape(4, 2, 1)
    scales = [[1.0, 0.5], [0.5, 1.0], [1.0, 1.0], [1.0, 1.0]]
    calls = [
        NetworkCall.of(network, (), {"sample": sample, "conditioning_scale": own})
        for sample, own in zip(samples, scales, strict=True)
    ]
    for call in calls:
        alike = [each for each in calls if each.kind == call.kind]
        for answer, each in zip(split(join(alike).on(network), alike), alike, strict=True):
            torch.testing.assert_close(answer, each.on(network))
    assert calls[2].kind == calls[3].kind


def test_the_pipeline_is_left_as_it_was_and_a_cancelled_run_changes_no_later_image() -> None:
    """With FirstBlockCache on, a call that ends in an exception changes the next call's image."""
    kind = by_name("flux")
    pipeline = copy.deepcopy(kind.build())
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    expected = [alone(pipeline, request(pipeline, kind, 6, seed)) for seed in (0, 1)]
    components = dict(pipeline.components)
    config = dict(pipeline.config)
    shared = SharedCalls(pipeline)
    asked = []
    with pytest.raises(RunCancelledError):
        shared.run(
            [request(pipeline, kind, 6, 2), request(pipeline, kind, 6, 3)], lambda: len(asked.append(0) or asked) > 2
        )
    # Two runs in a row, then a plain call.
    assert_all_close(shared.run([request(pipeline, kind, 6, seed) for seed in (0, 1)]), expected)
    torch.testing.assert_close(alone(pipeline, request(pipeline, kind, 6, 0)), expected[0], atol=0, rtol=0)
    assert pipeline.components == components
    assert dict(pipeline.config) == config


def test_requests_may_join_while_others_run() -> None:
    kind = by_name("sd3")
    pipeline = kind.build()
    requests = [request(pipeline, kind, num_steps, seed) for seed, num_steps in enumerate((4, 2))]
    expected = [alone(pipeline, each) for each in requests]
    shared = SharedCalls(pipeline, check_rows=False)
    first = shared.submit(request(pipeline, kind, 4, 0))
    assert shared.step()
    second = shared.submit(request(pipeline, kind, 2, 1))
    while shared.step():
        pass
    assert_all_close([first, second], expected)
    assert shared.num_calls == 4


def test_hooks_of_model_offload_are_freed_once_after_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed at the end of the shortest run, they would move the network off its device under the others."""
    kind = by_name("sd15")
    pipeline = kind.build()
    threads, freed = threading.active_count(), []
    monkeypatch.setattr(pipeline, "maybe_free_model_hooks", lambda: freed.append(threading.active_count()))
    SharedCalls(pipeline).run([request(pipeline, kind, num_steps, num_steps) for num_steps in (1, 3)])
    assert freed == [threads]


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("dit", DDPMScheduler()), ("sd3", FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))],
)
def test_noise_that_a_pipeline_leaves_to_chance_comes_from_the_seed(name: str, scheduler: Any) -> None:
    kind = by_name(name)
    pipeline = kind.build()

    def latents(seeds: Sequence[int]) -> Tensor:
        requests = [request(pipeline, kind, 3, seed, scheduler=copy.deepcopy(scheduler)) for seed in seeds]
        return SharedCalls(pipeline).run(requests)[0].latents

    image = latents([1])
    torch.testing.assert_close(latents([1, 2]), image, rtol=0, atol=MAX_DIFFERENCE)
    assert (latents([3]) - image).abs().max() > 0.1


def test_a_scheduler_belongs_to_one_request() -> None:
    kind = by_name("flux")
    pipeline = kind.build()
    requests = [request(pipeline, kind, 2, seed, scheduler=scheduler_of(pipeline, 2)) for seed in (0, 1)]
    requests[1].scheduler = requests[0].scheduler
    with pytest.raises(ValueError, match="scheduler is that of another request; accepted: one for each request"):
        SharedCalls(pipeline).run(requests)


def test_autocast_is_refused_as_it_would_not_reach_the_threads() -> None:
    kind = by_name("flux")
    pipeline = kind.build()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"torch.autocast is on; accepted: "):
        SharedCalls(pipeline).run([request(pipeline, kind, 2, 0)])


def test_a_pipeline_with_two_networks_shares_the_calls_of_each() -> None:
    """Wan 2.2 has a network for high and one for low noise."""
    kind = by_name("wan")
    parts = kind.parts()
    low = copy.deepcopy(parts["transformer"])
    with torch.no_grad():
        low.proj_out.weight *= 0.5
    pipeline = WanPipeline(**parts, transformer_2=low, boundary_ratio=0.9)
    pipeline.set_progress_bar_config(disable=True)
    requests = [request(pipeline, kind, num_steps, seed) for seed, num_steps in enumerate((4, 2))]
    expected = [alone(pipeline, each) for each in requests]
    one_network = alone(kind.build(), request(pipeline, kind, 4, 0))
    assert not torch.allclose(expected[0], one_network, atol=1e-2)
    shared = SharedCalls(pipeline, check_rows=False)
    again = [request(pipeline, kind, num_steps, seed) for seed, num_steps in enumerate((4, 2))]
    assert_all_close(shared.run(again), expected)
    assert sorted(shared.networks) == ["transformer", "transformer_2"]
    # Guided, a step takes two calls. In four steps, sigma is 1, 0.95, 0.88 and 0.7, and in two, 1 and 0.88.
    assert shared.num_calls == 10


def test_encoded_prompts_are_remembered_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timetuner_core.pipelines.shared_calls.MAX_REMEMBERED_BYTES", 40)
    shared, asked = SharedCalls(by_name("ddim").build()), list[int]()

    def encoder(tokens: Tensor) -> Tensor:
        asked.append(int(tokens[0]))
        return tokens.float()  # 16 bytes

    for prompt in (1, 2, 1, 3, 1, 2):
        answer = shared.encode("text_encoder", encoder, (torch.full((4,), prompt),), {})
        assert answer.tolist() == [prompt] * 4
        answer += 1  # An answer is its receiver's own.
        shared.close()
    assert asked == [1, 2, 3, 2]  # When the third came, the second had been used the longest ago.
