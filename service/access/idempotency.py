"""Requests with an `Idempotency-Key`: they may be sent again, and are done once."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol, Self, TypeVar

from fastapi import Header
from sqlalchemy import delete, insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.access.callers import Caller
from service.http.errors import ConflictError
from service.registry.database import Registry
from service.registry.tables import IdempotencyKey

GivenKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description="A key of your choice. A request repeated with its key finds what the first one made.",
    ),
]


class Made(Protocol):
    """A row with an id."""

    id: str


Row = TypeVar("Row", bound=Made)


@dataclass(frozen=True)
class Once:
    """A request with a key. Each caller and operation has keys of its own.

    Attributes:
        given: the key as it was sent.
        key: the hash of caller, operation and key that the registry stores.
        request_hash: the hash of the request.
    """

    given: str
    key: str
    request_hash: str

    @classmethod
    def of(cls, caller: Caller, operation: str, given: str | None, request: str) -> Self | None:
        """None for a request without a key."""
        if given is None:
            return None
        return cls(given, _hash(caller.owner or "", operation, given), _hash(request))

    def found(self, session: Session) -> str | None:
        """The id of what the first request made, if this is not the first. Raises: ConflictError, if it was another."""
        row = session.get(IdempotencyKey, self.key)
        if row is not None and row.request_hash != self.request_hash:
            message = "this Idempotency-Key was used with another request; accepted: a new key, or the same request"
            raise ConflictError(message, ("header", "Idempotency-Key"), self.given)
        return None if row is None else row.object_id

    def remember(self, session: Session, object_id: str) -> None:
        """Store the id of the row that the request made, in the same transaction.

        Raises: IntegrityError, if the same request came at the same time.
        """
        values = {"key": self.key, "request_hash": self.request_hash, "object_id": object_id}
        session.execute(insert(IdempotencyKey).values(values))

    def forget(self, session: Session) -> None:
        """Have this request be the first one, as what the first one made is gone."""
        session.execute(delete(IdempotencyKey).where(IdempotencyKey.key == self.key))


def make_once(
    registry: Registry, once: Once | None, find: Callable[[Session, str], Row], make: Callable[[Session], Row]
) -> tuple[Row, bool]:
    """Make a row in one transaction, or find the row that the same request made before.

    Returns:
        The row, and whether it was made now.

    Raises: ConflictError, if the key was used with another request; and the errors of `find` and `make`.
    """
    for again in (True, False):
        try:
            with registry.write() as session:
                if once is not None and (object_id := once.found(session)):
                    return find(session, object_id), False
                row = make(session)
                session.flush()
                if once is not None:
                    once.remember(session, row.id)
                return row, True
        except IntegrityError:  # The same request may have come at the same time. If so, the second try finds its row.
            if not again:
                raise
    raise AssertionError("not reached")


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
