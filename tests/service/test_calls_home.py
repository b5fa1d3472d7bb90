"""No process calls home: of all that API and worker do, no connection leaves this machine."""

import ipaddress
import socket
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.registry.tables import TuningJob
from service.shared.queue import celery_app
from service.shared.settings import Settings
from tests.conftest import MakeDatabaseUrl
from worker.runtime import Runtime
from worker.tuning import run_tuning_job


@pytest.fixture
def outbound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts elsewhere that were looked up or connected to; none is reached."""
    seen: list[str] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def note(host: Any) -> None:
        if not is_here(host):
            seen.append(str(host))
            raise OSError("this test lets nothing out")

    def noted_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            note(address[0])
        connect(self, address)

    def noted_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        note(host)
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", noted_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", noted_connect)
    monkeypatch.setattr(socket, "getaddrinfo", noted_look_up)
    return seen


def is_here(host: Any) -> bool:
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def test_a_job_from_its_request_to_its_schedule_connects_to_nothing_elsewhere(
    outbound: list[str], make_database_url: MakeDatabaseUrl, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="lets nothing out"):
        socket.create_connection(("telemetry.invalid", 443))
    assert outbound == ["telemetry.invalid"]
    outbound.clear()

    url = make_database_url("sqlite", tmp_path)
    settings = Settings(timetuner_home=tmp_path, database_url=url, broker_url="redis://127.0.0.1:1/0", device="cpu")
    with TestClient(create_app(settings), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        model = client.post("/v1/models", json={"builtin": "digits8"}).json()["id"]
        evaluation = {"num_samples": 32, "teacher_num_steps": 8}
        request = {"model": model, "num_steps": 2, "tuner": {"objective": "grid"}, "evaluation": evaluation}
        job = client.post("/v1/tuning-jobs", json=request).json()["id"]
        runtime = Runtime(settings, celery_app(settings.broker_url))
        assert runtime.run(TuningJob, job, run_tuning_job)
        runtime.registry.close()
        after = client.get(f"/v1/tuning-jobs/{job}").json()
        for page in ("/", f"/jobs/{job}", f"/models/{model}", "/docs", "/openapi.json", "/metrics", "/healthz"):
            client.get(page)
    assert after["state"] == "succeeded", after["error"]
    assert outbound == []
