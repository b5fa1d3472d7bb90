"""Samples of many requests at once, by real processes: the same bits in any company, whatever dies meanwhile."""

import base64
import io
import json
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sqlalchemy import select
from torch import Tensor

from service.registry.tables import JobState, SampleJob
from tests.conftest import MakeDatabaseUrl
from tests.service.problems import assert_problem
from tests.stack import Json, Stack, wait_until
from timetuner_core.models.loading import load_builtin
from timetuner_core.sampling.generate import Guidance
from timetuner_core.sampling.rolling_batch import RollingBatch, Row
from worker.sampling import Cohort, SampleServer

NPY = "application/x-npy"
GUIDED: Json = {"guidance_type": "classifier-free", "guidance_scale": 2}
FULL = 24  # images, which is what a worker samples at once
LONG: Json = {"num_steps": 600, "num_images": FULL}


@pytest.fixture
def digits(stack: Stack) -> str:
    return stack.register("digits8")


@pytest.fixture
def fragile_digits(fragile: Stack) -> str:
    return fragile.register("digits8")


def post(stack: Stack, accept: str = NPY, **body: Any) -> httpx.Response:
    return stack.client.post("/v1/samples", json=body, headers={"Accept": accept})


def arrays(response: httpx.Response) -> NDArray[np.float32]:
    assert response.status_code == 200, response.text
    array: NDArray[np.float32] = np.load(io.BytesIO(response.content), allow_pickle=False)
    return array


def start(stack: Stack, **body: Any) -> Json:
    """A job that nobody waits for."""
    response = stack.client.post("/v1/samples", json=body, headers={"Prefer": "respond-async"})
    assert response.status_code == 202, response.text
    job: Json = response.json()
    return job


def read(stack: Stack, job: Json) -> Json:
    current: Json = stack.client.get(f"/v1/samples/{job['id']}").json()
    return current


def running(stack: Stack, job: Json) -> None:
    wait_until(lambda: read(stack, job)["state"] == "running", f"start of {job['id']}")


def content(stack: Stack, job: Json) -> NDArray[np.float32]:
    return arrays(stack.client.get(f"/v1/samples/{job['id']}/content", headers={"Accept": NPY}))


def stored(stack: Stack, seed: int) -> SampleJob | None:
    """The job of the newest request with a seed."""
    with stack.registry.read() as session:
        jobs = session.scalars(select(SampleJob).order_by(SampleJob.id.desc())).all()
    return next((job for job in jobs if job.request["seed"] == seed), None)


def test_a_job_whose_images_are_not_finite_fails_and_no_other_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = load_builtin("mixture-ring")

    def network(x: Tensor, t_input: Tensor, label: Tensor) -> Tensor:
        eps: Tensor = mixture.network(x, t_input, label)
        return torch.where((label == 1)[:, None], torch.nan, eps)

    guidance = Guidance("classifier-free", 1.0)
    batch = RollingBatch(replace(mixture, network=network), "ddim", guidance, 0.0, (1, 2, 4))
    timesteps, labels = torch.tensor([1.0, 0.5, 0.0]), {"good": 0, "bad": 1, "fine": 2}
    jobs = {owner: SampleJob(id=owner, num_images=1, num_parts=0) for owner in labels}
    batch.add([Row(x, 7, timesteps, torch.ones(2), condition=torch.tensor(label)) for x, label in labels.items()])
    claims: Any = {owner: SimpleNamespace(job_id=owner, job=job) for owner, job in jobs.items()}
    cohort, server, handed_in = Cohort("key", "mdl", batch, 4, claims), SampleServer(cast(Any, None)), []
    monkeypatch.setattr(server, "_submit", lambda ends, images, leases: handed_in.append((ends, images)))
    for _ in range(2):
        server._hand_in(cohort, batch.step(), cast(Any, None))
    (failed, _), (succeeded, images) = handed_in
    ((_, end),) = failed
    assert (end.job_id, end.state) == ("bad", JobState.FAILED)
    assert "NaN or infinite values, first in the image of seed 7" in end.error
    assert [(end.job_id, end.state, end.artifact_row) for _, end in succeeded] == [
        ("good", JobState.SUCCEEDED, 0),
        ("fine", JobState.SUCCEEDED, 1),
    ]
    assert images.shape == (2, 2)
    assert np.isfinite(images).all()


