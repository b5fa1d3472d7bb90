"""CUDA graphs of a network: its kernels are recorded once for each shape of inputs, and started together from then on.

Starting kernels one by one takes most of a small network's time on a GPU.
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MAX_GRAPHS = 32  # Each graph keeps inputs, outputs and some memory of its own. Other shapes are called as ever.
CALLS_BEFORE = 3  # The first calls choose kernels and allocate workspaces, which a graph may not do.
MAX_DIFFERENCE = 0.01  # A graph's answer may differ from the network's by so much of its norm.

logger = logging.getLogger(__name__)

# Records a call without arguments. What it returns repeats the kernels, and gives the tensor that they write.
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class CudaGraphs:
    """A network `(x (B, ...), t_input (B,), condition)`, whose calls repeat a graph where one was recorded.

    It calls the network itself, but for calls within `replaying` or `recording`. Those are without gradients, and their
    inputs are plain tensors of the device, which tuning's need not be.
    """

    def __init__(self, network: Callable[..., Tensor], record: Record | None = None) -> None:
        """Nothing is recorded yet. Args: record: a stand-in for the device, in tests."""
        self._network = network
        self._record = record or _Recorder()
        self._graphs: dict[Hashable, Callable[[Sequence[Tensor]], Tensor]] = {}
        self._replays = self._records = self._is_off = False

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """A context in which calls of recorded shapes repeat their graphs."""
        before, self._replays = self._replays, True
        try:
            yield
        finally:
            self._replays = before

    @contextmanager
    def recording(self) -> Iterator[None]:
        """As `replaying`. Calls of other shapes are recorded, up to `MAX_GRAPHS`."""
        before, self._records = self._records, True
        try:
            with self.replaying():
                yield
        finally:
            self._records = before

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def __call__(self, x: Tensor, t_input: Tensor, condition: Tensor | None = None) -> Tensor:
        inputs = [x, t_input] if condition is None else [x, t_input, condition]
        if not self._replays or torch.is_grad_enabled():
            return self._network(*inputs)
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        if key not in self._graphs and self._records and not self._is_off and len(self._graphs) < MAX_GRAPHS:
            self._add(key, inputs)
        graph = self._graphs.get(key)
        return self._network(*inputs) if graph is None else graph(inputs)

    def _add(self, key: Hashable, inputs: Sequence[Tensor]) -> None:
        """Record a graph. If that fails, no more are recorded; if it computes something else, there are none at all."""
        try:
            graph = self._recorded(inputs)
            others = _other_values(inputs)
            found, expected = graph(others), self._network(*others)
            is_same = bool((found - expected).norm() <= MAX_DIFFERENCE * expected.norm())
        except Exception as error:  # A network may do what no graph can, such as look at a value.
            logger.warning("no more CUDA graphs are recorded, and other shapes are called without: %s", error)
            self._is_off = True
            return
        if is_same:
            self._graphs[key] = graph
        else:
            logger.warning("a CUDA graph computes something else than its network, which is called without any")
            self._graphs.clear()
            self._is_off = True

    def _recorded(self, inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
        static = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
        repeat = self._record(lambda: self._network(*static))

        def graph(values: Sequence[Tensor]) -> Tensor:
            for place, value in zip(static, values, strict=True):
                place.copy_(value)
            return repeat().clone()  # The next call writes to the same tensor.

        return graph


def _other_values(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs of the same shapes, with other values: what a graph took for a constant is found by them."""
    x, t_input, *conditions = inputs
    return [0.5 * x, 0.75 * t_input, *(condition.flip(0) for condition in conditions)]


class _Recorder:
    """Records on the CUDA device at hand. All graphs of a network share their memory, as one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(CALLS_BEFORE):
                call()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = call()

        def repeat() -> Tensor:
            graph.replay()
            return output

        return repeat
