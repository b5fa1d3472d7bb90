"""Sampling jobs: taken many at a time by order of urgency, each by one worker; late ones dropped; parts joined."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import takewhile
from random import Random
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import insert, select, text

from service.http.errors import InvalidError
from service.registry.database import Registry
from service.registry.jobs import request_cancel, take_back_expired
from service.registry.samples import (
    AGEING_SECONDS,
    LATE,
    PATIENCE_SECONDS,
    Ended,
    SampleClaim,
    changes,
    claim_samples,
    ended,
    finish_samples,
    forgotten_parents,
    join_parts,
    models_sampled_last,
    renew_samples,
    samples_wait,
)
from service.registry.tables import JobState, Model, SampleJob, Schedule, ScheduleAlias, ScheduleStatus, TuningJob
from service.registry.types import utc_now
from service.samples.catalog import Catalog
from service.samples.submitting import Submission, submit_all
from service.shared.job_requests import SampleRequest
from service.shared.settings import Settings
from tests.registry.test_schedules import Plan, statements_of

pytestmark = pytest.mark.both_engines

LEASE_SECONDS = 60.0
EXPIRED = -1.0  # a lease that is over as soon as it is given
MAX_ATTEMPTS = 3
THREADS = 6
AGES_AGO = timedelta(seconds=100 * PATIENCE_SECONDS)


@pytest.fixture
def other_model(registry: Registry) -> str:
    with registry.write() as session:
        model = Model(name="other", content_hash="1" * 64, source={"builtin": "mixture-gratings"}, spec={})
        session.add(model)
    return model.id


@pytest.fixture
def add(registry: Registry, model_id: str) -> Callable[..., str]:
    """`add(**fields)`: a queued job, younger than those before it; its id."""
    count = 0

    def add(**fields: Any) -> str:
        nonlocal count
        count += 1
        defaults = {"id": f"smp_{count:03d}", "model_id": model_id, "request": {}, "request_hash": "", "num_images": 1}
        with registry.write() as session:
            job = SampleJob(**defaults | fields)
            session.add(job)
        return job.id

    return add


def take(
    registry: Registry,
    room: int = 100,
    models: Collection[str] = (),
    only_these: bool = False,
    owner: str = "w",
    lease_seconds: float = LEASE_SECONDS,
) -> tuple[list[SampleClaim], list[Ended]]:
    with registry.write() as session:
        claims, late, _ = claim_samples(session, owner, lease_seconds, room, models, only_these)
    return claims, late


def taken(registry: Registry, *args: Any, **kwargs: Any) -> list[str]:
    """The ids of the jobs taken, in order."""
    return [claim.job_id for claim in take(registry, *args, **kwargs)[0]]


def read(registry: Registry, job_id: str) -> SampleJob:
    with registry.read() as session:
        return session.get_one(SampleJob, job_id)


def states(registry: Registry, *job_ids: str) -> list[JobState]:
    return [read(registry, job_id).state for job_id in job_ids]


def cancel(registry: Registry, job_id: str) -> None:
    with registry.write() as session:
        request_cancel(session, session.get_one(SampleJob, job_id))


def take_back(registry: Registry) -> None:
    with registry.write() as session:
        take_back_expired(session, SampleJob, MAX_ATTEMPTS)


def renew(registry: Registry, claims: list[SampleClaim]) -> tuple[set[str], set[str]]:
    with registry.write() as session:
        return renew_samples(session, claims, LEASE_SECONDS)


def end(registry: Registry, claims: list[SampleClaim], state: JobState = JobState.SUCCEEDED) -> list[Ended]:
    """Those of the claims' jobs that could be ended, each with a row of one file."""
    ends = [(claim, ended(claim.job, state, "samples/a.npy", 10 * k)) for k, claim in enumerate(claims)]
    with registry.write() as session:
        return finish_samples(session, ends)


def test_jobs_are_taken_by_priority_and_then_by_age(registry: Registry, add: Callable[..., str]) -> None:
    late, early = add(priority=1), add()
    later, between = add(priority=1), add()
    assert taken(registry) == [early, between, late, later]
    assert taken(registry) == []


