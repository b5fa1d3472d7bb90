"""Requests sampled together, each at its own step, get what each would get alone."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.conftest import DEVICES
from timetuner_core.catalog import GridName, GuidanceType
from timetuner_core.grids import make_timesteps
from timetuner_core.models.loading import DiffusionModel, load_builtin
from timetuner_core.samplers import get_sampler
from timetuner_core.samplers.solver_table import SolverTable, solver_of
from timetuner_core.sampling.generate import Guidance, generate
from timetuner_core.sampling.rolling_batch import RollingBatch, Row
from timetuner_core.sampling.same_bits import steady_sizes

MAX_SIZE = 8
UNGUIDED = Guidance("uncond", 1.0)
GUIDED = Guidance("classifier-free", 2.0)

load = cache(load_builtin)


@cache
def sizes_of(name: str, guidance: Guidance, device: str = "cpu") -> tuple[int, ...]:
    guided = None if guidance.interval else guidance.type != "uncond"
    return steady_sizes(load(name, device), guidance.type, MAX_SIZE, device, guided=guided)


def batch_of(
    name: str, sampler: str = "ddim", guidance: Guidance = UNGUIDED, eta: float = 0.0, device: str = "cpu"
) -> RollingBatch:
    return RollingBatch(load(name, device), sampler, guidance, eta, sizes_of(name, guidance, device), device)


def row(name: str, k: int, guidance: Guidance = UNGUIDED, num_steps: int | None = None, **fields: Any) -> Row:
    """One of many rows that have nothing in common: not even a number of steps, unless it is given."""
    grids: list[GridName] = ["default", "uniform", "log_snr"]
    grid = grids[k % 3] if num_steps is None else "default"
    steps = num_steps or 2 + k % 4
    defaults: dict[str, Any] = {
        "owner": k,
        "seed": 100 + k,
        "timesteps": make_timesteps(load(name).noise_schedule, steps, grid),
        "t_ratios": 1 - 0.01 * (1 + k % 3) * torch.ones(steps, dtype=torch.float64),
    }
    if guidance.type != "uncond":
        defaults |= {"guidance_scale": 1.5 + 0.5 * (k % 5), "condition": torch.tensor(k % 4)}
    return Row(**(defaults | fields))


def run(
    batch: RollingBatch,
    joining: Mapping[int, Sequence[Row]],
    leaving: Mapping[int, Sequence[Hashable]] | None = None,
) -> dict[Hashable, Tensor]:
    """The image of each owner's row; rows join and leave before the steps given."""
    images: dict[Hashable, Tensor] = {}
    step = 0
    while batch.rows or step <= max(joining):
        if step in joining:
            batch.add(joining[step])
        for owner in (leaving or {}).get(step, ()):
            batch.discard(owner)
        if batch.rows:
            advance = batch.step()
            if advance.images is not None:
                images |= {done.owner: image for done, image in zip(advance.done, advance.images, strict=True)}
        step += 1
    return images


def alone(name: str, sampler: str, guidance: Guidance, eta: float, device: str, one: Row) -> Tensor:
    return run(batch_of(name, sampler, guidance, eta, device), {0: [one]})[one.owner]


MIXING = [
    ("mixture-ring", "ddim", GUIDED, 0.0),
    ("mixture-ring", "ddim", Guidance("classifier", 2.0), 1.0),
    ("mixture-gratings", "ddpm", GUIDED, 0.0),
    ("mixture-gratings", "euler", UNGUIDED, 0.0),
    pytest.param("digits8", "ddim", GUIDED, 0.0, marks=pytest.mark.exhaustive),
    ("digits8", "ddim", replace(GUIDED, rescale=0.5), 1.0),
    pytest.param("digits8", "ddpm", UNGUIDED, 0.0, marks=pytest.mark.exhaustive),
    ("digits32-ldm", "euler", GUIDED, 0.0),
    pytest.param("digits32-ldm", "ddim", UNGUIDED, 1.0, marks=pytest.mark.exhaustive),
]
TOGETHER = [
    ("mixture-ring", "dpmpp_3m", GUIDED, 0.0),
    ("mixture-ring", "dpm_3", Guidance("classifier", 2.0), 0.0),
    ("mixture-gratings", "dpmpp_2m_sde", UNGUIDED, 0.0),
    pytest.param("digits8", "unipc_2", GUIDED, 0.0, marks=pytest.mark.exhaustive),
    ("digits8", "heun", UNGUIDED, 0.0),
    ("mixture-ring", "unipc_2", GUIDED, 0.0),
    ("digits8", "ddim", replace(GUIDED, interval=(0.3, 0.7)), 1.0),
    ("digits32-ldm", "dpmpp_2m", GUIDED, 0.0),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "sampler", "guidance", "eta"), MIXING)
