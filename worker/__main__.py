"""One worker process, for one device: `timetuner worker`, or `python -m worker`."""

import argparse
import os
import sys

from service.shared.logs import start_logging
from service.shared.queue import QUEUES
from service.shared.settings_error import SettingsError
from service.shared.telemetry import start_tracing
from worker import metrics
from worker.app import app, settings, wait_for_describer


def main() -> None:
    """Serve the queues that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queues", default=",".join(QUEUES), help="comma-separated; default: %(default)s")
    serve(parser.parse_args().queues)


def serve(queues: str) -> None:
    """Serve the queues, which commas divide, until SIGTERM. Raises: SettingsError."""
    check_device(settings.device)
    if settings.pipeline_placement in ("offload", "balanced"):
        from worker.pipeline_loading import check_placement
        from worker.runtime import pick_device

        check_placement(settings, pick_device(settings.device))
    os.environ["HF_HUB_OFFLINE"] = "1"  # Model configurations must not cause downloads.
    start_logging(settings.log_level)
    metrics.serve(settings)
    start_tracing("timetuner-worker", settings.otel_exporter_otlp_endpoint)
    # Celery's own command would import a shell for terminals. worker.app explains why the pool has one thread.
    worker = app.Worker(
        hostname=f"{queues.replace(',', '-')}-{os.getpid()}@%h",
        queues=queues,
        pool="threads",
        concurrency=1,
        loglevel="WARNING",
        without_gossip=True,
        quiet=True,
    )
    try:
        worker.start()
    finally:
        wait_for_describer()
    sys.exit(worker.exitcode)


def check_device(name: str) -> None:
    """Use the device, if it may be absent. Raises: SettingsError."""
    if name in ("auto", "cpu"):
        return
    import torch

    try:
        torch.ones(1, device=name).sum().item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: this PyTorch was built without CUDA.
        reason = str(error).partition("\n")[0].rstrip(".")
        accepted = "auto, cpu, or a device that this machine has"
        raise SettingsError([f"DEVICE is {name!r}, which cannot be used ({reason}); accepted: {accepted}"]) from None


if __name__ == "__main__":
    main()
