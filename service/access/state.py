"""State of access control, made once per application. Endpoints get it as `Access`."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from service.access.keyring import KeyRing
from service.access.limits import RateLimits
from service.state import AppState


@dataclass(frozen=True)
class AccessState:
    """The known API keys, and the counters of their requests."""

    keys: KeyRing
    rates: RateLimits


def access_state(state: AppState) -> AccessState:
    """The access state of an application."""
    return AccessState(KeyRing(state), RateLimits(state.settings.broker_url))


async def _access(request: Request) -> AccessState:
    access: AccessState = request.app.state.access
    return access


Access = Annotated[AccessState, Depends(_access)]
