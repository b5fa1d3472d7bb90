"""What it costs to claim 24 sampling jobs, by the length of the queue.

    python benchmarks/claims.py

The queue is one key's, in a new SQLite registry. Figures are milliseconds of processor time, medians of 30 claims.
"""

import statistics
import tempfile
import time

from sqlalchemy import text

from service.registry.database import Registry
from service.registry.samples import add_samples, claim_samples, hand_back_samples
from service.registry.tables import Model, SampleJob

CLAIMS, ROOM = 30, 24


def milliseconds(num_queued: int) -> float:
    """The median cost of a claim from a queue of so many jobs."""
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(f"sqlite:///{folder}/registry.sqlite")
        registry.upgrade()
        with registry.write() as session:
            model = Model(name="m", content_hash="m", source={}, spec={})
            session.add(model)
            session.flush()
            common = {"model_id": model.id, "request": {"num_steps": 10}, "num_images": 1, "num_parts": 0}
            add_samples(session, [SampleJob(request_hash=str(k), **common) for k in range(num_queued)])
            session.execute(text("ANALYZE"))
        costs = []
        for _ in range(CLAIMS):
            with registry.write() as session:
                began = time.process_time()
                claims, _, _ = claim_samples(session, "worker", 30.0, ROOM, [model.id], only_these=False)
                costs.append(1000 * (time.process_time() - began))
            assert len(claims) == ROOM
            with registry.write() as session:
                hand_back_samples(session, claims)
        registry.close()
    return statistics.median(costs)


def main() -> None:
    print("| jobs queued | ms for a claim of 24 |\n| ---: | ---: |")
    for num_queued in (300, 1000, 3000, 10_000):
        print(f"| {num_queued:,} | {milliseconds(num_queued):.1f} |", flush=True)


if __name__ == "__main__":
    main()
