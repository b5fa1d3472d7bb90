"""A worker that can write no more files, as when the disk is full, and what becomes of its jobs."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.stack import Json, Stack, wait_until

# Long enough for room to end in the middle.
LONG: Json = {
    "tuner": {"total_iters": 120, "start": "given", "population_size": 16, "teacher_num_steps": 10},
    "evaluation": {"num_samples": 16, "max_num_samples": 16, "teacher_num_steps": 10},
}


@contextmanager
def no_room(stack: Stack) -> Iterator[None]:
    """Let each write of the worker to a file fail that would make the file larger."""
    pid = stack.processes["worker"].pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def sample(stack: Stack, model: str, seed: int) -> Json:
    request = {"model": model, "num_steps": 2, "seed": seed}
    answer = stack.client.post("/v1/samples", json=request, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    job: Json = answer.json()
    return job


@pytest.mark.both_engines
def test_samples_that_cannot_be_stored_say_so_or_wait_and_leave_nothing_behind(fragile: Stack, gratings: str) -> None:
    assert fragile.finished(sample(fragile, gratings, 0), "samples")["state"] == "succeeded"
    files = fragile.files()
    with no_room(fragile):
        job = sample(fragile, gratings, 1)
        if not fragile.registry.is_sqlite:  # The server of PostgreSQL has room.
            failed = fragile.finished(job, "samples")
            assert failed["state"] == "failed"
            assert failed["error"].startswith("the images could not be stored: ")
        assert fragile.files() == files
    if fragile.registry.is_sqlite:  # SQLite could not store it either.
        assert fragile.finished(job, "samples")["state"] == "succeeded"
    assert fragile.finished(sample(fragile, gratings, 2), "samples")["state"] == "succeeded"


@pytest.mark.both_engines
def test_a_tuning_job_that_cannot_be_saved_goes_on_when_there_is_room(fragile: Stack, gratings: str) -> None:
    job = fragile.submit(gratings, num_steps=4, seed=5, **LONG)
    fragile.running(job)

    def is_taken_back() -> bool:
        state: str = fragile.client.get(f"/v1/tuning-jobs/{job['id']}").json()["state"]
        return state == "queued"

    with no_room(fragile):
        if fragile.registry.is_sqlite:  # else the server has room
            wait_until(is_taken_back, "end of the lease")
    done = fragile.finished(job)
    assert (done["state"], done["error"]) == ("succeeded", None)
    assert done["attempt"] == (2 if fragile.registry.is_sqlite else 1)
