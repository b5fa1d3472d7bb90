"""Finding schedules among many: the right ones, and by the indexes that keep it fast with a million."""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import cache
from typing import Any

import pytest
from sqlalchemy import delete, event, insert, inspect, text
from sqlalchemy.orm import Session

from service.access.callers import ANYBODY, Caller
from service.registry.database import Registry
from service.registry.schedules import next_version
from service.registry.tables import ApiKey, EvaluationRow, Model, Schedule, ScheduleAlias, ScheduleStatus
from service.schedules import logic
from service.schedules.schemas import ScheduleQuery
from service.shared.job_requests import SamplingSetting
from tests.conftest import MakeDatabaseUrl

pytestmark = pytest.mark.both_engines

MODELS = ("mdl_1", "mdl_2")
SAMPLERS = ("ddim", "euler")
SETTING = SamplingSetting(model="mdl_1", num_steps=3, guidance_type="classifier-free", guidance_scale=Decimal(2))
NUM_SCHEDULES = 4_000
FILTERS: list[dict[str, Any]] = [
    {},
    {"model": "mdl_1"},
    {"model": "mdl_1", "num_steps": 3},
    {"model": "mdl_1", "num_steps": 3, "status": "accepted"},
    {"model": "mdl_2", "status": "rejected"},
    {"model": "mdl_2", "sampler": "euler", "guidance_scale": 2},
    {"model": "mdl_2", "eta": 0.5},
    {"model": "mdl_nope"},
    {"num_steps": 3},
    {"status": "imported"},
    {"sampler": "euler", "guidance_type": "uncond", "guidance_rescale": 0, "guidance_start": 0, "guidance_end": 1000},
    {"model": "mdl_1", "num_steps": 3, "sampler": "ddim", "guidance_type": "uncond", "guidance_scale": 1, "eta": 0},
]


def stored(
    k: int, setting: SamplingSetting, version: int, status: ScheduleStatus, score: float | None
) -> dict[str, Any]:
    numbers = [1 / 3] * 25  # rows as wide as real ones: what an index saves depends on it
    values: dict[str, Any] = {
        "timesteps": numbers,
        "t_ratios": numbers,
        "provenance": {},
        "status": status,
        "score": score,
    }
    return {"id": f"sch_{k:05}", **setting.key(), "version": version, **values}


def many() -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for k in range(NUM_SCHEDULES):
        guided = rng.random() < 0.5
        setting = SamplingSetting(
            model=rng.choice(MODELS),
            num_steps=rng.randint(1, 8),
            sampler=rng.choice(SAMPLERS),
            guidance_type="classifier-free" if guided else "uncond",
            guidance_scale=Decimal(rng.randint(1, 3) if guided else 1),
        )
        status = rng.choice((ScheduleStatus.ACCEPTED, ScheduleStatus.REJECTED))
        yield stored(k, setting, k, status, round(rng.random(), 2))


def add(registry: Registry, schedules: list[dict[str, Any]]) -> None:
    figures = ("teacher_l2_before", "teacher_l2_after", "teacher_l2_change_low", "teacher_l2_change_high")
    counts = ("num_samples", "teacher_num_steps", "seed", "network_calls", "wall_time_seconds")
    with registry.write() as session:
        for k, model_id in enumerate(MODELS):
            session.add(Model(id=model_id, name="m", content_hash=f"{k:064}", source={}, spec={}))
        session.flush()
        session.execute(insert(Schedule), schedules)
        evaluation = dict.fromkeys((*figures, *counts), 1)
        session.execute(insert(EvaluationRow), [{"schedule_id": row["id"], **evaluation} for row in schedules])