@pytest.mark.parametrize("how", [{"eta": 1}, {"sampler": "dpmpp_2m"}], ids=["each at its own step", "all together"])
def test_an_image_has_the_same_bits_alone_and_among_many_others(stack: Stack, digits: str, how: Json) -> None:
    request: Json = {"model": digits, "num_steps": 10, **GUIDED, **how}
    alone = arrays(post(stack, **request, seed=7, class_labels=3))[0]

    def sample(k: int) -> httpx.Response:
        if k == 10:
            return post(stack, **request, num_images=5, seed=5, class_labels=[1, 2, 3, 4, 5])
        others: Json = {"guidance_scale": 1.5 + k % 4, "num_steps": 10 if "sampler" in how else 5 + k % 7}
        return post(stack, **request | others, num_images=1 + k % 3, seed=100 + 10 * k, class_labels=k % 10)

    with ThreadPoolExecutor(21) as threads:
        answers = [arrays(response) for response in threads.map(sample, range(21))]
    np.testing.assert_array_equal(answers[10][2], alone)
    assert [len(answer) for answer in answers[:4]] == [1, 2, 3, 1]


def test_a_request_for_more_than_a_worker_samples_at_once_is_joined_in_order(stack: Stack, digits: str) -> None:
    request: Json = {"model": digits, "num_steps": 5, **GUIDED}
    labels = [k % 10 for k in range(FULL + 6)]
    whole = arrays(post(stack, **request, num_images=FULL + 6, seed=50, class_labels=labels))
    middle = arrays(post(stack, **request, num_images=8, seed=50 + FULL - 4, class_labels=labels[FULL - 4 : FULL + 4]))
    assert whole.shape == (FULL + 6, 1, 8, 8)
    np.testing.assert_array_equal(whole[FULL - 4 : FULL + 4], middle)
    assert len(np.unique(whole, axis=0)) == FULL + 6


def test_the_same_request_again_is_answered_from_the_store(stack: Stack, digits: str) -> None:
    request: Json = {"model": digits, "num_steps": 5, "seed": 60}
    first, again = post(stack, **request), post(stack, **request)
    assert again.content == first.content
    assert again.headers["etag"] == first.headers["etag"]
    jobs = [stack.client.get(answer.headers["content-location"].removesuffix("/content")) for answer in (first, again)]
    assert [job.json()["started_at"] is None for job in jobs] == [False, True]
    assert post(stack, "image/png", **request).headers["etag"] != first.headers["etag"]
    assert post(stack, **request | {"seed": 61}).headers["etag"] != first.headers["etag"]


@pytest.mark.parametrize(
    ("known", "status"), [("{}", 304), ('"another", {}', 304), ("W/{}", 304), ("*", 304), ('"another"', 200)]
)
def test_content_that_the_client_has_is_not_sent_again(stack: Stack, digits: str, known: str, status: int) -> None:
    first = post(stack, model=digits, num_steps=5, seed=62)
    headers = {"Accept": NPY, "If-None-Match": known.format(first.headers["etag"])}
    answer = stack.client.get(first.headers["content-location"], headers=headers)
    assert (answer.status_code, answer.headers["etag"]) == (status, first.headers["etag"])
    assert answer.content == (b"" if status == 304 else first.content)


