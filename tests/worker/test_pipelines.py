"""Whole pipelines through the service: requests to the API, a worker in this process, and plain calls beside them."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from starlette.testclient import TestClient

from service.app import create_app
from service.registry.database import Registry
from service.registry.tables import JobState
from tests.conftest import MakeDatabaseUrl
from tests.pipelines import BY_NAME, plain, register, request_of
from tests.worker.in_process import InProcess

pytestmark = pytest.mark.xdist_group("pipelines")

NPY = {"Accept": "application/x-npy"}
ASYNC = {"Prefer": "respond-async"}


class Service:
    """The API and a worker in this process."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self.worker = InProcess(folder, registry)
        self.api: TestClient
        self._models: dict[str, tuple[str, Any]] = {}

    def model(self, name: str) -> str:
        return self._registered(name)[0]

    def pipeline(self, name: str) -> Any:
        return self._registered(name)[1]

    def _registered(self, name: str) -> tuple[str, Any]:
        if name not in self._models:
            self._models[name] = register(self.worker, name)
        return self._models[name]

    def submit(self, name: str, **changed: Any) -> str:
        """The id of a new job."""
        answer = self.api.post(
            "/v1/samples", json=request_of(BY_NAME[name], self.model(name), **changed), headers=ASYNC
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def refused(self, name: str, **changed: Any) -> str:
        """Why a request is refused, after the name of the field."""
        answer = self.api.post(
            "/v1/samples", json=request_of(BY_NAME[name], self.model(name), **changed), headers=ASYNC
        )
        assert answer.status_code == 422, answer.text
        error = answer.json()["errors"][0]
        return ".".join(map(str, error["loc"][1:])) + ": " + str(error["msg"])

    def images(self, job_id: str) -> NDArray[np.float32]:
        answer = self.api.get(f"/v1/samples/{job_id}/content", headers=NPY)
        assert answer.status_code == 200, answer.text
        array: NDArray[np.float32] = np.load(io.BytesIO(answer.content))
        return array


@pytest.fixture(scope="module")
def service(make_database_url: MakeDatabaseUrl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("pipelines")
    registry = Registry(make_database_url("sqlite", folder))
    made = Service(folder, registry)
    address = {"base_url": "http://127.0.0.1", "client": ("127.0.0.1", 1)}
    with TestClient(create_app(made.worker.settings), **address) as made.api:  # type: ignore[arg-type]
        yield made
    made.worker.close()
    registry.close()


@pytest.mark.parametrize(
    "name", ["sd15", "sdxl", "sd3", "flux", "pixart-sigma", "wan", "ddpm", "sd15-img2img", "sd15-inpaint"]
)
def test_a_served_image_is_that_of_a_plain_call(service: Service, name: str) -> None:
    kind, pipeline = BY_NAME[name], service.pipeline(name)
    job = service.submit(name, num_images=2, seed=7)
    service.worker.serve()
    assert service.worker.job(job).state == JobState.SUCCEEDED, service.worker.job(job).error
    images = service.images(job)
    assert images.dtype == np.float32
    for k, image in enumerate(images):
        expected = plain(kind, pipeline, 7 + k, kind.num_steps)
        assert torch.allclose(torch.from_numpy(image), expected, atol=2e-5), name
    assert not np.allclose(images[0], images[1], atol=1e-2)


def test_requests_of_4_8_and_5_steps_share_calls_and_a_cancelled_one_leaves_the_others_as_they_are(
    service: Service,
) -> None:
    kind, pipeline = BY_NAME["sd15"], service.pipeline("sd15")
    numbers = {4: 0, 8: 1, 5: 2}
    served: Any = service.worker.runtime.load(service.model("sd15"))
    counts = []
    for cancelled in (False, True):
        before = served.shared.num_calls
        jobs = {steps: service.submit("sd15", num_steps=steps, seed=40 + seed) for steps, seed in numbers.items()}
        more = service.submit("sd15", num_steps=6, seed=9)
        if cancelled:
            service.api.post(f"/v1/samples/{more}/cancel")
        service.worker.serve()
        counts.append(served.shared.num_calls - before)
        for steps, seed in numbers.items():
            if not cancelled:  # The second time, the images are found.
                expected = plain(kind, pipeline, 40 + seed, steps)
                assert torch.allclose(torch.from_numpy(service.images(jobs[steps])[0]), expected, atol=2e-5)
    assert counts[0] <= 9  # The first shared call of a kind is checked by one more.
