"""The `Prefer` header (RFC 7240): whether a request waits for its job, and how long."""

import re
from typing import Annotated

from fastapi import Header

Prefer = Annotated[
    str | None, Header(description="`respond-async`: answer 202 at once; `wait=N`: wait up to N seconds.")
]


def read_preference(prefer: str | None, longest: float) -> tuple[bool, float]:
    """Whether to answer at once, and else how long to wait."""
    prefer = prefer or ""
    wait = re.search(r"\bwait\s*=\s*(\d{1,6})\b", prefer)
    return "respond-async" in prefer and wait is None, min(float(wait[1]), longest) if wait else longest