def events(stack: Stack, job: Json) -> Iterator[tuple[str, Json]]:
    """The events of a job's stream, to its end."""
    with stack.client.stream("GET", f"/v1/samples/{job['id']}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        event = ""
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                event = value
            if name == "data":
                yield event, json.loads(value)


@pytest.mark.parametrize("previews", [True, False])
def test_a_jobs_steps_can_be_followed_and_seen(stack: Stack, digits: str, previews: bool) -> None:
    job = start(stack, model=digits, num_steps=300, num_images=4, seed=63 + previews, previews=previews)
    (first, state), *told, (last, end) = events(stack, job)
    assert (first, state["id"]) == ("state", job["id"])
    assert (last, end["id"], end["state"]) == ("end", job["id"], "succeeded")
    assert {event for event, _ in told} == {"step"}
    steps = [data["step"] for _, data in told]
    assert steps == list(range(steps[0], 301))
    assert {data["num_steps"] for _, data in told} == {300}
    for _, data in told[:: len(told) // 3]:
        if not previews:
            assert data["preview"] is None
            continue
        sheet = Image.open(io.BytesIO(base64.b64decode(data["preview"])))
        assert (sheet.format, sheet.size) == ("PNG", (2 * 64 + 2, 2 * 64 + 2))
    assert [event for event, _ in events(stack, job)] == ["state", "end"]


def test_a_client_that_hangs_up_cancels_its_job(stack: Stack, digits: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        stack.client.post("/v1/samples", json={"model": digits, **LONG, "seed": 67}, timeout=1)

    def over() -> SampleJob | None:
        job = stored(stack, 67)
        return job if job is not None and job.finished_at else None

    job = wait_until(over, "end of what nobody waits for")
    assert (job.state, job.artifact) == (JobState.CANCELLED, None)


def test_a_request_that_no_worker_is_free_for_by_its_deadline_is_dropped(stack: Stack, digits: str) -> None:
    busy = start(stack, model=digits, **LONG, seed=68)
    running(stack, busy)
    answer = post(stack, model=digits, num_steps=5, seed=69, deadline_seconds=0.3)
    assert_problem(answer, 504, accepted="dropped: no worker was free before its deadline")
    job = stored(stack, 69)
    assert job is not None
    assert (job.state, job.started_at, job.attempt) == (JobState.FAILED, None, 0)
    assert stack.finished(busy, "samples")["state"] == "succeeded"
    assert len(arrays(post(stack, model=digits, num_steps=5, seed=69, deadline_seconds=60))) == 1


def test_samples_whose_worker_is_killed_are_finished_by_another_with_the_same_bits(
    fragile: Stack, fragile_digits: str
) -> None:
    request: Json = {"model": fragile_digits, "eta": 1, "num_steps": 150}
    job = start(fragile, **request, num_images=FULL, seed=70)
    running(fragile, job)
    fragile.end("worker", number=signal.SIGKILL)
    assert read(fragile, job)["state"] == "running"  # Nobody knows better.
    fragile.start("worker")
    done = fragile.finished(job, "samples")
    assert (done["state"], done["progress"]) == ("succeeded", 1.0)
    with fragile.registry.read() as session:
        assert session.get_one(SampleJob, job["id"]).attempt == 2
    undisturbed = arrays(post(fragile, **request, num_images=3, seed=75))
    np.testing.assert_array_equal(content(fragile, job)[5:8], undisturbed)


def test_a_worker_that_is_stopped_finishes_what_it_has_and_leaves_the_rest(fragile: Stack, fragile_digits: str) -> None:
    begun = start(fragile, model=fragile_digits, num_steps=300, num_images=FULL, seed=80)
    running(fragile, begun)
    waiting = start(fragile, model=fragile_digits, num_steps=5, num_images=FULL, seed=81)
    fragile.end("worker")
    assert read(fragile, begun)["state"] == "succeeded"
    left = read(fragile, waiting)
    assert (left["state"], left["started_at"]) == ("queued", None)
    fragile.start("worker")
    assert fragile.finished(waiting, "samples")["state"] == "succeeded"


@pytest.fixture
def narrow(make_database_url: MakeDatabaseUrl) -> Iterator[Stack]:
    """A deployment that lets three jobs wait, and has no worker yet."""
    with tempfile.TemporaryDirectory(prefix="timetuner-test-") as folder:
        stack = Stack(Path(folder), make_database_url("sqlite", Path(folder)))
        stack.environment["MAX_QUEUED_JOBS"] = "3"
        stack.start("broker", "api")

        def answers() -> bool:
            try:
                return stack.client.get("/healthz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, "answer")
        yield stack
        stack.stop()


def test_requests_that_there_is_no_room_for_are_told_when_to_come_back(narrow: Stack) -> None:
    ring = narrow.register("mixture-ring")
    jobs = [start(narrow, model=ring, num_steps=2, seed=k) for k in range(3)]
    refused = post(narrow, model=ring, num_steps=2, seed=3)
    assert_problem(refused, 429, accepted="too many samples are waiting")
    assert int(refused.headers["retry-after"]) >= 1
    assert narrow.client.get("/v1/models").status_code == 200  # all else is answered

    narrow.start("worker", "dispatcher")
    for job in jobs:
        assert narrow.finished(job, "samples")["state"] == "succeeded"
    wait_until(lambda: post(narrow, model=ring, num_steps=2, seed=3).status_code == 200, "room", seconds=5)
    assert stored(narrow, 3) is not None
