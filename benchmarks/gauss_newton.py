"""The savings of Gauss-Newton over the published procedure: time, memory, and cost in the number of steps.

    python benchmarks/gauss_newton.py time --model digits8        # 5 paired runs; about 20 minutes
    python benchmarks/gauss_newton.py memory
    python benchmarks/gauss_newton.py steps

One thread, so that the figures do not depend on the number of cores. `time`, in seconds of one core: for each seed,
Adam as published (500 iterations per step at 2e-3, all steps in one batch) and Gauss-Newton, on the same batches; the
objective on data and noise that neither has seen, its evaluation not timed; how much sooner Gauss-Newton is at or
below Adam's last value.
`memory`: the peak of sequential tuning by each, against that of sampling as many samples.
`steps`: time of sequential tuning, and the samples it puts through the network, with as many batches per step as the
tuner takes at most.
"""

import argparse
import dataclasses
import statistics
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timetuner_core.grids import make_timesteps
from timetuner_core.models.loading import DiffusionModel, load_builtin
from timetuner_core.samplers import get_sampler, sample
from timetuner_core.tuners import Optimizer, TuneType
from timetuner_core.tuning.draws import draw_batch
from timetuner_core.tuning.objectives import next_eps_residual
from timetuner_core.tuning.per_step import losses_of, tune_per_step
from timetuner_core.tuning.problem import TuningProblem, TuningState

MODELS = ("digits8", "digits32-ldm")
NUM_STEPS = 10
BATCH_SIZE = 16
HELD_OUT = 512  # per step
BATCHES = 64  # the tuner's own limit
TOLERANCE = 1e-3  # half the default: Adam's 8,000 samples per step are worth as much


def problem_of(
    model: str | DiffusionModel, num_steps: int, seed: int, batch_size: int = BATCH_SIZE, data_seed: int = 0
) -> TuningProblem:
    """DDIM on the model's default grid, without guidance, and 1,024 of its data."""
    if isinstance(model, str):
        model = load_builtin(model)
    model_fn = model.model_fn("uncond", 1.0)
    assert model.draw_data is not None
    x0, _ = model.draw_data(1024, torch.Generator().manual_seed(data_seed))
    step_fn = get_sampler("ddim").step_fn(model_fn, model.noise_schedule)
    timesteps = make_timesteps(model.noise_schedule, num_steps)
    return TuningProblem(model_fn, model.noise_schedule, step_fn, timesteps, x0, batch_size=batch_size, seed=seed)


class HeldOut:
    """The published objective, summed over the steps, on draws that no tuner has seen."""

    def __init__(self, name: str) -> None:
        problem = problem_of(name, NUM_STEPS, seed=10_000, batch_size=128, data_seed=1)
        self.steps = list(range(NUM_STEPS - 1))
        iterations = range(HELD_OUT // 128)
        self.batches = [draw_batch(problem, [(i, k) for i in self.steps], None) for k in iterations]
        self.residuals = [next_eps_residual(batch) for batch in self.batches]

    @torch.no_grad()
    def __call__(self, t_ratios: Tensor) -> float:
        drawn = zip(self.batches, self.residuals, strict=True)
        losses = [float(losses_of(batch, residual, t_ratios[self.steps]).sum()) for batch, residual in drawn]
        return sum(losses) / len(losses)


def tune(problem: TuningProblem, optimizer: Optimizer, tune_type: TuneType = "parallel") -> Iterator[TuningState]:
    state = TuningState.start(problem.timesteps)
    return tune_per_step(problem, state, "next_eps", tune_type, optimizer, tolerance=TOLERANCE)


def compare_times(name: str, seeds: int) -> None:
    """A table of paired runs."""
    held_out = HeldOut(name)
    print(f"**{name}**, objective untuned {held_out(torch.ones(NUM_STEPS, dtype=torch.float64)):.4f}\n")
    print("| seed | Adam: s | objective | Gauss-Newton: s to reach it | s to its own end | its objective | ratio |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    ratios = []
    for seed in range(seeds):
        problem = problem_of(name, NUM_STEPS, seed)
        trace, started = [], time.process_time()
        for state in tune(problem, "gauss_newton"):
            trace.append((time.process_time() - started, state.t_ratios.clone()))
        started = time.process_time()
        *_, by_adam = tune(problem, "adam")
        adam_seconds = time.process_time() - started
        target = held_out(by_adam.t_ratios)
        reached = next((seconds for seconds, t_ratios in trace[3:] if held_out(t_ratios) <= target), float("nan"))
        ratios.append(adam_seconds / reached)
        print(
            f"| {seed} | {adam_seconds:.1f} | {target:.4f} | {reached:.2f} | {trace[-1][0]:.2f} | "
            f"{held_out(trace[-1][1]):.4f} | {ratios[-1]:.0f} |",
            flush=True,
        )
    print(f"\nratio: median {statistics.median(ratios):.0f}, least {min(ratios):.0f}\n", flush=True)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at once, as torch's operators return them: exact, where
    the process's resident memory also shows what its allocator keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.held:
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.held.values()))
        return result


