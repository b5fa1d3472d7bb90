"""Work beside the network's step: jobs are claimed for the next one, and results are stored."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from sqlalchemy.exc import OperationalError
from torch import Tensor

from service.registry.database import Registry
from service.registry.tables import JobState
from tests.stack import wait_until
from tests.worker.in_process import IDLE_SECONDS, InProcess
from worker.claiming import Claimer, Taken
from worker.sampling import SampleServer


@pytest.fixture
def worker(registry: Registry, tmp_path: Path) -> Iterator[InProcess]:
    worker = InProcess(tmp_path, registry, sample_batch_size=8)
    yield worker
    worker.close()


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The jobs that were claimed, and handed to the thread that samples. Their state changes a moment before."""
    ids: list[str] = []
    put = Claimer._put

    def noted(self: Claimer, taken: Taken | None = None, error: Exception | None = None) -> None:
        put(self, taken, error)
        ids.extend(claim.job_id for claim in (taken.claims if taken else ()))

    monkeypatch.setattr(Claimer, "_put", noted)
    return ids


class Watched:
    """A network that does something during some of its calls, counted from 1, and notes the rows of each."""

    def __init__(self, worker: InProcess, model_id: str, during: dict[int, Callable[[], object]]) -> None:
        model = worker.runtime.load_model(model_id)
        self._network, self._during = model.network, during
        self.rows: list[int] = []
        worker.runtime._models[model_id, torch.float32] = replace(model, network=self)

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        self.rows.append(len(x))
        self._during.get(len(self.rows), lambda: None)()
        eps: Tensor = self._network(x, *others)
        return eps


def test_a_job_that_comes_during_a_step_is_in_the_next_one(worker: InProcess, handed_over: list[str]) -> None:
    model = worker.model("mixture-ring")
    submitted: list[str] = []

    def submit() -> None:
        """The step does not end before the job is claimed: a worker that claims between steps would never go on."""
        submitted.append(worker.submit(model, seed=len(submitted), num_steps=3))
        worker.bus.ring()
        wait_until(lambda: submitted[-1] in handed_over, "claim", seconds=20)

    network = Watched(worker, model, {2: submit, 3: submit})
    submitted.append(worker.submit(model, num_steps=5))
    worker.serve()
    assert network.rows == [1, 1, 2, 3, 3, 1]
    assert [worker.job(job_id).state for job_id in submitted] == [JobState.SUCCEEDED] * 3


def test_a_seat_is_claimed_for_while_its_last_step_is_made(worker: InProcess, handed_over: list[str]) -> None:
    model = worker.model("mixture-ring")
    first = [worker.submit(model, seed=k, num_images=2, num_steps=2 if k == 0 else 4) for k in range(4)]
    behind = worker.submit(model, seed=9, num_images=2, num_steps=2)

    def claimed() -> None:
        wait_until(lambda: behind in handed_over, "claim", seconds=20)

    network = Watched(worker, model, {2: claimed})
    worker.serve()
    assert network.rows == [8] * 4
    assert [worker.job(job_id).state for job_id in (*first, behind)] == [JobState.SUCCEEDED] * 5


def test_results_that_come_while_others_are_stored_share_a_file(worker: InProcess) -> None:
    model = worker.model("mixture-ring")
    jobs = [worker.submit(model, seed=k, num_steps=1 + k) for k in range(4)]
    stored, put, is_late = [], worker.artifacts.put_arrays, threading.Event()

    def put_arrays(key: str, num_rows: int, arrays: Any) -> None:
        if not stored:
            assert is_late.wait(20)
        stored.append(num_rows)
        put(key, num_rows, arrays)

    worker.artifacts.put_arrays = put_arrays  # type: ignore[method-assign]
    Watched(worker, model, {4: is_late.set})
    worker.serve()
    assert stored[0] == 1
    assert stored in ([1, 3], [1, 2, 1])
    images = np.concatenate([worker.images(job_id) for job_id in jobs])
    alone = [worker.submit(model, seed=k, num_steps=1 + k) for k in range(4)]
    for job_id, image in zip(alone, images, strict=True):
        worker.serve()
        np.testing.assert_allclose(worker.images(job_id)[0], image, rtol=1e-5, atol=1e-6)


