"""A request that comes again with its key is not done again, whatever it asks for."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.service.problems import assert_problem
from tests.stack import QUICK, Json, Stack

TIMES = 6


def bodies(model: str) -> dict[str, tuple[str, Json, Json]]:
    """A request of each operation, and another one."""
    grid = {"timesteps": [1.0, 0.5, 0.001], "t_ratios": [1.0, 1.0]}
    return {
        "tuning": ("/v1/tuning-jobs", {"model": model, "num_steps": 3, **QUICK}, {"model": model, "num_steps": 4}),
        "sampling": ("/v1/samples", {"model": model, "num_steps": 3}, {"model": model, "num_steps": 4}),
        "a large request": (
            "/v1/samples",
            {"model": model, "num_steps": 2, "num_images": 60},
            {"model": model, "num_steps": 2},
        ),
        "importing": (
            "/v1/schedules",
            {"model": model, "num_steps": 2, **grid},
            {"model": model, "num_steps": 2, **grid, "provenance": {"by": "hand"}},
        ),
        "registering": ("/v1/models", {"builtin": "mixture-ring"}, {"builtin": "mixture-gratings"}),
    }


def post(stack: Stack, path: str, body: Json, key: str | None) -> httpx.Response:
    headers = {"Prefer": "respond-async"} | ({"Idempotency-Key": key} if key else {})
    return stack.client.post(path, json=body, headers=headers)


@pytest.fixture
def ring(stack: Stack) -> str:
    return stack.register("mixture-ring")


@pytest.fixture
def key() -> str:
    return uuid4().hex


@pytest.mark.both_engines
@pytest.mark.parametrize("operation", bodies(""))
def test_a_request_sent_many_times_at_once_with_its_key_is_done_once(
    stack: Stack, ring: str, key: str, operation: str
) -> None:
    path, body, other = bodies(ring)[operation]
    with ThreadPoolExecutor(TIMES) as threads:
        answers = list(threads.map(lambda _: post(stack, path, body, key), range(TIMES)))
    assert all(answer.is_success for answer in answers), [answer.text for answer in answers]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len({answer.headers["Location"] for answer in answers}) == 1
    assert_problem(post(stack, path, other, key), 409, "Idempotency-Key")


@pytest.mark.parametrize("operation", ["tuning", "sampling", "importing"])
def test_without_a_key_or_with_another_each_request_counts(stack: Stack, ring: str, operation: str) -> None:
    path, body, _ = bodies(ring)[operation]
    keys = [None, None, uuid4().hex, uuid4().hex]
    assert len({post(stack, path, body, key).json()["id"] for key in keys}) == len(keys)


def test_a_key_means_nothing_to_another_operation(stack: Stack, ring: str, key: str) -> None:
    made = bodies(ring)
    answers = [post(stack, made[name][0], made[name][1], key) for name in ("sampling", "importing")]
    assert all(answer.is_success for answer in answers)


def test_a_request_that_was_refused_may_be_mended_and_sent_again_with_its_key(
    stack: Stack, ring: str, key: str
) -> None:
    def sample(**body: Any) -> httpx.Response:
        return post(stack, "/v1/samples", {"model": ring, **body}, key)

    assert_problem(sample(num_steps=0), 422, "num_steps")
    assert_problem(sample(num_steps=3, num_images=10_000), 422, "num_images")
    answer = sample(num_steps=3)
    assert answer.status_code == 202, answer.text


def test_who_waits_for_images_with_a_key_gets_the_same_again(stack: Stack, ring: str, key: str) -> None:
    body = {"model": ring, "num_steps": 3, "seed": 5}
    first, again = (stack.client.post("/v1/samples", json=body, headers={"Idempotency-Key": key}) for _ in range(2))
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.headers["Content-Location"] == again.headers["Content-Location"]
    assert first.content == again.content