def test_a_row_is_the_same_bit_for_bit_whoever_joins_and_leaves_meanwhile(
    name: str, sampler: str, guidance: Guidance, eta: float, device: str
) -> None:
    rows = [row(name, k, guidance) for k in range(11)]
    joining = {0: rows[:3], 1: rows[3:5], 2: rows[5:8], 4: rows[8:9], 7: rows[9:]}
    images = run(batch_of(name, sampler, guidance, eta, device), joining, leaving={1: [0], 3: [7, 5]})
    assert set(images) == set(range(11)) - {0, 5, 7}
    for owner, image in images.items():
        assert torch.equal(image, alone(name, sampler, guidance, eta, device, rows[int(str(owner))]))
    moved = run(batch_of(name, sampler, guidance, eta, device), {0: rows[8:2:-1]})
    for owner in set(moved) & set(images):
        assert torch.equal(moved[owner], images[owner])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "sampler", "guidance", "eta"), TOGETHER)
def test_a_row_is_the_same_bit_for_bit_among_others_that_start_with_it(
    name: str, sampler: str, guidance: Guidance, eta: float, device: str
) -> None:
    rows = [row(name, k, guidance, num_steps=4) for k in range(7)]
    images = run(batch_of(name, sampler, guidance, eta, device), {0: rows[:5], 4: rows[5:]}, leaving={2: [1]})
    moved = run(batch_of(name, sampler, guidance, eta, device), {0: rows[::-1]})
    for one in rows[:1] + rows[2:]:
        assert torch.equal(images[one.owner], alone(name, sampler, guidance, eta, device, one))
        assert torch.equal(images[one.owner], moved[one.owner])


@pytest.mark.parametrize(("name", "sampler", "guidance", "eta"), MIXING + TOGETHER)
def test_rows_are_what_their_seeds_are_when_sampled_by_themselves(
    name: str, sampler: str, guidance: Guidance, eta: float
) -> None:
    model, batch = load(name), batch_of(name, sampler, guidance, eta)
    rows = [row(name, k, guidance, None if batch.mixes_steps else 4) for k in range(4)]
    images = run(batch, {0: rows})
    for one in rows:
        expected = generate(
            model,
            replace(guidance, scale=one.guidance_scale),
            [one.seed],
            None if one.condition is None else one.condition[None],
            one.timesteps,
            one.t_ratios,
            eta,
            sampler=sampler,
            batch_sizes=batch.batch_sizes,
        )
        torch.testing.assert_close(images[one.owner], expected[0], atol=1e-5, rtol=1e-5)
        assert images[one.owner].shape == model.image_shape


def learned(name: str, k: int, guidance: Guidance, sampler: str, **fields: Any) -> Row:
    """A row with a solver that no other row has."""
    plain = row(name, k, guidance, **fields)
    table = SolverTable.of_sampler(get_sampler(sampler), load(name).noise_schedule, plain.timesteps)
    generator = torch.Generator().manual_seed(k)
    offsets = 0.01 * torch.randn(plain.num_steps, plain.num_steps + 1, generator=generator, dtype=torch.float64)
    return replace(plain, solver_table=table.plus(offsets))


