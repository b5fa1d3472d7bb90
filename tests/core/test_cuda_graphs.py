"""Calls of a network that repeat a recorded graph, by a stand-in for the device; on a GPU, they are equal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timetuner_core.models.loading import load_builtin
from timetuner_core.sampling import cuda_graphs
from timetuner_core.sampling.batch_size import call_at_sizes
from timetuner_core.sampling.cuda_graphs import CudaGraphs


class Recorder:
    """Repeats a call by making it again. As a graph does, it writes to one tensor each time."""

    def __init__(self) -> None:
        self.recorded = self.repeated = 0

    def __call__(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        output = call()

        def repeat() -> Tensor:
            self.repeated += 1
            return output.copy_(call())

        return repeat


def network(x: Tensor, t_input: Tensor, condition: Tensor | None = None) -> Tensor:
    shift = 0.0 if condition is None else condition.float()[:, None]
    return x * t_input[:, None] + shift


def inputs(rows: int, *, seed: int = 0, conditional: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(rows, 3, generator=generator), torch.rand(rows, generator=generator)
    return (x, t, torch.arange(rows)) if conditional else (x, t)


@torch.no_grad()
def test_shapes_that_were_recorded_repeat_their_graphs_and_others_call_the_network() -> None:
    recorder = Recorder()
    graphs = CudaGraphs(network, recorder)
    with graphs.recording():
        for rows in (4, 2):
            graphs(*inputs(rows))
            graphs(*inputs(rows, conditional=True))
    assert (recorder.recorded, graphs.num_graphs) == (4, 4)
    with graphs.replaying():
        before = recorder.repeated
        first, second = graphs(*inputs(4, seed=1)), graphs(*inputs(4, seed=2))
        guided = graphs(*inputs(2, seed=3, conditional=True))
        assert recorder.repeated == before + 3
        # A graph writes to one tensor each time, and nobody's answer changes by that.
        torch.testing.assert_close(first, network(*inputs(4, seed=1)))
        torch.testing.assert_close(second, network(*inputs(4, seed=2)))
        torch.testing.assert_close(guided, network(*inputs(2, seed=3, conditional=True)))
        for others in (inputs(3), tuple(value.double() for value in inputs(4))):
            torch.testing.assert_close(graphs(*others), network(*others))
    graphs(*inputs(4))
    with torch.enable_grad(), graphs.replaying():
        graphs(*inputs(4))
    assert (recorder.recorded, recorder.repeated) == (4, before + 3)


@torch.no_grad()
def test_no_more_graphs_are_recorded_than_there_is_memory_set_aside_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    recorder = Recorder()
    graphs = CudaGraphs(network, recorder)
    with graphs.recording():
        for rows in (4, 3, 2, 1):
            torch.testing.assert_close(graphs(*inputs(rows)), network(*inputs(rows)))
    assert (recorder.recorded, graphs.num_graphs) == (2, 2)


def refusing(_call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing")


def stale(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    output = call()
    return lambda: (
        output
    )  # A recorded network that computes with numbers of the processor repeats its old answer, as here.


@pytest.mark.parametrize(("record", "why"), [(refusing, "not permitted"), (stale, "computes something else")])
@torch.no_grad()
def test_a_network_that_no_graph_can_repeat_is_called_and_the_log_says_so(
    record: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = CudaGraphs(network, record)
    with graphs.recording():
        for rows in (2, 3):
            torch.testing.assert_close(graphs(*inputs(rows)), network(*inputs(rows)))
    assert graphs.num_graphs == 0
    (message,) = caplog.messages
    assert why in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_on_a_gpu_the_graphs_of_a_network_are_equal_to_it_up_to_rounding(dtype: torch.dtype) -> None:
    from dataclasses import replace

    model = load_builtin("digits8", "cuda", dtype=dtype)
    graphs = CudaGraphs(model.network)
    with graphs.recording():
        call_at_sizes(replace(model, network=graphs), "classifier-free", "cuda", (8, 3, 1))
    assert graphs.num_graphs >= 3
    x = torch.randn(6, *model.sample_shape, device="cuda")  # Three guided rows take six of the network's.
    given = x, torch.full((6,), 500.0, device="cuda"), torch.arange(6, device="cuda")
    with graphs.replaying():
        torch.testing.assert_close(graphs(*given), model.network(*given), rtol=1e-2, atol=1e-2)
