"""A worker's Prometheus metrics, served if METRICS_PORT is set. docs/observability.md explains each."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from service.registry.samples import Ended
from service.registry.tables import Job, JobState, SampleJob
from service.shared.settings import Settings
from service.shared.telemetry import KINDS

if TYPE_CHECKING:
    from timetuner_core.models.diffusion_model import DiffusionModel
    from worker.pipeline_sampling import ServedPipeline

ROW_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024)
SECOND_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

BATCH_ROWS = Histogram("timetuner_batch_rows", "Images moved on by one sampling step.", buckets=ROW_BUCKETS)
_PHASES = Histogram("timetuner_phase_seconds", "Time of a sampling phase.", ("phase",), buckets=SECOND_BUCKETS)
CLAIM, LOAD, STEP, STORE = (_PHASES.labels(phase) for phase in ("claim", "load", "step", "store"))
NETWORK_EVALUATIONS = Counter("timetuner_network_evaluations", "Rows put through the network.", ("model",))
IMAGES = Counter("timetuner_images", "Images made.", ("model",))
TUNING_ITERATIONS = Counter("timetuner_tuning_iterations", "Iterations of tuners.", ("model",))
JOBS_ENDED = Counter("timetuner_jobs_ended", "Jobs that this worker brought to an end.", ("kind", "state"))
MODELS_LOADED = Gauge("timetuner_models_loaded", "Models that the worker holds.")
MODEL_BYTES = Gauge("timetuner_model_bytes", "Of the models that the worker holds.")


def serve(settings: Settings) -> None:
    """Serve metrics from a thread until the process ends. Raises: OSError, if the port is taken."""
    if settings.metrics_port:
        start_http_server(settings.metrics_port, settings.metrics_host)


def hold(models: "Iterable[DiffusionModel | ServedPipeline]") -> None:
    """Note which models the worker holds from now on."""
    sizes = [model.num_bytes for model in models]
    MODELS_LOADED.set(len(sizes))
    MODEL_BYTES.set(sum(sizes))


def job_ended(job_class: type[Job], state: JobState) -> None:
    JOBS_ENDED.labels(KINDS[job_class], state).inc()


def samples_ended(ends: Iterable[Ended]) -> None:
    """Count requests that ended. The parts of a request that was split are not counted."""
    for end in ends:
        if end.parent_id is None:
            job_ended(SampleJob, end.state)
