"""Requests that may come twice, but shall be done once: those with an `Idempotency-Key`."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol, Self, TypeVar

from fastapi import Header
from sqlalchemy import insert
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
        description="Of your choice: repeated with its key, a request finds what the first one made.",
    ),
]


class Made(Protocol):
    """A row with an id."""

    id: str


Row = TypeVar("Row", bound=Made)


@dataclass(frozen=True)
class Once:
    """A request with a key. Keys are of one caller and one operation: others may use the same.

    Attributes:
        given: the key as it came. key: what the registry has of it and whose it is. request_hash: of the request.
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
        """In the transaction that makes it. Raises: IntegrityError, if the same request came at the same time."""
        values = {"key": self.key, "request_hash": self.request_hash, "object_id": object_id}
        session.execute(insert(IdempotencyKey).values(values))


def make_once(
    registry: Registry, once: Once | None, find: Callable[[Session, str], Row], make: Callable[[Session], Row]
) -> tuple[Row, bool]:
    """What `make` makes, or what it made for the same request before; and whether it was made now.

    Raises: ConflictError, and what `find` and `make` raise.
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
        except IntegrityError:  # perhaps the same request, at the same time
            if not again:
                raise
    raise AssertionError("not reached")


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