@pytest.fixture(scope="module", params=["sqlite", "sqlite, analysed", "postgresql"])
def filled(
    request: pytest.FixtureRequest, make_database_url: MakeDatabaseUrl, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    """Many schedules, and what the planner knows of them: PostgreSQL looks by itself, SQLite only when told to."""
    engine, _, analysed = request.param.partition(", ")
    registry = Registry(make_database_url(engine, tmp_path_factory.mktemp("registry")))
    add(registry, list(many()))
    if engine == "postgresql":
        with registry.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
    elif analysed:
        with registry.write() as session:
            session.execute(text("ANALYZE"))
    yield registry
    registry.close()


@contextmanager
def statements_of(registry: Registry) -> Iterator[list[tuple[str, Any]]]:
    """The statements sent to the database in the block, with its parameters."""
    sent: list[tuple[str, Any]] = []

    def keep(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith(("SELECT", "WITH")):
            sent.append((statement, parameters))

    event.listen(registry.engine, "before_cursor_execute", keep)
    yield sent
    event.remove(registry.engine, "before_cursor_execute", keep)


class Plan:
    """How the database would run a statement: the columns of each index it uses, and whether it sorts."""

    def __init__(self, registry: Registry, statement: str, parameters: Any) -> None:
        self.indexes: list[tuple[str, ...]] = []
        self.sorts = False
        self.whole_tables: list[str] = []  # read without an index
        self.columns = _index_columns(registry)
        with registry.engine.connect() as connection:
            if registry.is_sqlite:
                for *_, detail in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters):
                    self._add_sqlite(detail)
            else:
                explained = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters)
                self._add_postgresql(explained.scalar_one()[0]["Plan"])

    def _add_sqlite(self, detail: str) -> None:
        self.sorts |= "TEMP B-TREE" in detail
        if index := re.search(r"INDEX (\w+)", detail):
            self.indexes.append(self.columns[index[1]])
        elif table := re.match(r"SCAN (schedules|evaluations|sample_jobs)", detail):
            self.whole_tables.append(table[1])

    def _add_postgresql(self, node: dict[str, Any]) -> None:
        self.sorts |= "Sort" in node["Node Type"]
        if "Index Name" in node:
            self.indexes.append(self.columns[node["Index Name"]])
        elif "Relation Name" in node:
            self.whole_tables.append(node["Relation Name"])
        for part in node.get("Plans", ()):
            self._add_postgresql(part)


@cache
def _index_columns(registry: Registry) -> dict[str, tuple[str, ...]]:
    inspector = inspect(registry.engine)
    automatic: dict[str, Any] = {"include_auto_indexes": True} if registry.is_sqlite else {}
    columns: dict[str, Any] = {}
    for table in inspector.get_table_names():
        key = inspector.get_pk_constraint(table)
        columns[str(key["name"])] = tuple(key["constrained_columns"])
        columns |= {
            str(index["name"]): tuple(index["column_names"]) for index in inspector.get_indexes(table, **automatic)
        }
    return columns


def plans_of(registry: Registry, call: Callable[[Session], object]) -> list[Plan]:
    with statements_of(registry) as sent, registry.read() as session:
        call(session)
    return [Plan(registry, *statement) for statement in sent]


def pages(registry: Registry, filters: dict[str, Any], limit: int) -> Iterator[list[str]]:
    cursor = None
    while True:
        with registry.read() as session:
            rows, cursor = logic.listed(session, ANYBODY, ScheduleQuery(**filters, limit=limit, cursor=cursor))
        yield [row.id for row in rows]
        if cursor is None:
            return


def matching_ids(filters: dict[str, Any]) -> list[str]:
    names = {"model": "model_id"}
    wanted = {names.get(name, name): value for name, value in filters.items()}
    return [row["id"] for row in many() if all(row[name] == value for name, value in wanted.items())][::-1]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("max_scanned", [190, NUM_SCHEDULES + 1])
def test_pages_hold_every_schedule_that_matches_once_newest_first_however_few_one_page_may_look_at(
    filled: Registry, filters: dict[str, Any], max_scanned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logic, "MAX_SCANNED", max_scanned)
    found = list(pages(filled, filters, limit=150))
    assert [id for page in found for id in page] == matching_ids(filters)
    assert all(len(page) <= 150 for page in found)
    assert len(found) <= NUM_SCHEDULES // 150 + 1
    if max_scanned > NUM_SCHEDULES:
        assert all(len(page) == 150 for page in found[:-1])


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("cursor", [None, "sch_02000"])
def test_a_page_is_read_in_the_order_of_an_index_of_its_filters(
    filled: Registry, filters: dict[str, Any], cursor: str | None
) -> None:
    caller = Caller(ApiKey(id="key_1", scopes=[]))  # An admin sees all, so that nothing need be left out.
    plans = plans_of(filled, lambda session: logic.listed(session, caller, ScheduleQuery(**filters, cursor=cursor)))
    first = tuple(name for name in ("model", "num_steps") if name in filters) if "model" in filters else ()
    expected = (*(name.replace("model", "model_id") for name in first), "id")
    scan, _, *position = plans  # The plans between them find the rows of the page by their ids.
    for plan in (scan, *position):
        assert [index[: len(expected)] for index in plan.indexes] == [expected]
        assert not plan.sorts  # it stops when the page is full
    if filters:  # all other filters are decided by the index
        assert set(scan.indexes[0]) == {"id", *Schedule.KEY, "status", "private_to"}