def test_a_taken_job_says_who_has_it_since_when_and_for_how_long(registry: Registry, add: Callable[..., str]) -> None:
    job_id = add(request={"seed": 7})
    (claim,), _ = take(registry, owner="worker 1")
    job = read(registry, job_id)
    assert (job.state, job.lease_owner, job.attempt) == (JobState.RUNNING, "worker 1", 1)
    assert (claim.job_id, claim.fencing_token, claim.job.request) == (job_id, job.fencing_token, {"seed": 7})
    assert job.started_at is not None
    assert job.lease_expires_at is not None
    assert utc_now() < job.lease_expires_at < utc_now() + timedelta(seconds=LEASE_SECONDS + 1)


@pytest.mark.parametrize(
    ("room", "sizes", "expected"),
    [
        (0, [1], []),
        (4, [2, 2, 1], [2, 2]),
        (4, [2, 3, 1], [2]),  # the small one does not overtake: the large one would wait for ever
        (4, [5, 1], []),
        (5, [2, 2, 1, 1], [2, 2, 1]),
    ],
)
def test_as_many_images_are_taken_as_there_is_room_for(
    registry: Registry, add: Callable[..., str], room: int, sizes: list[int], expected: list[int]
) -> None:
    for size in sizes:
        add(num_images=size)
    claims, _ = take(registry, room)
    assert [claim.job.num_images for claim in claims] == expected


def test_a_worker_that_has_nothing_takes_the_first_job_however_large(
    registry: Registry, add: Callable[..., str]
) -> None:
    small, large = add(num_images=1), add(num_images=9)
    for expected in ([small], [large], []):
        with registry.write() as session:
            claims, _, _ = claim_samples(session, "w", LEASE_SECONDS, 4, [], only_these=False, is_empty=True)
        assert [claim.job_id for claim in claims] == expected


@pytest.mark.parametrize(
    ("room", "sizes", "more"),
    [(4, [], False), (4, [1, 1], False), (2, [1, 1, 1], True), (4, [1, 4], True), (4, [5], True), (0, [1], True)],
)
def test_a_worker_is_told_whether_to_look_again(
    registry: Registry, add: Callable[..., str], room: int, sizes: list[int], more: bool
) -> None:
    for size in sizes:
        add(num_images=size)
    with registry.write() as session:
        assert claim_samples(session, "w", LEASE_SECONDS, room, [], only_these=False)[2] == more


def test_jobs_of_models_that_are_held_go_first_until_others_lose_patience(
    registry: Registry, add: Callable[..., str], model_id: str, other_model: str
) -> None:
    waiting, held = add(model_id=other_model), add()
    assert taken(registry, models=[model_id], room=1) == [held]
    impatient = add(model_id=other_model, id="smp_000", created_at=utc_now() - AGES_AGO)
    held = add()
    assert taken(registry, models=[model_id], room=1) == [impatient]
    assert taken(registry, models=[model_id]) == [held]
    assert taken(registry, models=[model_id]) == [waiting]


def test_a_priority_counts_more_than_a_model_that_is_held(
    registry: Registry, add: Callable[..., str], model_id: str, other_model: str
) -> None:
    held, urgent = add(priority=1), add(model_id=other_model)
    assert taken(registry, models=[model_id], room=1) == [urgent]
    assert taken(registry, models=[model_id]) == [held]


def test_a_worker_that_is_at_a_model_takes_no_other_and_lets_impatient_jobs_have_their_turn(
    registry: Registry, add: Callable[..., str], model_id: str, other_model: str
) -> None:
    other, held = add(model_id=other_model), add()
    assert taken(registry, models=[model_id], only_these=True) == [held]
    assert taken(registry, models=[model_id], only_these=True) == []
    before = add(id="smp_000", created_at=utc_now() - AGES_AGO)
    impatient = add(id="smp_0001", model_id=other_model, created_at=utc_now() - AGES_AGO)
    after = add()
    assert taken(registry, models=[model_id], only_these=True) == [before]
    assert taken(registry, models=[model_id], only_these=True) == []
    assert taken(registry) == [impatient, other]
    assert taken(registry) == [after]


def test_a_model_to_be_loaded_comes_by_itself_as_others_may_have_to_go_for_it(
    registry: Registry, add: Callable[..., str], model_id: str, other_model: str
) -> None:
    held, other, also_held, another_other = add(), add(model_id=other_model), add(), add(model_id=other_model)
    assert taken(registry) == [held]
    assert taken(registry) == [other]
    assert taken(registry, models=[model_id, other_model]) == [also_held, another_other]


