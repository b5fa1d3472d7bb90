"""Sampling over HTTP: formats, seeds, waiting or not, and refusals."""

import base64
import io
import zipfile
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.service.problems import assert_problem
from tests.stack import QUICK, SMALLEST, Json, Stack

NPY = "application/x-npy"


@pytest.fixture(scope="module")
def digits(stack: Stack) -> str:
    return stack.register("digits8")


@pytest.fixture(scope="module")
def ring(stack: Stack) -> str:
    return stack.register("mixture-ring")


def post(stack: Stack, accept: str | None = NPY, **body: Any) -> httpx.Response:
    return stack.client.post("/v1/samples", json=body, headers={"Accept": accept} if accept else {})


def arrays(response: httpx.Response) -> NDArray[np.float32]:
    assert response.status_code == 200, response.text
    array: NDArray[np.float32] = np.load(io.BytesIO(response.content), allow_pickle=False)
    return array


def test_labels_decide_what_digit_is_drawn(stack: Stack, digits: str) -> None:
    """Nearest class mean of the data the model came with, as an independent judge."""
    from sklearn.datasets import load_digits

    dataset = load_digits()
    means = np.stack([dataset.images[dataset.target == c].mean(axis=0) for c in range(10)]) / 8 - 1
    labels = list(range(10)) * 3
    guidance = {"guidance_type": "classifier-free", "guidance_scale": 2, "class_labels": labels}
    images = arrays(post(stack, model=digits, num_steps=20, num_images=30, **guidance))
    assert images.shape == (30, 1, 8, 8)
    nearest = np.square(images - means[None]).sum(axis=(2, 3)).argmin(axis=1)
    assert (nearest == labels).mean() > 0.8


@pytest.mark.parametrize("eta", [0, 0.5])
def test_an_image_depends_on_its_seed_alone(stack: Stack, ring: str, eta: float) -> None:
    request = {"model": ring, "num_steps": 6, "eta": eta}
    whole = post(stack, **request, num_images=5, seed=40)
    assert post(stack, **request, num_images=5, seed=40).content == whole.content
    alone = [arrays(post(stack, **request, num_images=1, seed=40 + k))[0] for k in range(5)]
    np.testing.assert_allclose(arrays(whole), alone, atol=1e-6)
    assert not np.allclose(arrays(post(stack, **request, num_images=5, seed=41)), arrays(whole))


def test_every_format_shows_the_same_images(stack: Stack, digits: str) -> None:
    request = {"model": digits, "num_steps": 5, "num_images": 3, "seed": 1}
    raw = arrays(post(stack, **request))
    pixels = np.round((raw.clip(-1, 1) + 1) * 127.5).astype(np.uint8)[:, 0]

    grid = post(stack, "image/png", **request)
    assert grid.headers["content-type"] == "image/png"
    sheet = np.asarray(Image.open(io.BytesIO(grid.content)))
    assert sheet.shape == (2 * 64 + 2, 2 * 64 + 2)
    np.testing.assert_array_equal(sheet[4:64:8, 4:64:8], pixels[0])
    np.testing.assert_array_equal(sheet[70::8, 4:64:8], pixels[2])

    with zipfile.ZipFile(io.BytesIO(post(stack, "application/zip", **request).content)) as archive:
        assert archive.namelist() == ["000.png", "001.png", "002.png"]
        for k, name in enumerate(archive.namelist()):
            np.testing.assert_array_equal(np.asarray(Image.open(archive.open(name))), pixels[k])

    images = post(stack, "application/json", **request).json()["images"]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(images[1])))), pixels[1])


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "image/png"),
        ("*/*", "image/png"),
        ("text/html, image/*;q=0.8, */*;q=0.1", "image/png"),
        ("image/png;q=0.1, application/x-npy", NPY),
        ("application/json", "application/json"),
    ],
)
def test_the_format_is_negotiated(stack: Stack, digits: str, accept: str | None, expected: str) -> None:
    response = post(stack, accept, model=digits, num_steps=1)
    assert response.headers["content-type"] == expected


def test_samples_that_are_no_images_come_as_numbers(stack: Stack, ring: str) -> None:
    request = {"model": ring, "num_steps": 5, "num_images": 3}
    numbers = post(stack, "application/json", **request).json()["samples"]
    np.testing.assert_allclose(numbers, arrays(post(stack, "*/*", **request)), rtol=1e-6)
    newest = stack.client.get("/v1/models").json()
    assert_problem(post(stack, "image/png", **request), 406, "Accept", NPY)
    assert stack.client.get("/v1/models").json() == newest


