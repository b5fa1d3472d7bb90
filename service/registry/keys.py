"""API keys: their text, the part of it that the registry stores, and what they have used.

A key's text is `tt_<prefix>_<secret>`. The row is found by the prefix and holds only a hash of the secret. The hash is
a plain SHA-256: slow hashes protect passwords that can be guessed, and nobody can guess 256 random bits.
"""

import hashlib
import re
import secrets
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import exists, or_, select, update
from sqlalchemy.orm import Session

from service.registry.tables import ApiKey, AuditEntry, JobState, SampleJob, TuningJob
from service.registry.types import utc_now

KEY_TEXT = re.compile(r"tt_([0-9a-f]{12})_([0-9a-f]{64})", re.ASCII)
LAST_USED_RESOLUTION_SECONDS = 60.0
CLI_ACTOR = "cli"  # The audit log names the `timetuner` command so.


class Scope(StrEnum):
    """A permission beyond reading models, schedules and the key's own jobs. `admin` may do everything."""

    SAMPLE = "sample"
    TUNE = "tune"
    MODELS_WRITE = "models:write"
    ADMIN = "admin"


def create_key(
    session: Session,
    name: str,
    scopes: Collection[Scope] = (),
    expires_in: timedelta | None = None,
    requests_per_minute: int | None = None,
    pixel_steps_per_day: int | None = None,
) -> tuple[ApiKey, str]:
    """Make a key. Returns its row, and its text, which is not stored and cannot be read again."""
    prefix, secret = secrets.token_hex(6), secrets.token_hex(32)
    key = ApiKey(
        name=name,
        prefix=prefix,
        secret_hash=hash_secret(secret),
        scopes=[str(scope) for scope in scopes],
        requests_per_minute=requests_per_minute,
        pixel_steps_per_day=pixel_steps_per_day,
        expires_at=None if expires_in is None else utc_now() + expires_in,
    )
    session.add(key)
    session.flush()
    session.add(AuditEntry(actor=CLI_ACTOR, action="create_key", object=key.id, outcome="done"))
    return key, f"tt_{prefix}_{secret}"


def revoke_key(session: Session, key_id: str) -> ApiKey | None:
    """Revoke a key; None if there is no such key. A key that was revoked before is left unchanged.

    The dispatcher cancels its jobs: see `jobs_of_revoked_keys`.
    """
    key = session.get(ApiKey, key_id)
    if key is not None and key.revoked_at is None:
        key.revoked_at = utc_now()
        session.add(AuditEntry(actor=CLI_ACTOR, action="revoke_key", object=key.id, outcome="done"))
    return key


def is_valid(session: Session, key_id: str) -> bool:
    """Whether a key was neither revoked nor has expired."""
    return bool(valid_keys(session, [key_id]))


def valid_keys(session: Session, key_ids: Collection[str]) -> set[str]:
    """Those of some keys that were neither revoked nor have expired."""
    unexpired = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > utc_now())
    query = select(ApiKey.id).where(ApiKey.id.in_(key_ids), ApiKey.revoked_at.is_(None), unexpired)
    return set(session.scalars(query))


def jobs_of_revoked_keys(session: Session, job_class: type[TuningJob | SampleJob], limit: int = 100) -> Sequence[str]:
    """Jobs of revoked keys that are queued or running, and not yet to be cancelled.

    A request may have made some after its key was revoked: its API process did not know it yet.
    """
    revoked = select(ApiKey.id).where(ApiKey.revoked_at.is_not(None))
    is_open = job_class.state.in_((JobState.QUEUED, JobState.RUNNING)) & ~job_class.cancel_requested
    query = select(job_class.id).where(is_open, job_class.owner.in_(revoked))
    if job_class is SampleJob:
        query = query.where(SampleJob.parent_id.is_(None))  # Parts are cancelled with the whole.
    return session.scalars(query.order_by(job_class.id).limit(limit)).all()


def list_keys(session: Session) -> Sequence[ApiKey]:
    """All keys, the newest first."""
    return session.scalars(select(ApiKey).order_by(ApiKey.id.desc())).all()


def find_key(session: Session, prefix: str) -> ApiKey | None:
    return session.scalar(select(ApiKey).where(ApiKey.prefix == prefix))


def any_key(session: Session) -> bool:
    """Whether there is any key. Revoked and expired keys count."""
    return bool(session.scalar(select(exists(select(ApiKey.id)))))


def hash_secret(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def note_use(session: Session, key_id: str, now: datetime) -> None:
    session.execute(update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=now))


def charge(session: Session, key_id: str, costs: Sequence[int]) -> list[int | None]:
    """Count costs against a key's daily quota. Gives None for each cost that fits, and what was left for the others.

    The key's row stays locked until the transaction ends, so that simultaneous requests cannot exceed the quota
    together. A transaction that charges several keys goes by their ids, which prevents deadlocks.
    """
    key = session.get_one(ApiKey, key_id, with_for_update={"key_share": True}, populate_existing=True)
    today = utc_now().date()
    if key.quota_day != today:
        key.quota_day, key.quota_used = today, 0
    left: list[int | None] = []
    for cost in costs:
        if key.pixel_steps_per_day is not None and key.quota_used + cost > key.pixel_steps_per_day:
            left.append(max(0, key.pixel_steps_per_day - key.quota_used))
        else:
            key.quota_used += cost
            left.append(None)
    return left
