"""An API that asks for keys, beside the one that does not; and keys for it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx
import pytest
from typer.testing import CliRunner

from service.cli import app
from service.registry.database import Registry
from service.registry.keys import Scope, create_key
from tests.stack import Stack, wait_until


@dataclass(frozen=True)
class User:
    """A key's id, its text, and a client that presents it."""

    id: str
    key: str
    client: httpx.Client


NewUser: TypeAlias = Callable[..., User]


def keys(registry: Registry, *arguments: str) -> str:
    """The output of `timetuner keys` on this database."""
    environment = {"DATABASE_URL": registry.url.render_as_string(hide_password=False)}
    result = CliRunner().invoke(app, ["keys", *arguments], env=environment)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


@pytest.fixture(scope="session")
def guarded(stack: Stack) -> Iterator[str]:
    """The URL of an API that asks for keys."""

    def answers() -> bool:
        try:
            return httpx.get(f"{stack.guarded_url}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    stack.start("guarded api")
    wait_until(answers, "API that asks for keys")
    yield stack.guarded_url
    stack.end("guarded api")


@pytest.fixture(scope="session")
def new_user(stack: Stack, guarded: str) -> Iterator[NewUser]:
    """`new_user(*scopes, **fields)`: somebody with a new key."""
    clients: list[httpx.Client] = []

    def new_user(*scopes: Scope, **fields: Any) -> User:
        with stack.registry.write() as session:
            key, text = create_key(session, "test", scopes, **fields)
        client = httpx.Client(base_url=guarded, timeout=60, headers={"Authorization": f"Bearer {text}"})
        clients.append(client)
        return User(key.id, text, client)

    yield new_user
    for client in clients:
        client.close()