def test_a_long_queue_of_one_key_is_read_in_the_order_of_an_index(registry: Registry, model_id: str) -> None:
    """Else each claim would sort the queue: of 10,000 jobs it took seven times as long as of 300."""
    common = {"model_id": model_id, "request": {}, "request_hash": "", "num_images": 1, "priority": 1}
    rows = [common | {"id": f"smp_{k:05d}", "state": JobState.QUEUED} for k in range(3000)]
    with registry.write() as session:
        session.execute(insert(SampleJob), rows)
    with registry.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    with statements_of(registry) as sent, registry.write() as session:
        claims, _, more = claim_samples(session, "w", LEASE_SECONDS, 24, ["mdl_other"], only_these=False)
    assert ([claim.job_id for claim in claims], more) == ([f"smp_{k:05d}" for k in range(24)], True)
    if registry.is_sqlite:  # PostgreSQL may rather sort as few as these.
        plans = [Plan(registry, *statement) for statement in sent]
        assert len(plans) >= 2
        assert not any(plan.sorts or plan.whole_tables for plan in plans)


def instructions(registry: Registry, statements: list[tuple[str, Any]]) -> int:
    """How many instructions SQLite takes for statements, in units of ten."""
    count = 0

    def counting() -> int:
        nonlocal count
        count += 1
        return 0

    with registry.engine.connect() as connection:
        sqlite: Any = connection.connection.driver_connection
        sqlite.set_progress_handler(counting, 10)
        for statement, parameters in statements:
            sqlite.execute(statement, parameters).fetchall()
        sqlite.set_progress_handler(None, 0)
    return count


def test_of_a_long_queue_of_several_keys_a_claim_reads_the_first_jobs_of_each(
    registry: Registry, model_id: str
) -> None:
    """Else each claim would read and rank all: of 10,000 jobs it took eight times as long as of 1,000."""
    common = {"model_id": model_id, "request": {}, "request_hash": "", "num_images": 1, "state": JobState.QUEUED}
    counts = []
    for first, end in ((0, 300), (300, 3000)):
        rows = [common | {"id": f"smp_{k:05d}", "owner": (None, "key_a", "key_b")[k % 3]} for k in range(first, end)]
        with registry.write() as session:
            session.execute(insert(SampleJob), rows)
        with registry.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE"))
        with statements_of(registry) as sent, registry.write() as session:
            claims, _, more = claim_samples(session, "w", LEASE_SECONDS, 24, [model_id], only_these=False)
            session.rollback()
        assert ([claim.job_id for claim in claims], more) == ([f"smp_{k:05d}" for k in range(24)], True)
        if registry.is_sqlite:
            counts.append(instructions(registry, sent))
        else:
            heads = [statement for statement in sent if "num_images, sample_jobs.created_at" in statement[0]]
            assert len(heads) == 3
            assert not any(plan.sorts or plan.whole_tables for plan in (Plan(registry, *head) for head in heads))
    assert not counts or counts[1] <= 1.1 * counts[0]


def by_the_rule(jobs: Sequence[SampleJob], models: Collection[str], now: datetime) -> list[str]:
    """The ids of the queued jobs by turns, as docs/serving.md tells it, from all rows."""

    def urgency(job: SampleJob) -> int:
        return 0 if now - job.created_at > timedelta(seconds=AGEING_SECONDS) else job.priority

    def is_other(job: SampleJob) -> bool:
        is_impatient = now - job.created_at > timedelta(seconds=PATIENCE_SECONDS)
        return bool(models) and job.model_id not in models and not is_impatient

    places = {}
    for owner, priority in {(job.owner, job.priority) for job in jobs}:
        flow = [job for job in jobs if (job.owner, job.priority) == (owner, priority)]
        images = sum(job.num_images for job in flow if job.state == JobState.RUNNING)
        begun = [job.started_at.timestamp() for job in flow if job.started_at is not None]
        queued = [job for job in flow if job.state == JobState.QUEUED]
        for job in sorted(queued, key=lambda job: (urgency(job), is_other(job), job.id)):
            places[job.id] = (urgency(job), is_other(job), images, max(begun, default=0.0), job.id)
            images += job.num_images
    return sorted(places, key=lambda job_id: places[job_id])


