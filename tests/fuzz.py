"""Whether the API keeps to its OpenAPI document, whatever it is sent: a property-based test by Schemathesis.

    make fuzz
    python -m tests.fuzz --max-examples 850 --database sqlite --seed 0

All checks and phases, sequences of requests by the document's links included, with limits so low that the workers keep
up. `schemathesis.toml` says which answers count as right, and why.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from service.registry.keys import Scope, create_key
from tests.stack import Stack, deployment

CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
SETTINGS = {
    "AUTH": "on",
    "MAX_WAIT_SECONDS": "2",
    "MAX_IMAGES": "8",
    "MAX_PIXEL_STEPS": "100000",
    "MAX_TUNING_CALLS": "20000",
    "MAX_TUNING_BATCH_VALUES": "20000",
}


def fuzz(stack: Stack, max_examples: int, seed: int) -> bool:
    """Whether all answers were right."""
    with stack.registry.write() as session:
        _, key = create_key(session, "fuzz", [Scope.ADMIN])
    authorization = f"Bearer {key}"
    stack.client.headers["Authorization"] = authorization
    for builtin in ("mixture-ring", "digits8"):  # Requests find these.
        stack.register(builtin)
    command = [Path(sys.executable).with_name("st"), "--config-file", CONFIGURATION, "run"]
    options: dict[str, object] = {"checks": "all", "max-examples": max_examples, "seed": seed}
    options["header"] = f"Authorization: {authorization}"
    flags = [f"--{name}={value}" for name, value in options.items()]
    return subprocess.run([*command, *flags, f"{stack.client.base_url}/openapi.json"], check=False).returncode == 0


def requests_by_status(stack: Stack) -> dict[str, int]:
    """How many the API has answered, as it counted them."""
    counts: dict[str, int] = {}
    for family in text_string_to_metric_families(stack.client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == "timetuner_http_request_seconds_count":
                status = sample.labels["status"]
                counts[status] = counts.get(status, 0) + int(sample.value)
    return dict(sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-examples", type=int, default=850, help="of each operation, in each phase")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with deployment(args.database, **SETTINGS) as stack:
        right = fuzz(stack, args.max_examples, args.seed)
        counts = requests_by_status(stack)
    print(f"\n{sum(counts.values())} requests on {args.database}; answers by status: {counts}")
    sys.exit(not right)


if __name__ == "__main__":
    main()
