"""How many rows a step has at most, for networks whose costs are known."""

from collections.abc import Callable

import pytest

from timetuner_core.sampling.batch_size import useful_size


def memory_for_ten(size: int) -> float:
    if size > 10:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    return 0.01


@pytest.mark.parametrize(
    ("seconds_of", "size"),
    [
        (lambda size: 0.011, 256),  # A GPU that takes as long for any batch: the largest that there is.
        (lambda size: 0.010 * size, 1),  # No row is cheaper beside others, so nobody waits for others.
        (lambda size: 0.003 + 0.001 * size, 48),  # 96 rows would gain 3 %.
        (lambda size: 0.1 + 0.01 * size, 12),  # 16 rows would take 0.26 s.
        (lambda size: 5.0, 1),  # A single row is sampled however long it takes.
        (memory_for_ten, 8),
        (lambda size: 0.005 + 0.002 * size + (0.1 if size == 4 else 0.0), 48),  # One size was disturbed.
    ],
    ids=["launches", "rows", "both", "a bound on a step", "large", "memory", "disturbed"],
)
def test_a_batch_grows_while_that_pays_and_nobody_waits_long(seconds_of: Callable[[int], float], size: int) -> None:
    assert useful_size(seconds_of, 0.25) == size


def test_a_network_that_fails_is_no_lack_of_memory() -> None:
    def failing(size: int) -> float:
        raise ValueError("poisoned")

    with pytest.raises(ValueError, match="poisoned"):
        useful_size(failing, 0.25)
