"""`python -m worker.dispatcher_health`: whether the dispatcher on this machine ends its rounds, by its metrics.

The exit status is 0 if it ended a whole round within the last minute, and otherwise 1.
"""

import sys
import time
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from service.shared.settings import Settings

MAX_AGE_SECONDS = 60.0
METRIC = "timetuner_dispatch_time_seconds"


def seconds_since_last_round(port: int) -> float:
    """The seconds since the dispatcher with its metrics at `port` last ended a whole round. Raises: OSError."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        families = text_string_to_metric_families(response.read().decode())
        ended_at = max(sample.value for family in families for sample in family.samples if sample.name == METRIC)
    return time.time() - ended_at


def main() -> None:
    age = seconds_since_last_round(Settings().dispatcher_metrics_port)
    if age > MAX_AGE_SECONDS:
        sys.exit(f"the last whole round ended {age:.0f} s ago; accepted: up to {MAX_AGE_SECONDS:.0f} s")


if __name__ == "__main__":
    main()
