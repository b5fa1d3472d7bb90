"""Clients of a deployment of real processes."""

from collections.abc import Iterator

import pytest

from service.client import Schedule, TimeTuner
from service.client.requests import TuningJobRequest
from tests.stack import QUICK, Stack


def quick(model: str, num_steps: int = 3) -> TuningJobRequest:
    """A tuning job of a second or two."""
    tuner, evaluation = QUICK["tuner"], QUICK["evaluation"]
    return {"model": model, "num_steps": num_steps, "tuner": tuner, "evaluation": evaluation}  # type: ignore[typeddict-item]


@pytest.fixture(scope="session")
def service(stack: Stack) -> Iterator[TimeTuner]:
    with TimeTuner(str(stack.client.base_url)) as client:
        yield client


@pytest.fixture(scope="session")
def gratings(service: TimeTuner) -> str:
    """A model of images that costs little."""
    return service.models.create(builtin="mixture-gratings").id


@pytest.fixture(scope="session")
def schedule(service: TimeTuner, gratings: str) -> Schedule:
    """One that was tuned and evaluated."""
    made = service.tuning_jobs.create(**quick(gratings)).wait().schedule
    assert made is not None
    return service.schedules.get(made)
