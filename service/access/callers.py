"""Who makes a request, and what they may do and see."""

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import insert
from sqlalchemy.orm import Session

from service.registry.keys import Scope
from service.registry.tables import ApiKey, AuditEntry, SampleJob, TuningJob

CALLER = "timetuner.caller"  # where a request's scope has it


@dataclass(frozen=True)
class Caller:
    """An API key; or, without one, anybody on this machine while no key is needed, who may do everything."""

    key: ApiKey | None = None
    request_id: str | None = None

    @property
    def owner(self) -> str | None:
        """Of the jobs that this request makes."""
        return None if self.key is None else self.key.id

    def may(self, scope: Scope) -> bool:
        return self.key is None or scope in self.key.scopes or Scope.ADMIN in self.key.scopes

    def sees(self, job: TuningJob | SampleJob) -> bool:
        """Whether a job is the caller's to see; of others they must not even learn that they exist."""
        return job.owner == self.owner or self.may(Scope.ADMIN)

    def record(self, session: Session, action: str, object: str, outcome: str = "done") -> None:
        """Write into the audit log, in the transaction of what was done; of nobody in particular, nothing."""
        record_all(session, action, [(self, object)], outcome)


def record_all(session: Session, action: str, done: Iterable[tuple[Caller, str]], outcome: str = "done") -> None:
    """Write into the audit log who did the same to which objects."""
    same = {"action": action, "outcome": outcome}
    entries = [
        {**same, "actor": caller.key.id, "object": object[:255], "request_id": caller.request_id}
        for caller, object in done
        if caller.key is not None
    ]
    if entries:
        # By Core, for speed: each request for samples has an entry.
        session.connection().execute(insert(AuditEntry.__table__), entries)  # type: ignore[arg-type]


ANYBODY = Caller()
