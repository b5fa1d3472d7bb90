"""Traces and workers' metrics of a real deployment, as a collector and Prometheus see them."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import MakeDatabaseUrl
from tests.stack import Stack, free_port, wait_until

TRACE_ID, CLIENT_SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(HTTPServer):
    """Takes spans by OTLP over HTTP; `spans` has the service's name with each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[tuple[str, Span]] = []

    def named(self, name: str) -> list[tuple[str, Span]]:
        return [(service, span) for service, span in self.spans if span.name == name]

    def of_job(self, job_id: str) -> Span | None:
        for _, span in self.spans:
            if any(a.key == "timetuner.job.id" and a.value.string_value == job_id for a in span.attributes):
                return span
        return None


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.server.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    yield collector
    collector.shutdown()
    thread.join()
    collector.server_close()


@pytest.fixture(scope="module")
def watched(
    collector: Collector, make_database_url: MakeDatabaseUrl, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """A deployment that sends spans to the collector, and whose worker serves metrics."""
    home = Path(tmp_path_factory.mktemp("t"))
    stack = Stack(home, make_database_url("sqlite", home))
    stack.environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "METRICS_PORT": str(free_port()),
    }
    for name in ("SAME_BITS", "SAMPLE_BATCH_SIZE"):  # Here they have their defaults.
        del stack.environment[name]
    stack.start_all()
    stack.wait_until_ready()
    yield stack
    stack.stop()


def metrics_of_the_worker(stack: Stack) -> dict[tuple[str, ...], float]:
    """Values by name and labels."""
    text = httpx.get(f"http://127.0.0.1:{stack.environment['METRICS_PORT']}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def test_a_clients_trace_goes_through_the_api_to_the_workers_stored_result(
    watched: Stack, collector: Collector
) -> None:
    body = {"model": watched.register("mixture-ring"), "num_steps": 3, "seed": 1}
    headers = {"traceparent": f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01", "Accept": "application/x-npy"}
    assert watched.client.post("/v1/samples", json=body, headers=headers).status_code == 200

    wait_until(lambda: collector.named("store") and collector.named("POST /v1/samples"), "spans", 20)
    ((service, request),) = collector.named("POST /v1/samples")
    assert (service, request.parent_span_id.hex()) == ("timetuner-api", CLIENT_SPAN_ID)
    ((service, sampling),) = collector.named("sampling")
    assert (service, sampling.parent_span_id) == ("timetuner-worker", request.span_id)
    (wait,), (steps,), (store,) = ([span for _, span in collector.named(name)] for name in ("wait", "steps", "store"))
    assert wait.parent_span_id == request.span_id
    assert steps.parent_span_id == store.parent_span_id == sampling.span_id
    assert {span.trace_id.hex() for span in (request, sampling, wait, steps, store)} == {TRACE_ID}
    assert wait.start_time_unix_nano <= wait.end_time_unix_nano == sampling.start_time_unix_nano
    assert steps.start_time_unix_nano < steps.end_time_unix_nano == store.start_time_unix_nano
    assert store.end_time_unix_nano == sampling.end_time_unix_nano


def test_a_tuning_job_that_fails_is_a_span_with_its_error(watched: Stack, collector: Collector) -> None:
    model = watched.register("mixture-ring")
    job = watched.finished(watched.submit(model, num_steps=2, sampler="own_broken", tuner={"total_iters": 1}))
    assert job["state"] == "failed", job
    span: Span = wait_until(lambda: collector.of_job(job["id"]), "span", 20)
    assert (span.name, span.parent_span_id) == ("tuning", b"")
    assert span.status.message == job["error"]


def test_a_worker_tells_what_it_has_done(watched: Stack) -> None:
    ring, digits = watched.register("mixture-ring"), watched.register("digits8")
    before = metrics_of_the_worker(watched)

    def gained(*key: str) -> float:
        return metrics_of_the_worker(watched).get(key, 0.0) - before.get(key, 0.0)

    quick = {"total_iters": 2, "population_size": 16, "teacher_num_steps": 4}
    watched.tune(ring, num_steps=2, tuner=quick, evaluation={"num_samples": 16, "teacher_num_steps": 4})
    wait_until(lambda: gained("timetuner_jobs_ended_total", "tuning", "succeeded") == 1, "a count of the job", 5)
    assert gained("timetuner_tuning_iterations_total", ring) > 0
    assert gained("timetuner_network_evaluations_total", ring) > 0

    body = {"model": digits, "num_steps": 4, "num_images": 30, "seed": 5}
    assert watched.client.post("/v1/samples", json=body).status_code == 200
    assert gained("timetuner_jobs_ended_total", "sampling", "succeeded") == 1  # made in two parts
    assert gained("timetuner_images_total", digits) == 30
    assert gained("timetuner_batch_rows_sum") == 30 * 4
    assert gained("timetuner_network_evaluations_total", digits) >= 30 * 4
    assert gained("timetuner_model_bytes") > 1000
    assert metrics_of_the_worker(watched)["timetuner_models_loaded",] == 2
    for phase in ("claim", "load", "step", "store"):
        assert gained("timetuner_phase_seconds_sum", phase) > 0


def test_a_lone_image_is_not_padded_where_nobody_minds_its_last_bits(watched: Stack) -> None:
    digits = watched.register("digits8")
    body = {"model": digits, "num_steps": 4, "seed": 6}
    assert watched.client.post("/v1/samples", json=body).status_code == 200  # loads the model
    before = metrics_of_the_worker(watched)["timetuner_network_evaluations_total", digits]
    assert watched.client.post("/v1/samples", json={**body, "seed": 7}).status_code == 200
    assert metrics_of_the_worker(watched)["timetuner_network_evaluations_total", digits] == before + 4
