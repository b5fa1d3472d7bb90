"""The batches of a worker: what is too large for one, and what breaks in one, stops nothing else."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from service.registry.database import Registry
from service.registry.tables import JobState
from tests.worker.in_process import InProcess
from timetuner_core.sampling.generate import Guidance

BATCH = 8


@pytest.fixture
def worker(registry: Registry, tmp_path: Path) -> Iterator[InProcess]:
    worker = InProcess(tmp_path, registry, sample_batch_size=BATCH, same_bits=True, max_attempts=3)
    yield worker
    worker.close()


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"], ids=["each at its own step", "all together"])
def test_a_job_larger_than_the_batch_is_made_in_portions_and_holds_up_nothing(worker: InProcess, sampler: str) -> None:
    model = worker.model("mixture-ring")
    large = worker.submit(model, num_images=BATCH + 4, seed=10, sampler=sampler)
    behind = [worker.submit(model, seed=seed, sampler=sampler) for seed in (10, 10 + BATCH + 3)]
    rows: list[int] = []
    worker.runtime.load_model(model)
    held = worker.runtime._models[model, torch.float32]
    worker.runtime._models[model, torch.float32] = held.watched(rows.append)
    worker.serve()
    assert [worker.job(job_id).state for job_id in (large, *behind)] == [JobState.SUCCEEDED] * 3
    assert max(rows) <= BATCH
    first, last = (worker.images(job_id)[0] for job_id in behind)
    np.testing.assert_array_equal(worker.images(large)[[0, -1]], [first, last])


class Breaking:
    """A network that raises for batches with a certain label, or that are too large for the memory."""

    def __init__(self, worker: InProcess, model_id: str, most: int = 1000) -> None:
        self.model = worker.runtime.load_model(model_id)
        self.most, self.sizes = most, list[int]()
        worker.runtime._models[model_id, torch.float32] = replace(self.model, network=self)

    def __call__(self, x: Tensor, t_input: Tensor, label: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        if bool((label == POISON).any()):
            raise ValueError("poisoned")
        eps: Tensor = self.model.network(x, t_input, label)
        return eps


POISON = 2
LABELLED = {"guidance_type": "classifier-free", "num_images": 2}


@pytest.mark.parametrize("how", [{"eta": 1}, {"sampler": "dpmpp_2m"}], ids=["each at its own step", "all together"])
def test_a_row_that_breaks_the_network_fails_its_own_job_alone(worker: InProcess, how: dict[str, Any]) -> None:
    model = worker.model("mixture-ring")
    labels = ([0, 1], [1, POISON], [1, 0])

    def sample() -> list[str]:
        jobs = [worker.submit(model, seed=10 * k, class_labels=own, **LABELLED, **how) for k, own in enumerate(labels)]
        worker.serve()
        return jobs

    whole = sample()
    Breaking(worker, model)
    broken = sample()
    assert [worker.job(job_id).state for job_id in broken] == ["succeeded", "failed", "succeeded"]
    assert worker.job(broken[1]).error == "ValueError: poisoned"
    for k in (0, 2):
        np.testing.assert_array_equal(worker.images(broken[k]), worker.images(whole[k]))


@pytest.mark.parametrize("how", [{"eta": 1}, {"sampler": "dpmpp_2m"}], ids=["each at its own step", "all together"])
def test_where_memory_runs_out_smaller_batches_are_used_from_then_on(worker: InProcess, how: dict[str, Any]) -> None:
    model = worker.model("mixture-ring")
    request: dict[str, Any] = {
        "seed": 5,
        "num_images": BATCH,
        "class_labels": [1] * BATCH,
        "guidance_type": "classifier-free",
    }

    def sample() -> str:
        job_id = worker.submit(model, **request, **how)
        worker.serve()
        assert worker.job(job_id).error is None
        return job_id

    enough = sample()
    network = Breaking(worker, model, most=5)
    little, again = sample(), None
    assert network.sizes[:3] == [8, 4, 4]
    network.sizes.clear()
    again = sample()
    assert set(network.sizes) == {4}
    for job_id in (little, again):
        np.testing.assert_array_equal(worker.images(job_id), worker.images(enough))


def test_a_job_that_no_memory_is_enough_for_says_so(worker: InProcess) -> None:
    model = worker.model("mixture-ring")
    job_id = worker.submit(model, **LABELLED, class_labels=[1, 1])
    worker.runtime.batch_sizes(model, Guidance("classifier-free", 1.0), None)
    Breaking(worker, model, most=0)
    worker.serve()
    job = worker.job(job_id)
    assert job.state == JobState.FAILED
    assert "memory does not hold a batch of 1; accepted: a smaller SAMPLE_BATCH_SIZE" in (job.error or "")
