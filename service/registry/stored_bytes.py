"""How many bytes the artifacts have together, and whether more may be stored: the quota of `MAX_STORED_BYTES`."""

import errno

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.registry.tables import StoredBytes


class NoRoomError(OSError):
    """The artifacts would take more bytes than they may."""

    def __init__(self, stored: int, needed: int, most: int) -> None:
        self.text = quota_text(stored, needed, most)
        super().__init__(errno.EDQUOT, self.text)


def quota_text(stored: int, needed: int, most: int) -> str:
    """The text of a refusal. All numbers are bytes."""
    left = max(0, most - stored)
    return (
        f"{needed} bytes are needed, and {stored} of MAX_STORED_BYTES={most} are taken; accepted: up to {left} bytes, "
        "or more once samples or models are deleted (they are counted every minute)"
    )


def stored_bytes(session: Session) -> int:
    """The bytes of all artifacts, as they were counted last, and those that were taken since."""
    return session.scalar(select(StoredBytes.number)) or 0


def take_bytes(session: Session, needed: int, most: int) -> None:
    """Count bytes that are about to be stored. Of several that ask at once, no two get the same bytes.

    Args:
        most: what all artifacts may have together; 0: there is no quota, and nothing is counted.

    Raises:
        NoRoomError: nothing was counted, and nothing may be stored.
    """
    if not most:
        return
    taking = update(StoredBytes).where(StoredBytes.number + needed <= most)
    values = {"number": StoredBytes.number + needed, "taken": StoredBytes.taken + needed}
    if not session.execute(taking.values(values), execution_options={"synchronize_session": False}).rowcount:  # type: ignore[attr-defined]
        raise NoRoomError(stored_bytes(session), needed, most)


def give_back_bytes(session: Session, number: int) -> None:
    """Count bytes as free that were deleted."""
    _set(session, number=StoredBytes.number - number)


def bytes_ever_taken(session: Session) -> int:
    """The value that `enter_count` is to be given: the counter's before the artifacts were counted."""
    return session.scalar(select(StoredBytes.taken)) or 0


def enter_count(session: Session, counted: int, taken_before: int) -> None:
    """Replace the number of stored bytes by what was counted, and what was taken since the counting began.

    What is stored while others count may be counted twice, until the next count.
    """
    _set(session, number=counted + StoredBytes.taken - taken_before)


def _set(session: Session, **values: object) -> None:
    session.execute(update(StoredBytes).values(values), execution_options={"synchronize_session": False})
