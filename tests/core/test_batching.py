"""A sample's bits do not depend on what else is in its batch."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.core.conftest import DEVICES, crossed
from timetuner_core.catalog import GuidanceType
from timetuner_core.grids import make_timesteps
from timetuner_core.models.loading import BUILTIN_FOLDERS, BUILTINS, DiffusionModel, load_builtin
from timetuner_core.sampling.generate import Guidance, generate
from timetuner_core.sampling.same_bits import steady_sizes

MAX_SIZE = 8
SAMPLERS = [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("heun", 0.0), ("dpmpp_3m", 0.0), ("dpmpp_2m_sde", 0.0)]
SEEDS = [3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 97]
LABELS = torch.tensor([0, 3, 1, 2, 2, 0, 3, 1, 1, 0, 2])
SCALES = [2.0, 1.5, 3.0, 2.5, 1.25, 2.0, 4.0, 0.5, 7.5, 1.75, 2.25]

load = cache(load_builtin)
# `fashion32` has the kinds of layers that `digits32-ldm` has.
MODELS = [name for name in BUILTINS if name != "fashion32"]
GUIDANCE_TYPES: dict[str, tuple[GuidanceType, ...]] = {
    name: ("uncond", "classifier-free") if name in BUILTIN_FOLDERS else get_args(GuidanceType) for name in MODELS
}
GUIDED = {f"{name}-{type}": (name, type) for name, types in GUIDANCE_TYPES.items() for type in types}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_same_in_any_company(
    model: DiffusionModel,
    guidance: Guidance,
    sizes: tuple[int, ...],
    sampler: str = "ddim",
    eta: float = 0.0,
    device: str = "cpu",
    num_steps: int = 3,
) -> None:
    timesteps = make_timesteps(model.noise_schedule, num_steps)

    def sample(*index: int) -> Tensor:
        return generate(
            model,
            guidance,
            [SEEDS[i] for i in index],
            None if guidance.type == "uncond" else LABELS[list(index)],
            timesteps,
            [1.0, 0.97, 0.95][:num_steps],
            eta,
            guidance_scales=[SCALES[i] for i in index],
            sampler=sampler,
            batch_sizes=sizes,
            device=device,
        )

    everyone = sample(*range(len(SEEDS)))
    assert bool(everyone.isfinite().all())
    moved = [5, 6, 7, 8, 9, 10, 0, 1, 2, 3, 4]
    for index in (moved, [10], [4, 0]):
        assert torch.equal(sample(*index), everyone[index])


@cache
def guided_sizes(name: str, guidance_type: GuidanceType, device: str) -> tuple[int, ...]:
    return steady_sizes(load(name, device), guidance_type, MAX_SIZE, device, guided=True)


@pytest.mark.parametrize("device", DEVICES)
@crossed(guided=GUIDED, sampler=SAMPLERS)
def test_a_sample_is_the_same_bit_for_bit_in_any_company(
    guided: tuple[str, GuidanceType], sampler: tuple[str, float], device: str
) -> None:
    name, guidance_type = guided
    sizes = guided_sizes(name, guidance_type, device)
    assert_same_in_any_company(load(name, device), Guidance(guidance_type, 2.0), sizes, *sampler, device)


@pytest.mark.parametrize("name", MODELS)
def test_every_guidance_that_a_builtin_offers_is_tried(name: str) -> None:
    assert set(load(name).guidance_types) == set(GUIDANCE_TYPES[name])


@pytest.mark.parametrize("interval", [None, (0.3, 0.7)])
def test_rescaled_guidance_and_an_interval_leave_it_so(interval: tuple[float, float] | None) -> None:
    model = load("digits8")
    sizes = steady_sizes(model, "classifier-free", MAX_SIZE)
    guidance = Guidance("classifier-free", 2.0, rescale=0.5, interval=interval)
    assert_same_in_any_company(model, guidance, sizes)


@pytest.mark.usefixtures("two_threads")
def test_several_threads_leave_it_so() -> None:
    model = load("digits8")
    sizes = steady_sizes(model, "uncond", 2)
    assert_same_in_any_company(model, Guidance("uncond", 1.0), sizes, num_steps=1)


Change = Callable[[Tensor], Tensor]


def with_network(change: Change, **fields: Any) -> DiffusionModel:
    """A model whose network is told its batch by nothing but `change`, what it adds to an exact answer."""
    return replace(load("mixture-ring"), network=lambda x, *_: 0.5 * x + 1e-6 * change(x), **fields)


def small_batches(x: Tensor) -> Tensor:
    return torch.full_like(x, len(x) < 4)


def odd_positions(x: Tensor, size: int) -> Tensor:
    return (torch.arange(len(x)) % 2 * (len(x) == size))[:, None].expand_as(x)


def company(x: Tensor) -> Tensor:
    return x.mean(0, keepdim=True).expand_as(x)


@pytest.mark.parametrize(
    ("change", "max_size", "sizes"),
    [
        (torch.zeros_like, 1, (1,)),
        (torch.zeros_like, 7, (1, 2, 4, 7)),
        (torch.zeros_like, 8, (1, 2, 4, 8)),
        (small_batches, 8, (4, 8)),
        (small_batches, 3, (1, 2, 3)),
        (partial(odd_positions, size=3), 3, (1, 2)),
        (partial(odd_positions, size=4), 8, (1, 2, 8)),
        (partial(odd_positions, size=8), 8, (1, 2, 4)),
        (company, 48, (1,)),
    ],
)
@pytest.mark.parametrize("guided", [True, False, None])
def test_sizes_are_those_that_agree_with_the_largest_at_every_position(
    change: Change, max_size: int, sizes: tuple[int, ...], guided: bool | None
) -> None:
    # There is no guidance, so that the network's batch is the sampler's.
    assert steady_sizes(with_network(change), "uncond", max_size, guided=guided) == sizes


@pytest.mark.parametrize(("guided", "sizes"), [(True, (2, 4, 8)), (False, (4, 8)), (None, (4, 8))])
def test_guidance_that_doubles_the_networks_batch_is_tried_so(guided: bool | None, sizes: tuple[int, ...]) -> None:
    assert steady_sizes(with_network(small_batches), "classifier-free", 8, guided=guided) == sizes


def test_a_decoder_is_tried_too() -> None:
    model = with_network(torch.zeros_like, decode=lambda x: x + small_batches(x))
    assert steady_sizes(model, "uncond", 8) == (4, 8)


@pytest.mark.parametrize(("shape", "given", "length"), [((5, 3), None, 5), ((None, 3), 6, 6), ((None, 3), None, 77)])
def test_tensor_conditions_are_tried_at_their_own_length(
    shape: tuple[int | None, int], given: int | None, length: int
) -> None:
    seen = set()

    def network(x: Tensor, t_input: Tensor, condition: Tensor) -> Tensor:
        seen.add(condition.shape[1:])
        return x

    model = replace(load("mixture-ring"), network=network, condition_shape=shape, num_classes=0, uncond_condition=None)
    assert steady_sizes(model, "classifier-free", 4, condition_length=given) == (1, 2, 4)
    assert seen == {(length, 3)}


@pytest.mark.parametrize("max_size", [0, -1])
def test_a_largest_size_below_one_is_refused(max_size: int) -> None:
    with pytest.raises(ValueError, match="accepted: 1 or more"):
        steady_sizes(load("mixture-ring"), "uncond", max_size)


def test_guidance_without_conditions_is_refused() -> None:
    model = replace(load("mixture-ring"), num_classes=0)
    with pytest.raises(ValueError, match="accepted: guidance_type 'uncond'"):
        steady_sizes(model, "classifier-free", 4)


@pytest.mark.parametrize(("count", "batches"), [(1, [2]), (2, [2]), (3, [4]), (4, [4]), (7, [4, 4]), (9, [4, 4, 2])])
def test_the_network_runs_at_given_sizes_only(count: int, batches: list[int]) -> None:
    seen = []

    def change(x: Tensor) -> Tensor:
        seen.append(len(x))
        return torch.zeros_like(x)

    model = with_network(change, decode=change)
    timesteps = make_timesteps(model.noise_schedule, 1)
    samples = generate(model, Guidance("uncond", 1.0), SEEDS[:count], None, timesteps, batch_sizes=(2, 4))
    assert len(samples) == count
    assert seen == [size for size in batches for _ in ("network", "decoder")]


def test_each_seed_is_guided_by_its_own_scale() -> None:
    model, timesteps = load("mixture-ring"), make_timesteps(load("mixture-ring").noise_schedule, 4)

    def sample(scale: float, scales: list[float] | None) -> Tensor:
        guidance = Guidance("classifier-free", scale)
        return generate(model, guidance, SEEDS[:3], LABELS[:3], timesteps, guidance_scales=scales)

    together = sample(0.0, [2.0, 3.0, 4.0])
    for i, scale in enumerate([2.0, 3.0, 4.0]):
        torch.testing.assert_close(together[i], sample(scale, None)[i])


@pytest.mark.parametrize(("guidance_type", "unguided"), [("classifier-free", 1.0), ("classifier", 0.0)])
def test_scales_that_do_not_guide_spare_the_calls(guidance_type: GuidanceType, unguided: float) -> None:
    model, timesteps = load("mixture-ring"), make_timesteps(load("mixture-ring").noise_schedule, 4)
    seen = []

    def network(x: Tensor, *args: Any) -> Tensor:
        seen.append(len(x))
        return model.network(x, *args)

    def classifier(*_: Any) -> Tensor:
        raise AssertionError

    recorded = replace(model, network=network, classifier=classifier)
    guidance = Guidance(guidance_type, 2.0)
    generate(recorded, guidance, SEEDS[:2], LABELS[:2], timesteps, guidance_scales=[unguided] * 2)
    assert seen == [2] * 4


@pytest.mark.parametrize(
    ("guidance_type", "scales", "message"),
    [
        ("classifier-free", [1.0, 2.0], "accepted: all 1, or none"),
        ("classifier", [0.0, 2.0], "accepted: all 0, or none"),
        ("classifier", [2.0], "1 guidance_scales for 2 seeds"),
        ("uncond", [2.0], "1 guidance_scales for 2 seeds"),
    ],
)
def test_scales_that_do_not_fit_are_refused(guidance_type: GuidanceType, scales: list[float], message: str) -> None:
    model = load("mixture-ring")
    timesteps = make_timesteps(model.noise_schedule, 1)
    with pytest.raises(ValueError, match=message):
        generate(model, Guidance(guidance_type, 2.0), SEEDS[:2], LABELS[:2], timesteps, guidance_scales=scales)


def test_after_each_step_the_batch_and_what_is_predicted_are_told() -> None:
    model = load("mixture-ring")
    told: list[tuple[slice, int, Tensor]] = []
    samples = generate(
        model,
        Guidance("uncond", 1.0),
        SEEDS[:6],
        None,
        make_timesteps(model.noise_schedule, 3, "default"),
        batch_sizes=(4,),
        after_step=lambda *step: told.append(step),
    )
    assert [(rows, step, len(x0)) for rows, step, x0 in told] == [
        (rows, step, rows.stop - rows.start) for rows in (slice(0, 4), slice(4, 6)) for step in (1, 2, 3)
    ]
    # The last step's x0 is nearly where sampling ends.
    torch.testing.assert_close(torch.cat([told[2][2], told[5][2]]), samples, atol=0.1, rtol=0)


def test_what_is_raised_after_a_step_stops_sampling() -> None:
    model = load("mixture-ring")
    steps = []

    def stop(rows: slice, step: int, x0: Tensor) -> None:
        steps.append(step)
        if step == 2:
            raise RuntimeError("stopped")

    timesteps = make_timesteps(model.noise_schedule, 5)
    with pytest.raises(RuntimeError, match="stopped"):
        generate(model, Guidance("uncond", 1.0), SEEDS, None, timesteps, after_step=stop)
    assert steps == [1, 2]