@pytest.mark.parametrize("seed", range(6))
def test_the_jobs_that_are_claimed_are_the_first_by_the_rule_of_turns(
    registry: Registry, model_id: str, other_model: str, seed: int
) -> None:
    draw, now, models = Random(seed), utc_now(), [model_id] if seed % 2 else []
    ages = sorted((draw.choice((0.0, 10.0, 100.0)) + k / 1000 for k in range(120)), reverse=True)
    jobs = [
        SampleJob(
            id=f"smp_{k:03d}",
            owner=draw.choice((None, "key_a", "key_b", "key_c")),
            priority=draw.choice((0, 0, 1)),
            model_id=draw.choice((model_id, other_model)) if models else model_id,
            num_images=draw.choice((1, 2, 5)),
            num_parts=0,
            state=draw.choice((JobState.QUEUED,) * 5 + (JobState.RUNNING, JobState.SUCCEEDED)),
            created_at=now - timedelta(seconds=age),
            request={},
            request_hash="",
        )
        for k, age in enumerate(ages)
    ]
    for k, job in enumerate(jobs):
        if job.state != JobState.QUEUED:
            job.started_at = now - timedelta(seconds=k)
    with registry.write() as session:
        session.add_all(jobs)
    expected = by_the_rule(jobs, models, now)
    found: list[str] = []
    room = sum(job.num_images for job in jobs if job.id in expected[:8])
    with registry.write() as session:
        claims, _, _ = claim_samples(session, "w", LEASE_SECONDS, room, models, only_these=False)
        found = [claim.job_id for claim in claims]
    of_model = {job.id: job.model_id for job in jobs}
    allowed = list(takewhile(lambda job_id: not models or of_model[job_id] in models, expected[:8]))
    assert found[: len(allowed)] == allowed
    assert found[:1] == expected[:1]


def test_keys_take_turns_however_many_jobs_one_of_them_has(registry: Registry, add: Callable[..., str]) -> None:
    flood = [add(owner="key_a") for _ in range(20)]
    others = [add(owner="key_b"), add(owner="key_c"), add(owner="key_b")]
    assert taken(registry, room=5) == [flood[0], *others[:2], flood[1], others[2]]
    assert taken(registry, room=2) == flood[2:4]


def test_a_key_is_served_next_to_one_whose_jobs_fill_the_batch_each_time(
    registry: Registry, add: Callable[..., str]
) -> None:
    flood = [add(owner="key_a", num_images=8) for _ in range(6)]
    late = [add(owner="key_b", num_images=8) for _ in range(2)]
    order = []
    for _ in range(6):
        (claim,), _ = take(registry, room=8)
        end(registry, [claim])
        order.append(claim.job_id)
    # Both begin with nothing that was sampled, so that age decides; then they take turns.
    assert order == [flood[0], late[0], flood[1], late[1], flood[2], flood[3]]


def test_turns_are_counted_in_images_and_those_being_sampled_count(registry: Registry, add: Callable[..., str]) -> None:
    running = add(owner="key_a", num_images=6)
    assert taken(registry) == [running]
    large = add(owner="key_a", num_images=1)
    small = [add(owner="key_b", num_images=2) for _ in range(5)]
    assert taken(registry, room=8) == small[:4]
    assert taken(registry) == [large, small[4]]


def test_jobs_that_nobody_waits_for_have_a_turn_once_they_have_waited_long(
    registry: Registry, add: Callable[..., str]
) -> None:
    old = [add(priority=1, created_at=utc_now() - timedelta(seconds=AGEING_SECONDS + 5)) for _ in range(3)]
    young = add(priority=1)
    urgent = [add() for _ in range(3)]
    assert taken(registry, room=4) == [old[0], urgent[0], old[1], urgent[1]]
    assert taken(registry) == [old[2], urgent[2], young]


