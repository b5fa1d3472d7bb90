"""How the rivals are run in the processes that the benchmarks start: on loopback, with one replica, until SIGTERM."""

import os
import signal
from typing import Any


def run_litserve(apis: Any, port: int) -> None:
    """Serve a `LitAPI` of LitServe, or several."""
    import litserve

    us = os.getpid()

    def interrupt(*_: object) -> None:
        if os.getpid() == us:  # and not in a child, which LitServe stops
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    server = litserve.LitServer(apis, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run("127.0.0.1", port, num_api_servers=1, log_level="warning", generate_client_file=False)


def run_ray(application: Any, port: int) -> None:
    """Serve a bound deployment of Ray Serve."""
    import ray
    from ray import serve

    signals = {signal.SIGTERM, signal.SIGINT}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        logging_level="warning",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=os.environ["RAY_TMPDIR"],
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application, route_prefix="/predict")
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        signal.sigwait(signals)
    finally:
        serve.shutdown()
        ray.shutdown()
