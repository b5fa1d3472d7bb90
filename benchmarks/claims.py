"""What it costs to claim 24 sampling jobs, by the length of the queue.

    python benchmarks/claims.py

The queue is one key's, or that of several keys that have as many jobs each, in a new SQLite registry. Figures are
milliseconds of processor time, medians of 30 claims.
"""

import statistics
import tempfile
import time

from sqlalchemy import text

from service.registry.database import Registry
from service.registry.samples import add_samples, claim_samples, hand_back_samples
from service.registry.tables import Model, SampleJob

CLAIMS, ROOM = 30, 24
KEYS = (1, 2, 8, 32)


def milliseconds(num_queued: int, num_keys: int) -> float:
    """The median cost of a claim from a queue of so many jobs, of so many keys."""
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(f"sqlite:///{folder}/registry.sqlite")
        registry.upgrade()
        with registry.write() as session:
            model = Model(name="m", content_hash="m", source={}, spec={})
            session.add(model)
            session.flush()
            common = {"model_id": model.id, "request": {"num_steps": 10}, "num_images": 1, "num_parts": 0}
            owners = [f"key_{k % num_keys}" for k in range(num_queued)]
            add_samples(session, [SampleJob(request_hash="", owner=owner, **common) for owner in owners])
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
    print("ms for a claim of 24\n")
    print(f"| jobs queued | {' | '.join(f'{keys} keys' if keys > 1 else '1 key' for keys in KEYS)} |")
    print("| ---: |" + " ---: |" * len(KEYS))
    for num_queued in (300, 1000, 3000, 10_000):
        figures = (f"{milliseconds(num_queued, num_keys):.1f}" for num_keys in KEYS)
        print(f"| {num_queued:,} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
