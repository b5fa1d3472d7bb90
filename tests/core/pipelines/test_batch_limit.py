"""How many rows a shared call of a pipeline's network has at most."""

from collections.abc import Callable

import pytest
import torch

from tests.core.pipelines.run import one_thread
from tests.core.pipelines.test_shared_calls import alone, assert_all_close, by_name, request
from timetuner_core.pipelines.batch_limit import BatchLimit
from timetuner_core.pipelines.shared_calls import SharedCalls

pytestmark = pytest.mark.xdist_group("pipelines")


def found(seconds_of: Callable[[int], float], offered: int = 64) -> int:
    """The limit after calls of as many rows as it allows, or as are offered."""
    limit = BatchLimit(4, 32, max_seconds=1.0)
    for _ in range(100):
        rows = min(limit.rows, offered)
        limit.note(rows, seconds_of(rows))
    return limit.rows


def test_the_limit_grows_while_more_rows_pay() -> None:
    assert found(lambda rows: 0.1) == 32
    assert found(lambda rows: 0.1 * rows) == 4
    assert found(lambda rows: 0.1 if rows <= 8 else 0.1 * rows) == 8


def test_a_call_of_a_larger_limit_keeps_below_the_given_seconds() -> None:
    assert found(lambda rows: 0.3 + 0.05 * rows) == 8
    assert found(lambda rows: 2.0 + 0.01 * rows) == 4


def test_calls_with_few_rows_do_not_decide() -> None:
    assert found(lambda rows: 0.1 * rows, offered=2) == 4
    assert found(lambda rows: 0.1, offered=5) == 8


def test_a_disturbed_call_does_not_end_the_search() -> None:
    calls = iter(range(1000))
    assert found(lambda rows: 0.9 if next(calls) % 2 else 0.1) == 32


def test_runs_whose_larger_call_memory_does_not_hold_succeed_and_later_calls_are_smaller() -> None:
    kind = by_name("sd15")
    pipeline = kind.build()
    rows_of_calls: list[int] = []

    def refuse_large(_network: object, args: tuple[torch.Tensor, ...]) -> None:
        rows_of_calls.append(len(args[0]))
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError

    with one_thread():
        expected = [alone(pipeline, request(pipeline, kind, 12, seed)) for seed in range(3)]
        handle = pipeline.unet.register_forward_pre_hook(refuse_large)
        shared = SharedCalls(pipeline, max_batch=4, largest_batch=8, max_seconds=60.0)
        assert_all_close(shared.run([request(pipeline, kind, 12, seed) for seed in range(3)]), expected)
    handle.remove()  # Pipelines of a kind share their networks.
    assert rows_of_calls.count(6) == 1, "memory was tried once"
    assert max(rows_of_calls[rows_of_calls.index(6) + 1 :]) <= 4