@pytest.mark.parametrize(
    ("name", "sampler", "guidance"), [("mixture-ring", "dpmpp_2m", GUIDED), ("digits8", "ddim", UNGUIDED)]
)
def test_rows_of_learned_solvers_join_and_leave_at_any_step_and_are_what_each_is_alone(
    name: str, sampler: str, guidance: Guidance
) -> None:
    rows = [learned(name, k, guidance, sampler) for k in range(11)]
    joining = {0: rows[:3], 1: rows[3:5], 2: rows[5:8], 4: rows[8:9], 7: rows[9:]}

    def batch() -> RollingBatch:
        return replace(batch_of(name, sampler, guidance), learned=True)

    images = run(batch(), joining, leaving={1: [0], 3: [7, 5]})
    assert set(images) == set(range(11)) - {0, 5, 7}
    for k in images:
        one = rows[int(str(k))]
        assert torch.equal(images[k], run(batch(), {0: [one]})[k])
        expected = generate(
            load(name),
            replace(guidance, scale=one.guidance_scale),
            [one.seed],
            None if one.condition is None else one.condition[None],
            one.timesteps,
            one.t_ratios,
            sampler=solver_of(sampler, one.solver_table, one.timesteps),
            batch_sizes=sizes_of(name, guidance),
        )
        torch.testing.assert_close(images[k], expected[0], atol=5e-5, rtol=1e-4)


def test_rows_with_and_without_a_learned_solver_do_not_share_a_batch() -> None:
    batch = replace(batch_of("mixture-ring", "dpmpp_2m"), learned=True)
    with pytest.raises(ValueError, match="rows with and without a solver_table; accepted: with"):
        batch.add([row("mixture-ring", 0)])
    with pytest.raises(ValueError, match="accepted: without"):
        batch_of("mixture-ring", "dpmpp_2m").add([learned("mixture-ring", 0, UNGUIDED, "dpmpp_2m")])


@pytest.mark.parametrize(("guidance_type", "unguided"), [("classifier-free", 1.0), ("classifier", 0.0)])
def test_rows_that_do_not_guide_are_drawn_without_the_calls_that_guidance_takes(
    guidance_type: GuidanceType, unguided: float
) -> None:
    model = load("mixture-ring")
    seen = []

    def network(x: Tensor, *args: Any) -> Tensor:
        seen.append(len(x))
        return model.network(x, *args)

    def classifier(*_: Any) -> Tensor:
        raise AssertionError

    recorded = replace(model, network=network, classifier=classifier)
    guidance = Guidance(guidance_type, unguided)
    rows = [row("mixture-ring", k, guidance, num_steps=3, guidance_scale=unguided) for k in range(3)]
    run(RollingBatch(recorded, "ddim", guidance, 0.0, (2, 4)), {0: rows})
    assert seen == [4] * 3


