"""API keys in the registry: no secret is kept, and no quota exceeded, however many ask at the same time."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session

from service.access.callers import Caller
from service.http.fields import PageQuery
from service.models.logic import register_builtin
from service.registry.database import Registry
from service.registry.keys import Scope, any_key, charge, create_key, find_key, list_keys, revoke_key
from service.registry.tables import ApiKey, AuditEntry, JobState, SampleJob, TuningJob
from service.registry.types import utc_now
from service.samples.reading import newest as newest_samples
from service.tuning_jobs.logic import newest
from tests.registry.test_schedules import plans_of

pytestmark = pytest.mark.both_engines

THREADS = 6


def new_key(registry: Registry, quota: int | None = None) -> tuple[ApiKey, str]:
    with registry.write() as session:
        return create_key(session, "somebody", [Scope.SAMPLE], pixel_steps_per_day=quota)


def charged(registry: Registry, key_id: str, *costs: int) -> list[int | None]:
    with registry.write() as session:
        return charge(session, key_id, costs)


def test_a_key_is_found_by_its_prefix_and_its_secret_is_not_kept(registry: Registry) -> None:
    with registry.read() as session:
        assert not any_key(session)
    (key, key_text), (_, other_text) = new_key(registry), new_key(registry)
    _, prefix, secret = key_text.split("_")
    assert len({key_text, other_text, secret}) == 3
    assert len(bytes.fromhex(secret)) == 32
    with registry.read() as session:
        found = find_key(session, prefix)
        assert found is not None
        assert (found.id, found.scopes) == (key.id, ["sample"])
        assert any_key(session)
        assert secret not in str(session.execute(text("SELECT * FROM api_keys")).all())


def test_revoking_twice_changes_nothing_and_what_was_done_is_in_the_audit_log(registry: Registry) -> None:
    key, _ = new_key(registry)
    times = set()
    for _ in range(2):
        with registry.write() as session:
            revoked = revoke_key(session, key.id)
            assert revoked is not None
            times.add(revoked.revoked_at)
    with registry.write() as session:
        assert revoke_key(session, "key_nobodys") is None
    assert len(times) == 1
    with registry.read() as session:
        entries = session.scalars(select(AuditEntry).order_by(AuditEntry.id)).all()
        assert [(entry.actor, entry.action, entry.object) for entry in entries] == [
            ("cli", "create_key", key.id),
            ("cli", "revoke_key", key.id),
        ]
        assert [key.id for key in list_keys(session)] == [key.id]


def test_a_quota_is_used_up_exactly_and_is_there_again_the_next_day(registry: Registry) -> None:
    key, _ = new_key(registry, quota=10)
    assert charged(registry, key.id, 4, 7, 6, 1) == [None, 6, None, 0]
    with registry.write() as session:
        session.get_one(ApiKey, key.id).quota_day = utc_now().date() - timedelta(days=1)
    assert charged(registry, key.id, 11, 10) == [10, None]


def test_requests_at_the_same_time_cannot_exceed_a_quota_together(registry: Registry) -> None:
    key, _ = new_key(registry, quota=10)
    barrier = Barrier(THREADS)

    def spend(_: int) -> list[int | None]:
        barrier.wait()
        return charged(registry, key.id, 3)

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(spend, range(THREADS)))
    assert sorted(results, key=str) == [[1]] * (THREADS - 3) + [[None]] * 3


def test_a_charge_is_taken_back_with_its_transaction(registry: Registry) -> None:
    key, _ = new_key(registry, quota=10)
    with pytest.raises(RuntimeError), registry.write() as session:
        charge(session, key.id, [10])
        raise RuntimeError("the job could not be stored")
    assert charged(registry, key.id, 10) == [None]


def test_who_registered_a_model_is_written_down_once(registry: Registry) -> None:
    key, _ = new_key(registry)
    caller = Caller(key, "request-1")
    (model, created), (_, again) = (register_builtin(registry, caller, "mixture-ring", None) for _ in range(2))
    assert (created, again) == (True, False)
    with registry.read() as session:
        entries = session.scalars(select(AuditEntry).where(AuditEntry.actor == key.id)).all()
    assert [(entry.action, entry.object, entry.request_id) for entry in entries] == [
        ("register_model", model.id, "request-1")
    ]


@pytest.mark.parametrize("state", [None, JobState.SUCCEEDED])
@pytest.mark.parametrize("cursor", [None, "job_02000"])
def test_a_page_of_ones_own_jobs_is_found_by_their_owner_however_many_others_have(
    registry: Registry, model_id: str, state: JobState | None, cursor: str | None
) -> None:
    """Every hundredth job is one's own, every other one of these has succeeded."""
    key, _ = new_key(registry)
    common = {"model_id": model_id, "request": {}}
    rows = [
        {
            **common,
            "id": f"job_{k:05d}",
            "owner": key.id if k % 100 < 1 else f"key_{k % 10}",
            "state": JobState.SUCCEEDED if k % 200 < 100 else JobState.FAILED,
        }
        for k in range(6000)
    ]
    with registry.write() as session:
        session.execute(insert(TuningJob), rows)
    with registry.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    first = 5999 if cursor is None else 1999
    expected = [f"job_{k:05d}" for k in range(first, -1, -1) if k % (100 if state is None else 200) == 0][:20]

    def read(session: Session) -> None:
        jobs, _ = newest(session, Caller(key), state, PageQuery(limit=20, cursor=cursor))
        assert [job.id for job in jobs] == expected

    (plan, *_) = plans_of(registry, read)
    assert [index[0] for index in plan.indexes if index != ("job_id",)] == ["owner"]
    if registry.is_sqlite:  # PostgreSQL may rather sort as few as these
        assert not plan.sorts


def test_a_page_of_ones_own_sampling_jobs_is_found_by_their_owner(registry: Registry, model_id: str) -> None:
    """Every hundredth job is one's own, and every other one of these is a part of the one before."""
    key, _ = new_key(registry)
    common = {"model_id": model_id, "request": {}, "request_hash": "", "num_images": 1}
    rows = [
        {
            **common,
            "id": f"smp_{k:05d}",
            "owner": f"key_{k % 10}" if k % 100 else key.id,
            "parent_id": f"smp_{k - 100:05d}" if k % 200 == 100 else None,
        }
        for k in range(6000)
    ]
    with registry.write() as session:
        session.execute(insert(SampleJob), rows)
    with registry.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    expected = [f"smp_{k:05d}" for k in range(5800, -1, -200)][:20]

    def read(session: Session) -> None:
        jobs, cursor = newest_samples(session, Caller(key), None, None, None, PageQuery(limit=20, cursor=None))
        assert ([job.id for job in jobs], cursor) == (expected, expected[-1])

    (plan, *_) = plans_of(registry, read)
    assert [index[0] for index in plan.indexes] == ["owner"]
    if registry.is_sqlite:  # PostgreSQL may rather sort as few as these
        assert not plan.sorts
