"""The batches of a worker: what is too large for one, and what breaks in one, stops nothing else."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.registry.database import Registry
from service.registry.tables import JobState
from tests.worker.in_process import InProcess

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
    held = worker.runtime._models[model]
    worker.runtime._models[model] = held.watched(rows.append)
    worker.serve()
    assert [worker.job(job_id).state for job_id in (large, *behind)] == [JobState.SUCCEEDED] * 3
    assert max(rows) <= BATCH
    first, last = (worker.images(job_id)[0] for job_id in behind)
    np.testing.assert_array_equal(worker.images(large)[[0, -1]], [first, last])
