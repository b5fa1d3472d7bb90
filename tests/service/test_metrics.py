"""/metrics of an API without a worker: what it counts of requests, and what it sees of the queues."""

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from starlette.testclient import TestClient

from service.app import create_app
from service.metrics import Metrics, QueueCollector
from service.registry.database import Registry
from service.registry.tables import JobState, SampleJob, TuningJob, TuningTask
from service.registry.types import utc_now
from service.samples.admission import Admission
from service.shared.settings import Settings
from tests.registry.conftest import model_id, registry  # noqa: F401
from worker import dispatcher  # noqa: F401 (into REGISTRY)
from worker import metrics as worker_metrics  # noqa: F401 (likewise)

ROOT = Path(__file__).parents[2]
HERE = "http://127.0.0.1"
OURS = "timetuner_"
REQUESTS = "timetuner_http_request_seconds_count"


@pytest.fixture
def api(registry: Registry, database_url: str, tmp_path: Path) -> Iterator[TestClient]:  # noqa: F811
    no_broker = f"redis+socket://{tmp_path / 'none.sock'}"
    settings = Settings(
        timetuner_home=tmp_path, database_url=database_url, broker_url=no_broker, max_queued_jobs=2, max_json_bytes=100
    )
    with TestClient(create_app(settings), HERE, client=("127.0.0.1", 50000)) as client:
        yield client


def scraped(api: TestClient) -> dict[tuple[str, ...], float]:
    """Values by name and labels."""
    response = api.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def add(registry: Registry, model_id: str, seconds_ago: float, **columns: Any) -> None:  # noqa: F811
    created_at = utc_now() - timedelta(seconds=seconds_ago)
    common = {"model_id": model_id, "request": {}, "request_hash": "", "num_images": 1, "created_at": created_at}
    with registry.write() as session:
        session.add(SampleJob(**common, **columns))


@pytest.mark.both_engines
def test_queues_are_told_by_length_and_by_the_age_of_the_oldest(
    api: TestClient,
    registry: Registry,  # noqa: F811
    model_id: str,  # noqa: F811
) -> None:
    assert {scraped(api)["timetuner_queue_jobs", kind] for kind in ("sampling", "tuning", "tuning_step")} == {0}
    add(registry, model_id, 10)
    add(registry, model_id, 100)
    add(registry, model_id, 1000, state=JobState.RUNNING)
    add(registry, model_id, 1000, num_parts=2)  # The job itself does not wait for workers. Its parts do.
    with registry.write() as session:
        job = TuningJob(model_id=model_id, request={}, state=JobState.RUNNING)
        session.add(job)
        session.flush()
        session.add(TuningTask(job_id=job.id, step_index=0, request={}, created_at=utc_now() - timedelta(seconds=50)))
    metrics = scraped(api)
    assert metrics["timetuner_queue_jobs", "sampling"] == 2
    assert metrics["timetuner_queue_age_seconds", "sampling"] == pytest.approx(100, abs=20)
    assert metrics["timetuner_queue_jobs", "tuning"] == metrics["timetuner_queue_age_seconds", "tuning"] == 0
    assert metrics["timetuner_queue_jobs", "tuning_step"] == 1
    assert metrics["timetuner_queue_age_seconds", "tuning_step"] == pytest.approx(50, abs=20)


def test_queues_that_cannot_be_read_are_left_out_rather_than_told_wrong(
    api: TestClient,
    registry: Registry,  # noqa: F811
) -> None:
    with registry.write() as session:
        session.execute(text("ALTER TABLE sample_jobs RENAME TO elsewhere"))
    api.get("/healthz")
    metrics = scraped(api)
    with registry.write() as session:
        session.execute(text("ALTER TABLE elsewhere RENAME TO sample_jobs"))
    assert metrics[REQUESTS, "GET", "/healthz", "200"] == 1
    assert not any(name.startswith("timetuner_queue") for name, *_ in metrics)


@pytest.mark.parametrize(
    ("method", "path", "labels"),
    [
        ("GET", "/v1/models", ("GET", "/v1/models", "200")),
        ("GET", "/v1/models/mdl_none", ("GET", "/v1/models/{model_id}", "404")),
        ("PUT", "/v1/models", ("PUT", "/v1/models", "405")),
        ("GET", "/v1/of-my-own", ("GET", "other", "404")),
        ("BREW", "/v1/models", ("other", "/v1/models", "405")),
    ],
)
def test_requests_are_counted_by_route_not_by_what_clients_make_up(
    api: TestClient, method: str, path: str, labels: tuple[str, ...]
) -> None:
    api.request(method, path)
    api.request(method, path)
    assert scraped(api)[REQUESTS, *labels] == 2


def test_a_body_refused_before_it_is_routed_counts_for_its_route(api: TestClient) -> None:
    api.post("/v1/tuning-jobs", content=b" " * 1000, headers={"Content-Type": "application/json"})
    assert scraped(api)[REQUESTS, "POST", "/v1/tuning-jobs", "413"] == 1


def test_refusals_of_a_full_queue_are_counted(
    api: TestClient,
    registry: Registry,  # noqa: F811
    model_id: str,  # noqa: F811
) -> None:
    for _ in range(2):
        add(registry, model_id, 1)
    assert api.post("/v1/samples", json={"model": model_id, "num_steps": 1}).status_code == 429
    assert scraped(api)[REQUESTS, "POST", "/v1/samples", "429"] == 1


def test_the_service_rate_is_told_once_it_was_measured(registry: Registry) -> None:  # noqa: F811
    admission = Admission(registry, max_jobs=10, max_seconds=10)
    name = "timetuner_sampling_images_per_second"

    def told() -> list[float]:
        return [
            s.value
            for family in QueueCollector(registry, admission).collect()
            for s in family.samples
            if s.name == name
        ]

    assert told() == []
    for _ in range(3):
        with admission.admit(4):
            pass
    admission.ended(4)
    admission.ended(4)
    assert told() == [admission.rate]


def test_the_openapi_document_has_the_metrics_as_text(api: TestClient) -> None:
    operation = api.get("/openapi.json").json()["paths"]["/metrics"]["get"]
    assert list(operation["responses"]["200"]["content"]) == ["text/plain"]


def test_documents_and_the_autoscaling_example_name_the_metrics_there_are(registry: Registry) -> None:  # noqa: F811
    admission = Admission(registry, max_jobs=10, max_seconds=10)
    families = [*Metrics().registry.collect(), *QueueCollector(registry, admission, 1).collect(), *REGISTRY.collect()]
    exported = {"timetuner_sampling_images_per_second"}
    exported |= {f"{f.name}_total" if f.type == "counter" else f.name for f in families if f.name.startswith(OURS)}
    documented = named((ROOT / "docs/observability.md").read_text())
    assert documented == exported
    scaled_object = yaml.safe_load((ROOT / "examples/kubernetes/keda.yaml").read_text())
    queries = [trigger["metadata"]["query"] for trigger in scaled_object["spec"]["triggers"]]
    assert queries
    assert all(named(query) and named(query) <= exported for query in queries)


def named(text: str) -> set[str]:
    """The metrics a text speaks of; of histograms, whatever part."""
    return {re.sub("_(bucket|count|sum)$", "", name) for name in re.findall(rf"\b{OURS}[a-z_]+", text)}