def compare_memory(name: str, batch_size: int) -> None:
    """Peak memory beside the weights and the population."""
    print(f"**{name}**, batch {batch_size}\n")
    print("| | peak, MB | of sampling's |")
    print("| --- | ---: | ---: |")
    problem = problem_of(name, NUM_STEPS, seed=0, batch_size=batch_size)
    x = torch.randn((batch_size, *problem.population.shape[1:]), generator=torch.Generator().manual_seed(0))
    sampling = None
    for what in ("sampling", "gauss_newton", "adam"):
        with PeakMemory() as memory:
            if what == "sampling":
                with torch.no_grad():
                    sample(problem.step_fn, x, problem.timesteps, torch.ones(NUM_STEPS, dtype=torch.float64))
            else:
                optimizer: Optimizer = "adam" if what == "adam" else "gauss_newton"
                state = TuningState.start(problem.timesteps)
                for _ in tune_per_step(problem, state, "next_eps", "sequential", optimizer, total_iters=3):
                    pass
        sampling = sampling or memory.peak
        print(f"| {what} | {memory.peak / 2**20:.2f} | {memory.peak / sampling:.2f} |", flush=True)
    print()


def compare_steps(name: str) -> None:
    """Sequential tuning, a fixed number of batches per step, in 5 to 40 steps."""
    print(f"**{name}**, sequential, Gauss-Newton, {BATCHES} batches per step\n")
    print("| steps | samples through the network | of half as many steps | s | of half as many steps |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    costs: list[tuple[int, float]] = []
    for num_steps in (5, 10, 20, 40):
        rows: list[int] = []
        problem = problem_of(counting(load_builtin(name), rows), num_steps, seed=0)
        state = TuningState.start(problem.timesteps)
        started = time.process_time()
        for _ in tune_per_step(problem, state, "next_eps", "sequential", tolerance=1e-9, total_iters=BATCHES):
            pass
        costs.append((sum(rows), time.process_time() - started))
        calls, seconds = costs[-1]
        by_calls, by_seconds = ("", "")
        if len(costs) > 1:
            by_calls, by_seconds = (f"{now / before:.2f}" for before, now in zip(*costs[-2:], strict=True))
        print(f"| {num_steps} | {calls} | {by_calls} | {seconds:.1f} | {by_seconds} |", flush=True)
    print()


def counting(model: DiffusionModel, rows: list[int]) -> DiffusionModel:
    """The model, its network noting how many rows each call has."""
    network = model.network

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(len(x))
        return network(x, *args, **kwargs)

    return dataclasses.replace(model, network=counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", choices=("time", "memory", "steps"))
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.model:
        if args.figure == "time":
            compare_times(name, args.seeds)
        elif args.figure == "memory":
            compare_memory(name, args.batch_size)
        else:
            compare_steps(name)


if __name__ == "__main__":
    main()
