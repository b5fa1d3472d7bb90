"""The cost of a batch's step beside the network, counted: small operations, and waits for the device."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from timetuner_core.catalog import GuidanceType
from timetuner_core.grids import make_timesteps
from timetuner_core.models.loading import load_builtin
from timetuner_core.samplers import get_sampler
from timetuner_core.samplers.solver_table import SolverTable
from timetuner_core.sampling.generate import Guidance
from timetuner_core.sampling.rolling_batch import RollingBatch, Row

ROWS = 24
UNGUIDED, GUIDED = Guidance("uncond", 1.0), Guidance("classifier-free", 2.0)


class Counting(TorchDispatchMode):
    """Counts PyTorch's operations, but those of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self._is_in_network = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._is_in_network:
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def network(self, x: Tensor, *_: Tensor) -> Tensor:
        self._is_in_network = True
        try:
            return torch.zeros_like(x)
        finally:
            self._is_in_network = False


def batch_of_rows(
    network: Callable[..., Tensor],
    guidance: Guidance,
    learned: bool = False,
    sampler: str = "ddim",
    eta: float = 0.0,
    device: str = "cpu",
) -> RollingBatch:
    """24 rows that are all at other steps, of grids of 6 to 8 steps, and none of them at its last ones."""
    model = load_builtin("digits8")
    sizes = tuple(range(1, ROWS + 1))
    batch = RollingBatch(replace(model, network=network), sampler, guidance, eta, sizes, device, learned=learned)

    def row(k: int) -> Row:
        timesteps = make_timesteps(model.noise_schedule, 6 + k % 3)
        table = SolverTable.of_sampler(get_sampler(sampler), model.noise_schedule, timesteps) if learned else None
        ratios = torch.ones(len(timesteps) - 1, dtype=torch.float64)
        label = None if guidance.type == "uncond" else torch.tensor(k % 10)
        return Row(k, k, timesteps, ratios, 1.5 + k % 3, label, solver_table=table)

    for start in (0, ROWS // 3, 2 * ROWS // 3):
        batch.add([row(k) for k in range(start, start + ROWS // 3)])
        batch.step()
    return batch


@pytest.mark.parametrize(
    ("guidance", "learned", "most"),
    [(UNGUIDED, False, 40), (GUIDED, False, 40), (UNGUIDED, True, 40), (replace(GUIDED, rescale=0.7), False, 45)],
    ids=["unguided", "guided", "learned", "rescaled"],
)
def test_a_step_has_few_operations_beside_the_network(guidance: Guidance, learned: bool, most: int) -> None:
    """Times, noise levels and tables of all steps are computed when a row joins. They had taken 96, 110, 78 and 115."""
    counting = Counting()
    batch = batch_of_rows(counting.network, guidance, learned)
    with counting:
        advance = batch.step()
    assert len(advance.travelling) == ROWS
    assert sum(counting.operations.values()) <= most, counting.operations
    assert "aten._local_scalar_dense.default" not in counting.operations


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("euler", 0.0)])
@pytest.mark.parametrize("guidance_type", ["uncond", "classifier-free"])
def test_a_step_waits_for_no_number_of_the_device(sampler: str, eta: float, guidance_type: GuidanceType) -> None:
    """The device `meta` has no numbers: reading one there, or copying a tensor from there, raises an error."""
    guidance = Guidance(guidance_type, 2.0)
    batch = batch_of_rows(lambda x, *_: torch.zeros_like(x), guidance, False, sampler, eta, "meta")
    advance = batch.step()
    assert [travelling.step for travelling in advance.travelling[:: ROWS // 3]] == [4, 3, 2]
    assert not advance.failed
    with pytest.raises((RuntimeError, NotImplementedError)):
        advance.x0.cpu()


def test_a_learned_solvers_step_waits_for_no_number_of_the_device() -> None:
    batch = batch_of_rows(lambda x, *_: torch.zeros_like(x), GUIDED, True, device="meta")
    assert not batch.step().failed
