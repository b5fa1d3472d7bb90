"""A worker loads models before they are asked for. Whatever goes wrong with that, it starts."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from service.registry.database import Registry
from service.registry.tables import Base, Model
from service.shared.job_requests import SampleRequest
from tests.worker.in_process import InProcess
from timetuner_core.sampling import cuda_graphs
from worker import metrics
from worker.conversion import guidance_of
from worker.runtime import Runtime


@pytest.fixture
def worker(registry: Registry, tmp_path: Path) -> Iterator[InProcess]:
    worker = InProcess(tmp_path, registry, warm_models=2)
    yield worker
    worker.close()


@pytest.fixture
def ring(worker: InProcess) -> str:
    """A model that was sampled."""
    model_id = worker.model("mixture-ring")
    worker.submit(model_id)
    worker.serve()
    worker.runtime._models.clear()
    return model_id


def test_a_model_whose_last_use_succeeded_is_loaded(worker: InProcess, ring: str) -> None:
    broken = worker.model("no such model")
    job_id = worker.submit(broken)
    worker.serve()
    assert worker.job(job_id).state == "failed"
    loaded: list[str] = []
    load = worker.runtime._load
    worker.runtime._load = lambda model_id, dtype: loaded.append(model_id) or load(model_id, dtype)  # type: ignore
    worker.runtime.warm_up()
    assert loaded == worker.runtime.models_held() == [ring]
    assert not worker.bus.marks


class Loaded:
    """A model that refers to itself, as pipelines do."""

    num_bytes = 60

    def __init__(self) -> None:
        self.itself = self


def test_a_model_that_has_to_go_is_freed_before_another_one_takes_memory(worker: InProcess) -> None:
    runtime = worker.runtime
    ids = [worker.model("mixture-ring"), worker.model("mixture-gratings")]
    with worker.registry.write() as session:
        for id in ids:
            row = session.get_one(Model, id)
            row.spec = row.spec | {"num_bytes": Loaded.num_bytes}
    runtime.settings.max_model_bytes = 100
    loaded: list[weakref.ref[Loaded]] = []

    def load(model_id: str, dtype: torch.dtype) -> Loaded:
        assert [reference() for reference in loaded] == [None] * len(loaded)
        loaded.append(weakref.ref(model := Loaded()))
        return model

    runtime._load = load  # type: ignore
    for id in ids:
        runtime.load(id)
    assert runtime.models_held() == ids[1:]


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_model_that_ended_a_worker_when_it_was_loaded_does_not_end_the_next_one(
    worker: InProcess, ring: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(model_id: str, dtype: torch.dtype) -> None:
        raise Killed(model_id)

    monkeypatch.setattr(worker.runtime, "_load", kill)
    with pytest.raises(Killed):
        worker.runtime.warm_up()
    worker.runtime.warm_up()
    assert worker.runtime.models_held() == []


def test_a_worker_starts_though_the_database_cannot_be_read(worker: InProcess, registry: Registry) -> None:
    Base.metadata.drop_all(registry.engine)
    worker.runtime.warm_up()
    assert worker.runtime.models_held() == []


def test_where_there_are_cuda_graphs_sampling_repeats_them_and_each_call_is_counted(
    worker: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorder that calls the network again stands for the device's."""
    repeated = 0

    def record(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def repeat() -> Tensor:
            nonlocal repeated
            repeated += 1
            return call()

        return repeat

    worker.settings.sample_batch_size = 4
    model = worker.model("digits8")
    plain = worker.submit(model, num_images=3, seed=5)
    worker.serve()
    monkeypatch.setattr(Runtime, "_records_graphs", True)
    monkeypatch.setattr(cuda_graphs, "_Recorder", lambda: record)
    again = InProcess(Path(worker.settings.timetuner_home), worker.registry, sample_batch_size=4)
    job = again.submit(model, num_images=3, seed=5)
    again.runtime.batch_sizes(model, guidance_of(SampleRequest(model=model, num_steps=3)), None)
    before, counter = repeated, metrics.NETWORK_EVALUATIONS.labels(model)
    counted = counter._value.get()
    again.serve()
    assert repeated == before + 3  # One call a step, of recorded shapes.
    assert counter._value.get() == counted + 9
    np.testing.assert_allclose(again.images(job), worker.images(plain), atol=1e-5)
    again.close()