def test_jobs_whose_deadline_has_passed_are_dropped_and_told(registry: Registry, add: Callable[..., str]) -> None:
    now = utc_now()
    late = add(num_images=50, deadline_at=now - timedelta(seconds=1))
    in_time, unhurried = add(deadline_at=now + timedelta(seconds=60)), add()
    claims, told = take(registry, room=3)
    assert [claim.job_id for claim in claims] == [in_time, unhurried]
    assert told == [Ended(late, JobState.FAILED, error=LATE, num_images=50)]
    job = read(registry, late)
    assert (job.state, job.error, job.started_at, job.attempt) == (JobState.FAILED, LATE, None, 0)
    assert job.finished_at is not None


def test_of_many_claimers_at_once_none_gets_anothers_job(registry: Registry, add: Callable[..., str]) -> None:
    job_ids = {add() for _ in range(5 * THREADS)}
    barrier = Barrier(THREADS)

    def take_all(k: int) -> list[tuple[str, str]]:
        barrier.wait()
        mine: list[tuple[str, str]] = []
        while found := taken(registry, room=2, owner=f"worker {k}"):
            mine += [(job_id, f"worker {k}") for job_id in found]
        return mine

    with ThreadPoolExecutor(THREADS) as threads:
        owners = [pair for pairs in threads.map(take_all, range(THREADS)) for pair in pairs]
    # A claimer on PostgreSQL passes over what another has just locked, and may find nothing else.
    owners += [(job_id, "w") for job_id in taken(registry)]
    assert len(owners) == len(job_ids)
    assert {job_id for job_id, _ in owners} == job_ids
    for job_id, owner in owners:
        job = read(registry, job_id)
        assert (job.lease_owner, job.attempt) == (owner, 1)


def test_results_are_entered_with_their_places(registry: Registry, add: Callable[..., str]) -> None:
    job_ids = [add(num_images=3), add()]
    told = end(registry, take(registry)[0])
    assert told == [
        Ended(job_ids[0], JobState.SUCCEEDED, "samples/a.npy", 0, num_images=3),
        Ended(job_ids[1], JobState.SUCCEEDED, "samples/a.npy", 10, num_images=1),
    ]
    job = read(registry, job_ids[1])
    assert (job.state, job.progress, job.error) == (JobState.SUCCEEDED, 1.0, None)
    assert (job.artifact, job.artifact_row) == ("samples/a.npy", 10)
    assert (job.lease_owner, job.lease_expires_at) == (None, None)
    assert job.finished_at is not None


def test_a_job_taken_back_is_taken_again_and_its_old_worker_can_neither_renew_nor_end_it(
    registry: Registry, add: Callable[..., str]
) -> None:
    lost, kept = add(), add()
    (old,), _ = take(registry, room=1, lease_seconds=EXPIRED)
    (beside,), _ = take(registry, room=1)
    take_back(registry)
    assert renew(registry, [old, beside]) == ({lost}, set())
    (new,), _ = take(registry, owner="another")
    assert (new.job_id, new.fencing_token) == (lost, old.fencing_token + 1)
    assert renew(registry, [old, beside]) == ({lost}, set())
    assert [one.job_id for one in end(registry, [old, beside])] == [kept]
    assert (read(registry, lost).state, read(registry, lost).artifact) == (JobState.RUNNING, None)
    assert [one.job_id for one in end(registry, [new])] == [lost]
    assert end(registry, [new], JobState.FAILED) == []
    assert (read(registry, lost).state, read(registry, lost).attempt) == (JobState.SUCCEEDED, 2)


def test_renewing_keeps_leases_from_running_out(registry: Registry, add: Callable[..., str]) -> None:
    job_ids = [add(), add()]
    claims, _ = take(registry, lease_seconds=EXPIRED)
    assert renew(registry, claims) == (set(), set())
    take_back(registry)
    assert states(registry, *job_ids) == [JobState.RUNNING] * 2


def test_a_worker_is_told_which_of_its_jobs_are_cancelled(registry: Registry, add: Callable[..., str]) -> None:
    cancelled, _ = add(), add()
    claims, _ = take(registry)
    cancel(registry, cancelled)
    assert renew(registry, claims) == (set(), {cancelled})


def test_a_cancelled_queued_job_is_not_taken(registry: Registry, add: Callable[..., str]) -> None:
    cancelled, other = add(), add()
    cancel(registry, cancelled)
    assert taken(registry) == [other]