@pytest.mark.parametrize("filters", [{}, {"model": "mdl_1"}, {"model": "mdl_2", "status": "rejected"}], ids=str)
def test_pages_by_score_hold_every_schedule_with_one_once_the_best_first(
    filled: Registry, filters: dict[str, Any]
) -> None:
    scores = {row["id"]: row["score"] for row in many()}
    expected = [id for id in matching_ids(filters) if scores[id] is not None]
    expected.sort(key=lambda one: (scores[one], one))
    found = list(pages(filled, filters | {"sort": "score"}, limit=150))
    assert [id for page in found for id in page] == expected
    caller = Caller(ApiKey(id="key_1", scopes=[]))
    query = ScheduleQuery(**filters, sort="score", cursor=found[0][-1])
    # The first two statements read the schedule that the cursor names, and its model.
    _, _, scan, *_ = plans_of(filled, lambda session: logic.listed(session, caller, query)[0])
    order = (*(["model_id"] if "model" in filters else []), "score", "id")
    if filled.is_sqlite or "model" in filters:  # PostgreSQL may find that most of a small table is wanted.
        assert [index[: len(order)] for index in scan.indexes] == [order]
        assert not scan.sorts


def test_a_search_finds_ids_aliases_and_names_of_models_and_takes_its_signs_as_they_are(filled: Registry) -> None:
    with filled.write() as session:
        session.add(
            ScheduleAlias(model_id="mdl_1", name="best-of-all", schedule_id=matching_ids({"model": "mdl_1"})[0])
        )

    def found(search: str, **filters: Any) -> list[str]:
        return [id for page in pages(filled, filters | {"search": search}, limit=200) for id in page]

    assert found("BEST-of") == matching_ids({"model": "mdl_1"})[:1]
    assert found("sch_0012") == [id for id in matching_ids({}) if "sch_0012" in id]
    assert found("h%0012") == found("sch_0012_") == []
    assert found("M", num_steps=3) == matching_ids({"num_steps": 3})  # Both models have this name.
    with filled.write() as session:
        session.execute(delete(ScheduleAlias))


@pytest.mark.parametrize(
    "setting", [SETTING, SETTING.model_copy(update={"guidance_scale": Decimal(9)})], ids=["some", "none"]
)
def test_resolving_is_one_query_that_reads_an_index_and_sorts_nothing(
    filled: Registry, setting: SamplingSetting
) -> None:
    plan, *of_intervals = plans_of(filled, lambda session: logic.resolve(session, ANYBODY, setting))
    assert set(plan.indexes) == {(*Schedule.KEY, "private_to", "status", "score", "id"), ("schedule_id",)}
    assert (plan.whole_tables, plan.sorts) == ([], False)
    # Only where no schedule is for the very scale, those for intervals are looked at, in an index of their own.
    assert len(of_intervals) == (setting.guidance_scale != SETTING.guidance_scale)
    for each in of_intervals:
        assert set(each.indexes) == {
            ("model_id", "num_steps", "guidance_type", "status", "sampler", "guidance_scale"),
            ("schedule_id",),
        }
        assert each.whole_tables == []


def test_the_next_version_is_read_off_an_index(filled: Registry) -> None:
    _, stored, ever = plans_of(filled, lambda session: next_version(session, SETTING.key()))
    assert stored.indexes == [(*Schedule.KEY, "private_to", "version")]
    assert (stored.whole_tables, stored.sorts) == ([], False)
    if filled.is_sqlite:  # PostgreSQL reads a small table as a whole
        assert (ever.indexes, ever.whole_tables) == ([(*Schedule.KEY, "private_to")], [])
    assert not ever.sorts


@pytest.fixture
def resolved(registry: Registry) -> Callable[[list[dict[str, Any]]], tuple[Schedule | None, str]]:
    def resolve(schedules: list[dict[str, Any]]) -> tuple[Schedule | None, str]:
        add(registry, schedules)
        with registry.read() as session:
            return logic.resolve(session, ANYBODY, SETTING)

    return resolve


Resolved = Callable[[list[dict[str, Any]]], tuple[Schedule | None, str]]


def test_of_equal_scores_the_newest_accepted_schedule_is_the_best_and_comes_with_its_evaluation(
    resolved: Resolved,
) -> None:
    accepted, rejected = ScheduleStatus.ACCEPTED, ScheduleStatus.REJECTED
    figures = [(accepted, 0.7), (accepted, 0.5), (accepted, 0.5), (rejected, 0.4), (accepted, 0.6)]
    best, reason = resolved([stored(k, SETTING, k, *given) for k, given in enumerate(figures)])
    assert best is not None and best.evaluation is not None
    assert (best.version, best.evaluation.num_samples) == (2, 1)
    assert "version 2" in reason and "0.5000" in reason


@pytest.mark.parametrize(
    ("count", "told"), [(1, "(1 rejected)"), (100, "(100 rejected)"), (150, "(more than 100 rejected)")]
)
def test_without_an_accepted_schedule_the_rejected_are_counted_as_far_as_a_reader_cares(
    resolved: Resolved, count: int, told: str
) -> None:
    best, reason = resolved([stored(k, SETTING, k, ScheduleStatus.REJECTED, 0.4) for k in range(count)])
    assert best is None
    assert told in reason