def test_where_the_disk_has_no_room_for_all_results_those_that_fit_are_stored(worker: InProcess) -> None:
    model = worker.model("mixture-ring")
    jobs = [worker.submit(model, seed=k, num_images=1 + k, num_steps=1 + k) for k in range(3)]
    put, is_late, tried = worker.artifacts.put_arrays, threading.Event(), list[int]()

    def put_arrays(key: str, num_rows: int, arrays: Any) -> None:
        if not tried:
            assert is_late.wait(20)
        tried.append(num_rows)
        if num_rows > 2:
            raise OSError("No space left on device")
        put(key, num_rows, arrays)

    worker.artifacts.put_arrays = put_arrays  # type: ignore[method-assign]
    Watched(worker, model, {3: lambda: (time.sleep(0.05), is_late.set())})
    worker.serve()
    states = [worker.job(job_id).state for job_id in jobs]
    assert states == [JobState.SUCCEEDED, JobState.SUCCEEDED, JobState.FAILED]
    assert "No space left" in (worker.job(jobs[2]).error or "")


class Claims:
    """A registry with endless jobs of one image. The test lets each claim begin."""

    def __init__(self) -> None:
        self.rooms: list[int] = []
        self.errors: list[Exception] = []

    def __call__(self, room: int, _at_work: frozenset[str]) -> Taken:
        if self.errors:
            raise self.errors.pop()
        self.rooms.append(room)
        job: Any = SimpleNamespace(num_images=1, model_id="mdl")
        return Taken([cast(Any, SimpleNamespace(job=job))] * min(room, 3), {}, [], more=True)


def test_no_seat_is_given_twice(worker: InProcess) -> None:
    claims = Claims()
    with Claimer(claims, worker.bus.subscribe_to_work()) as claimer:
        claimer.offer(4, frozenset())
        wait_until(lambda: claims.rooms == [4], "first claim")
        assert not claimer.wait(20)
        claimer.offer(4, frozenset({"mdl"}))
        wait_until(lambda: claims.rooms == [4, 1], "second claim")
        claimer.offer(4, frozenset({"mdl"}))
        claimer.close()
        assert sum(taken.num_images for taken in claimer.take()) == 4
    assert claims.rooms == [4, 1]
    assert claimer.more


def test_a_claim_that_fails_is_tried_again_with_the_next_offer(worker: InProcess) -> None:
    claims = Claims()
    claims.errors.append(OperationalError("claim", {}, Exception("away")))
    with Claimer(claims, worker.bus.subscribe_to_work()) as claimer:
        claimer.offer(2, frozenset())
        assert not claimer.wait(20)
        with pytest.raises(OperationalError):
            claimer.take()
        assert claimer.take() == []
        claimer.offer(2, frozenset())
        assert not claimer.wait(20)
        assert sum(taken.num_images for taken in claimer.take()) == 2


CLIENTS, NUM_STEPS = 32, 10


def test_of_32_seats_29_are_taken_by_as_many_clients_that_ask_again_at_once(
    registry: Registry, tmp_path: Path, handed_over: list[str]
) -> None:
    """A request is outside the batch for one step: its result is stored and the next request claimed meanwhile.

    A step here takes as long as that does, so that the count depends on no clock. The first requests have 1 to 10
    steps, which spreads the clients over all steps.
    """
    worker = InProcess(tmp_path, registry, sample_batch_size=CLIENTS)
    model = worker.model("mixture-ring")
    asked, told = list[str](), worker.bus.publish_ends

    def ask(num_steps: int = NUM_STEPS) -> None:
        asked.append(worker.submit(model, seed=len(asked), num_steps=num_steps))
        worker.bus.ring()

    def ask_again(ends: Any) -> None:
        told(ends)
        for _ in ends:
            if len(network.rows) < 4 * NUM_STEPS:
                ask()

    server = SampleServer(worker.runtime, IDLE_SECONDS)

    def quiet() -> bool:
        return not server._results.is_busy and set(asked) <= set(handed_over)

    worker.bus.publish_ends = ask_again  # type: ignore[method-assign]
    steps = range(1, 5 * NUM_STEPS)
    network = Watched(worker, model, dict.fromkeys(steps, lambda: wait_until(quiet, "claims", seconds=20)))
    for k in range(CLIENTS):
        ask(1 + k % NUM_STEPS)
    server.serve()
    worker.close()
    steady = network.rows[NUM_STEPS : 4 * NUM_STEPS]
    assert sum(steady) / len(steady) >= 29