@pytest.mark.both_engines
def test_respond_async_answers_at_once_and_the_content_follows(stack: Stack, ring: str) -> None:
    body = {"model": ring, "num_steps": 8, "num_images": 2, "seed": 9}
    accepted = stack.client.post("/v1/samples", json=body, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202
    job = accepted.json()
    assert accepted.headers["location"] == f"/v1/samples/{job['id']}"
    done = stack.finished(job, "samples")
    assert (done["state"], done["progress"], done["error"]) == ("succeeded", 1.0, None)
    content = stack.client.get(done["content"], headers={"Accept": NPY})
    assert content.content == post(stack, **body).content


def test_jobs_are_listed_newest_first_by_what_they_are_of(stack: Stack, ring: str, digits: str) -> None:
    def listed(**filters: Any) -> list[str]:
        found: list[str] = []
        cursor: Json = {}
        while True:
            page = stack.client.get("/v1/samples", params={"limit": 2, **filters, **cursor}).json()
            found += [job["id"] for job in page["items"]]
            if page["next_cursor"] is None or len(found) >= 4:
                return found
            cursor = {"cursor": page["next_cursor"]}

    made = [post(stack, model=model, num_steps=1, seed=70 + k) for k, model in enumerate((ring, digits, ring, ring))]
    first, second, third, fourth = (answer.headers["content-location"].split("/")[3] for answer in made)
    assert listed() == [fourth, third, second, first]
    assert listed(model=ring)[:3] == [fourth, third, first]
    assert listed(state="failed", model=digits) == []
    assert listed(schedule="sch_nope") == []
    assert_problem(stack.client.get("/v1/samples", params={"state": "done"}), 422, "state", "succeeded")
    assert_problem(stack.client.get("/v1/samples", params={"limit": 0}), 422, "limit")


LONG: Json = {"num_steps": 1000, "num_images": 15}


def test_wait_bounds_how_long_a_request_waits(stack: Stack, digits: str) -> None:
    body = {"model": digits, **LONG}
    answer = stack.client.post("/v1/samples", json=body, headers={"Prefer": "wait=1"})
    assert answer.status_code == 202
    job = answer.json()
    assert_problem(stack.client.get(f"/v1/samples/{job['id']}/content"), 409, accepted="succeeded")
    stack.client.post(f"/v1/samples/{job['id']}/cancel")
    assert stack.finished(job, "samples")["state"] == "cancelled"
    assert_problem(stack.client.get(f"/v1/samples/{job['id']}/content"), 500, accepted="cancelled")


def test_samples_do_not_wait_for_the_tuning_that_their_only_worker_is_at(stack: Stack, ring: str) -> None:
    busy = stack.submit(
        ring,
        num_steps=4,
        tuner={"total_iters": 10_000, "population_size": 16, "teacher_num_steps": 20},
        evaluation=SMALLEST,
    )
    stack.running(busy)
    assert arrays(post(stack, model=ring, num_steps=5, seed=77)).shape == (1, 2)
    assert stack.client.get(f"/v1/tuning-jobs/{busy['id']}").json()["state"] == "running"
    stack.client.post(f"/v1/tuning-jobs/{busy['id']}/cancel")
    assert stack.finished(busy)["state"] == "cancelled"


GUIDED: Json = {"guidance_type": "classifier-free", "guidance_scale": 2}
BAD_REQUESTS: dict[str, tuple[Json, int, str, str]] = {
    "an unknown model": ({"model": "mdl_nope"}, 422, "model", "registered model"),
    "no steps": ({"num_steps": 0}, 422, "num_steps", ""),
    "too many steps": ({"num_steps": 1001}, 422, "num_steps", "1 to 1000"),
    "no images": ({"num_images": 0}, 422, "num_images", ""),
    "too many images": ({"num_images": 257}, 422, "num_images", "1 to 256"),
    "too much work": ({"num_steps": 1000, "num_images": 256, **GUIDED, "class_labels": 1}, 413, "num_images", "up to"),
    "negative guidance": ({**GUIDED, "guidance_scale": -0.5, "class_labels": 1}, 422, "guidance_scale", ""),
    "a label out of range": ({**GUIDED, "class_labels": 10}, 422, "class_labels", "0 to 9"),
    "a negative label": ({**GUIDED, "class_labels": [-1]}, 422, "class_labels", "0 to 9"),
    "too few labels": ({**GUIDED, "num_images": 3, "class_labels": [1, 2]}, 422, "class_labels", "as many as"),
    "no labels": (GUIDED, 422, "class_labels", "0 to 9"),
    "labels without guidance": ({"class_labels": 1}, 422, "class_labels", "guidance_type"),
    "an unknown schedule": ({"schedule": "nope"}, 422, "schedule", "'auto', 'none'"),
    "a seed that is too large": ({"seed": 2**31}, 422, "seed", ""),
    "a misspelt option": ({"steps": 5}, 422, "steps", ""),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_and_leaves_nothing(stack: Stack, digits: str, name: str) -> None:
    change, status, field, accepted = BAD_REQUESTS[name]
    files = stack.files()
    assert_problem(post(stack, **{"model": digits, "num_steps": 5, **change}), status, field, accepted)
    assert stack.files() == files


def test_a_schedule_of_another_step_count_is_refused(stack: Stack, ring: str) -> None:
    schedule = stack.tune(ring, num_steps=3, **QUICK)
    assert_problem(post(stack, model=ring, num_steps=4, schedule=schedule["id"]), 422, "num_steps", "of 3")


@pytest.mark.parametrize("path", ["", "/content"])
def test_an_unknown_job_is_not_found(client: httpx.Client, path: str) -> None:
    assert_problem(client.get(f"/v1/samples/smp_nope{path}"), 404)