def test_the_network_and_the_decoder_run_at_the_given_sizes_only() -> None:
    seen: list[tuple[str, int]] = []

    def network(x: Tensor, *_: Any) -> Tensor:
        seen.append(("network", len(x)))
        return torch.zeros_like(x)

    def decode(x: Tensor) -> Tensor:
        seen.append(("decoder", len(x)))
        return x

    model = replace(load("mixture-ring"), network=network, decode=decode)
    batch = RollingBatch(model, "ddim", UNGUIDED, 0.0, (2, 4, 6))
    run(batch, {0: [row("mixture-ring", k, num_steps=1 + k // 2) for k in range(5)]})
    network_sizes = [("network", 6), ("network", 4), ("network", 2)]
    assert seen == [call for at, size in enumerate((2, 2, 2)) for call in (network_sizes[at], ("decoder", size))]


@pytest.mark.parametrize(("sampler", "num_steps"), [("ddpm", None), ("dpmpp_2m_sde", 4)])
def test_more_rows_than_a_network_batch_holds_go_by_several(sampler: str, num_steps: int | None) -> None:
    rows = [row("mixture-gratings", k, GUIDED, num_steps) for k in range(7)]
    sizes = sizes_of("mixture-gratings", GUIDED)
    expected = run(batch_of("mixture-gratings", sampler, GUIDED), {0: rows})
    model = load("mixture-gratings")
    batch = RollingBatch(model, sampler, GUIDED, 0.0, sizes[:1], capacity=7)
    assert (sizes[0] < 7, batch.room) == (True, 7)
    images = run(batch, {0: rows})
    assert all(torch.equal(images[k], expected[k]) for k in range(7))


def test_each_step_tells_where_each_row_is_and_what_is_predicted_of_it() -> None:
    batch = batch_of("mixture-ring")
    batch.add([row("mixture-ring", k, num_steps=2 + k) for k in range(2)])
    told = []
    while batch.rows:
        advance = batch.step()
        steps = [(travelling.row.owner, travelling.step) for travelling in advance.travelling]
        told.append((steps, [done.owner for done in advance.done]))
        assert len(advance.x0) == len(steps)
    assert told == [([(0, 1), (1, 1)], []), ([(0, 2), (1, 2)], [0]), ([(1, 3)], [1])]
    assert advance.images is not None
    torch.testing.assert_close(advance.x0, advance.images, atol=0.1, rtol=0)  # the last x0 is nearly the image


def tensor_conditioned() -> DiffusionModel:
    """The network predicts the mean of its condition; nothing stands for none by itself."""

    def network(x: Tensor, _t: Tensor, condition: Tensor) -> Tensor:
        return condition.mean((1, 2))[:, None].expand_as(x)

    model = load("mixture-ring")
    return replace(model, network=network, num_classes=0, condition_shape=(None, 2), uncond_condition=None)


def test_each_row_has_its_own_condition_and_its_own_for_none() -> None:
    def sample(*owners: int) -> dict[Hashable, Tensor]:
        rows = [
            row(
                "mixture-ring",
                k,
                GUIDED,
                condition=torch.full((3, 2), 0.1 * k),
                uncond_condition=torch.full((3, 2), 0.01 * k),
            )
            for k in owners
        ]
        return run(RollingBatch(tensor_conditioned(), "ddim", GUIDED, 0.0, (4,)), {0: rows})

    together = sample(0, 1, 2)
    for k in range(3):
        assert torch.equal(together[k], sample(k)[k])


def test_where_steps_mix_there_is_room_at_any_step() -> None:
    batch = batch_of("mixture-ring")
    assert batch.room == MAX_SIZE
    batch.add([row("mixture-ring", k, num_steps=2 + k) for k in range(MAX_SIZE)])
    assert batch.room == 0
    batch.step()
    assert batch.room == 0
    batch.step()
    assert batch.room == 1
    batch.discard(5)
    assert batch.room == 2
    batch.add([row("mixture-ring", 3), row("mixture-ring", 4)])
    assert batch.room == 0


@pytest.mark.parametrize(
    ("sampler", "guidance"),
    [("dpmpp_2m", GUIDED), ("heun", GUIDED), ("ddim", replace(GUIDED, interval=(0.3, 0.7)))],
    ids=["it remembers", "two calls", "an interval of guidance"],
)
def test_where_rows_start_together_none_joins_until_all_are_over(sampler: str, guidance: Guidance) -> None:
    batch = batch_of("mixture-ring", sampler, guidance)
    one, another = (row("mixture-ring", k, guidance, num_steps=2) for k in range(2))
    batch.add([one])
    assert batch.room == MAX_SIZE - 1
    batch.step()
    assert batch.room == 0
    with pytest.raises(ValueError, match="accepted: up to 0"):
        batch.add([another])
    batch.step()
    assert batch.room == MAX_SIZE


def test_more_rows_than_there_is_room_for_are_refused_and_leave_the_batch_as_it_was() -> None:
    batch = batch_of("mixture-ring")
    batch.add([row("mixture-ring", 0)])
    with pytest.raises(ValueError, match="8 rows are to join; accepted: up to 7"):
        batch.add([row("mixture-ring", k) for k in range(1, 9)])
    assert set(run(batch, {0: [row("mixture-ring", 1)]})) == {0, 1}


def test_rows_of_another_grid_are_refused_where_all_start_together() -> None:
    batch = batch_of("mixture-ring", "dpmpp_2m")
    batch.add([row("mixture-ring", 0, num_steps=3)])
    for num_steps in (2, 4):
        with pytest.raises(ValueError, match="accepted: one grid"):
            batch.add([row("mixture-ring", 1, num_steps=num_steps)])
    moved = row("mixture-ring", 1, num_steps=3)
    with pytest.raises(ValueError, match="accepted: one grid"):
        batch.add([replace(moved, timesteps=moved.timesteps * 0.99)])
