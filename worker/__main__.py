"""`python -m worker --queues tuning,sampling`: one worker process, for one device."""

import argparse
import os

from service.shared.logs import start_logging
from service.shared.queue import QUEUES
from service.shared.telemetry import start_tracing
from worker import metrics
from worker.app import app, settings, wait_for_describer


def main() -> None:
    """Serve the queues until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queues", default=",".join(QUEUES), help="comma-separated; default: %(default)s")
    queues = parser.parse_args().queues
    os.environ["HF_HUB_OFFLINE"] = "1"  # Model configurations must not cause downloads.
    start_logging(settings.log_level)
    metrics.serve(settings)
    start_tracing("timetuner-worker", settings.otel_exporter_otlp_endpoint)
    # worker.app explains why the pool has one thread.
    options = ["--pool", "threads", "--concurrency", "1", "--loglevel", "WARNING", "--without-gossip"]
    name = f"{queues.replace(',', '-')}-{os.getpid()}@%h"
    try:
        app.worker_main(["--quiet", "worker", *options, "--queues", queues, "--hostname", name])
    finally:
        wait_for_describer()


if __name__ == "__main__":
    main()