@pytest.fixture
def whole(add: Callable[..., str]) -> str:
    """A request that was split into three parts, of 2, 2 and 1 images; their ids are its own with a number."""
    parent = add(id="smp_whole", num_images=5, num_parts=3)
    for k, size in enumerate((2, 2, 1)):
        add(id=f"smp_whole_{k}", parent_id=parent, first_image=2 * k, num_images=size)
    return parent


def parts_of(whole: str) -> list[str]:
    return [f"{whole}_{k}" for k in range(3)]


def set_states(registry: Registry, whole: str, *part_states: JobState) -> None:
    with registry.write() as session:
        for k, (part_id, state) in enumerate(zip(parts_of(whole), part_states, strict=True)):
            part = session.get_one(SampleJob, part_id)
            part.state = state
            if state == JobState.SUCCEEDED:
                part.artifact, part.artifact_row = f"samples/{k}.npy", 10 * k
            if state == JobState.FAILED:
                part.error = f"part {k} failed"


def join(registry: Registry, whole: str) -> tuple[Ended | None, list[list[tuple[str, int, int]]]]:
    """The end of the whole, if it ended, and the parts that were asked to be joined."""
    asked: list[list[tuple[str, int, int]]] = []

    def joined(places: list[tuple[str, int, int]]) -> str:
        asked.append(places)
        return "samples/joined.npy"

    with registry.write() as session:
        return join_parts(session, whole, joined), asked


def forgotten(registry: Registry) -> list[str]:
    with registry.read() as session:
        return forgotten_parents(session)


def test_the_parts_are_taken_and_not_the_whole(registry: Registry, whole: str) -> None:
    claims, _ = take(registry, room=4)
    assert [claim.job_id for claim in claims] == parts_of(whole)[:2]
    assert [ended(claim.job, JobState.SUCCEEDED).parent_id for claim in claims] == [whole] * 2
    assert read(registry, whole).state == JobState.QUEUED


Q, R, S, F, C = JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED


@pytest.mark.parametrize(
    ("part_states", "state", "progress", "error"),
    [
        ((R, Q, Q), R, 0.0, None),
        ((S, R, Q), R, 1 / 3, None),
        ((S, C, S), C, 0.0, None),
        ((C, C, C), C, 0.0, None),
        ((S, F, Q), F, 0.0, "part 1 failed"),
        ((F, C, S), F, 0.0, "part 0 failed"),
        ((F, R, F), F, 0.0, "part 0 failed"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_the_whole_is_what_its_parts_make_it(
    registry: Registry,
    whole: str,
    part_states: tuple[JobState, ...],
    state: JobState,
    progress: float,
    error: str | None,
) -> None:
    set_states(registry, whole, *part_states)
    assert forgotten(registry) == ([] if state == R else [whole])
    told, asked = join(registry, whole)
    assert told == (None if state == R else Ended(whole, state, error=error))
    assert asked == []
    job = read(registry, whole)
    assert (job.state, job.error) == (state, error)
    assert job.progress == pytest.approx(progress)
    assert (job.started_at is not None) == (state == R)
    assert forgotten(registry) == []
    if state != R:
        assert join(registry, whole) == (None, [])


def test_when_all_parts_are_there_they_are_joined_in_order_and_once(registry: Registry, whole: str) -> None:
    set_states(registry, whole, S, S, S)
    assert forgotten(registry) == [whole]
    told, asked = join(registry, whole)
    assert told == Ended(whole, JobState.SUCCEEDED, "samples/joined.npy")
    assert asked == [[("samples/0.npy", 0, 2), ("samples/1.npy", 10, 2), ("samples/2.npy", 20, 1)]]
    job = read(registry, whole)
    assert (job.state, job.progress, job.artifact, job.artifact_row) == (S, 1.0, "samples/joined.npy", 0)
    assert join(registry, whole) == (None, [])
    assert forgotten(registry) == []


def test_a_failed_part_stops_the_others(registry: Registry, whole: str) -> None:
    (claim, *_), _ = take(registry, room=2)
    set_states(registry, whole, R, F, Q)
    join(registry, whole)
    assert states(registry, *parts_of(whole)) == [R, F, C]
    assert renew(registry, [claim]) == (set(), {claim.job_id})


def test_cancelling_the_whole_cancels_its_parts(registry: Registry, whole: str) -> None:
    (claim,), _ = take(registry, room=2)
    join(registry, whole)
    cancel(registry, whole)
    assert states(registry, whole, *parts_of(whole)) == [C, R, C, C]
    assert renew(registry, [claim]) == (set(), {claim.job_id})
    assert taken(registry) == []
    assert end(registry, [claim], C)
    assert join(registry, whole) == (None, [])
    assert forgotten(registry) == []


def test_a_part_that_is_late_makes_the_whole_late(registry: Registry, whole: str) -> None:
    with registry.write() as session:
        session.get_one(SampleJob, parts_of(whole)[1]).deadline_at = utc_now() - timedelta(seconds=1)
    _, told = take(registry)
    assert [(one.job_id, one.parent_id, one.num_images) for one in told] == [(parts_of(whole)[1], whole, 2)]
    assert join(registry, whole)[0] == Ended(whole, F, error=LATE)


def test_a_queue_is_noticed(registry: Registry, add: Callable[..., str], whole: str) -> None:
    def waits() -> bool:
        with registry.read() as session:
            return samples_wait(session)

    assert waits()
    take(registry)
    assert not waits()  # the whole has nothing left to take, though it is still queued
    add()
    assert waits()


def test_leases_do_not_hang_on_the_clocks_of_workers(
    registry: Registry, add: Callable[..., str], monkeypatch: pytest.MonkeyPatch, wrong_by: timedelta
) -> None:
    right = utc_now()
    monkeypatch.setattr("service.registry.samples.utc_now", lambda: right + wrong_by)
    job_id = add()
    claims, _ = take(registry)
    for renewed in (False, True):
        if renewed:
            with registry.write() as session:
                assert renew_samples(session, claims, LEASE_SECONDS) == (set(), set())
        expires_at = read(registry, job_id).lease_expires_at
        assert expires_at is not None
        assert abs(expires_at - right - timedelta(seconds=LEASE_SECONDS)) < timedelta(seconds=LEASE_SECONDS / 2)


def test_the_models_sampled_last_come_with_their_last_requests(
    registry: Registry, add: Callable[..., str], model_id: str, other_model: str
) -> None:
    def used(seed: int, used_model: str, state: JobState = S, **fields: Any) -> None:
        add(request={"seed": seed}, model_id=used_model, state=state, started_at=utc_now(), **fields)

    def last(count: int) -> list[tuple[str, dict[str, Any]]]:
        with registry.read() as session:
            return [(job.model_id, job.request) for job in models_sampled_last(session, count)]

    used(1, model_id)
    used(2, other_model)
    used(3, model_id)
    add(request={"seed": 4}, model_id=other_model)  # Nobody knows yet what becomes of these two.
    used(5, other_model, R)
    both = [(model_id, {"seed": 3}), (other_model, {"seed": 2})]
    assert (last(2), last(1)) == (both, both[:1])
    used(6, model_id, F)
    assert last(2) == both[1:]
    used(7, other_model, R, losses=1)
    assert last(2) == []
    used(8, model_id)
    assert last(2) == [(model_id, {"seed": 8})]


def add_schedule(registry: Registry, model_id: str, version: int = 1) -> str:
    with registry.write() as session:
        key = {"model_id": model_id, "sampler": "ddim", "num_steps": 1, "guidance_type": "uncond"}
        values = {"timesteps": [1.0, 0.0], "t_ratios": [1.0], "provenance": {}}
        exact = {"guidance_scale": Decimal(1), "eta": Decimal(0)}
        schedule = Schedule(**key, **exact, **values, version=version, status=ScheduleStatus.IMPORTED)
        session.add(schedule)
    return schedule.id


def number_of_changes(registry: Registry) -> int:
    with registry.read() as session:
        return changes(session)


def test_the_changes_number_rises_with_models_schedules_and_aliases(
    registry: Registry, model_id: str, other_model: str
) -> None:
    seen = [number_of_changes(registry)]

    def changed() -> bool:
        seen.append(number_of_changes(registry))
        return seen[-1] > seen[-2]

    schedule_id = add_schedule(registry, model_id)
    assert changed()
    with registry.write() as session:
        session.get_one(Schedule, schedule_id).status = ScheduleStatus.REJECTED
    assert changed()
    for named in (schedule_id, add_schedule(registry, model_id, version=2)):
        with registry.write() as session:
            session.merge(ScheduleAlias(model_id=model_id, name="production", schedule_id=named))
        assert changed()
    with registry.write() as session:
        session.delete(session.get_one(ScheduleAlias, (model_id, "production")))
    assert changed()
    with registry.write() as session:
        session.delete(session.get_one(Schedule, schedule_id))
    assert changed()
    with registry.write() as session:
        session.delete(session.get_one(Model, other_model))
    assert changed()


def test_the_changes_number_stays_where_only_jobs_change_or_nothing_is_kept(
    registry: Registry, add: Callable[..., str], model_id: str
) -> None:
    before = number_of_changes(registry)
    add()
    end(registry, take(registry)[0])
    with registry.write() as session:
        session.add(TuningJob(model_id=model_id, request={}))
    with pytest.raises(ZeroDivisionError), registry.write() as session:
        session.get_one(Model, model_id).name = "another"
        session.flush()
        raise ZeroDivisionError
    assert number_of_changes(registry) == before


SPEC = {
    "T": 1.0,
    "num_train_timesteps": None,
    "guidance_types": ["uncond"],
    "num_classes": 0,
    "condition_shape": None,
    "has_uncond_condition": False,
    "sample_shape": [2],
    "image_shape": [2],
}


@pytest.fixture
def submit(registry: Registry, model_id: str) -> Callable[..., Any]:
    """`submit(**request)`: the job, as the API makes it, or why it was refused; one catalog for all."""
    with registry.write() as session:
        session.get_one(Model, model_id).spec = SPEC
    catalog, count = Catalog(), 0

    def submit(**request: Any) -> Any:
        nonlocal count
        count += 1
        body = SampleRequest(**{"model": model_id, "num_steps": 1} | request)
        submission = Submission(f"smp_{count:03d}", body, None)
        return submit_all(registry, Settings(sample_batch_size=4), catalog, [submission])[0]

    return submit


def test_what_is_remembered_of_the_registry_is_forgotten_when_it_changes(
    registry: Registry, model_id: str, submit: Callable[..., Any]
) -> None:
    assert isinstance(submit(schedule="production"), InvalidError)
    schedule_id = add_schedule(registry, model_id)
    with registry.write() as session:
        session.add(ScheduleAlias(model_id=model_id, name="production", schedule_id=schedule_id))
    assert submit(schedule="production").schedule_id == schedule_id
    with registry.write() as session:
        session.delete(session.get_one(ScheduleAlias, (model_id, "production")))
    assert isinstance(submit(schedule="production"), InvalidError)


def test_a_transaction_that_fails_does_not_spoil_what_is_remembered(
    registry: Registry, add: Callable[..., str], submit: Callable[..., Any]
) -> None:
    add(id="smp_001")  # The first request will have this id, too.
    with pytest.raises(Exception, match=r"(?i)unique"):
        submit()
    assert submit().state == JobState.QUEUED


def test_a_request_made_before_has_its_images_at_once(registry: Registry, submit: Callable[..., Any]) -> None:
    first = submit(seed=1)
    end(registry, take(registry)[0])
    again, other = submit(seed=1, deadline_seconds=5, previews=True), submit(seed=2)
    made = read(registry, first.id)
    assert (again.state, again.artifact, again.artifact_row) == (S, made.artifact, made.artifact_row)
    assert (again.started_at, other.state) == (None, Q)


def test_a_request_of_more_images_than_a_worker_holds_is_split(registry: Registry, submit: Callable[..., Any]) -> None:
    whole = submit(num_images=10, seed=5, deadline_seconds=60)
    with registry.read() as session:
        query = select(SampleJob).filter_by(parent_id=whole.id).order_by(SampleJob.first_image)
        parts = session.scalars(query).all()
    assert [(part.first_image, part.num_images, part.request["seed"]) for part in parts] == [
        (0, 4, 5),
        (4, 4, 9),
        (8, 2, 13),
    ]
    assert whole.num_parts == 3
    assert {part.deadline_at for part in parts} == {whole.deadline_at}
    assert submit(num_images=4).num_parts == 0
