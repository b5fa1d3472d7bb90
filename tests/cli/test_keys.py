"""`timetuner keys`: what it makes, shows and refuses."""

import json
from pathlib import Path

import pytest
from sqlalchemy import select

from service.registry.database import Registry
from service.registry.tables import ApiKey
from tests.cli.conftest import Run
from tests.keys import keys
from tests.registry.conftest import registry  # noqa: F401


def test_a_key_has_what_the_command_gives_it(registry: Registry) -> None:  # noqa: F811
    limits = ["--requests-per-minute", "60", "--pixel-steps-per-day", "1000000"]
    scopes = ["--scope", "sample", "--scope", "models:write"]
    text = keys(registry, "create", "--name", "Ann's laptop", "--expires-in", "90d", *scopes, *limits)
    with registry.read() as session:
        key = session.scalars(select(ApiKey)).one()
    assert text.startswith(f"tt_{key.prefix}_")
    assert key.expires_at is not None
    assert (key.expires_at - key.created_at).days in (89, 90)
    assert (key.name, key.scopes) == ("Ann's laptop", ["sample", "models:write"])
    assert (key.requests_per_minute, key.pixel_steps_per_day) == (60, 1_000_000)
    _, line = keys(registry, "list").splitlines()
    told = (key.id, key.prefix, "Ann's laptop", "sample, models:write", "60 requests a minute", "until", "never")
    assert all(part in line for part in told)
    assert text.rpartition("_")[2] not in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["create", "--name", "n", "--scope", "everything"], 2, "models:write"),
        (["create", "--name", "n", "--expires-in", "0d"], 2, "12h or 90d"),
        (["create", "--name", "n", "--expires-in", "soon"], 2, "12h or 90d"),
        (["create", "--name", "n", "--expires-in", "999999999d"], 2, "12h or 90d"),
        (["create", "--name", "n", "--requests-per-minute", "0"], 2, "--requests-per-minute"),
        (["create", "--name", "a\nb"], 2, "printable"),
        (["create"], 2, "--name"),
        (["revoke", "key_nobodys"], 5, "timetuner keys list"),
    ],
)
def test_the_command_says_what_it_would_accept(
    registry: Registry,  # noqa: F811
    timetuner: Run,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    result = timetuner("keys", *arguments, DATABASE_URL=registry.url.render_as_string(hide_password=False))
    assert (result.code, result.out) == (code, "")
    assert len(result.err.splitlines()) == 1
    assert message in result.err
    with registry.read() as session:
        assert session.scalars(select(ApiKey)).all() == []


def test_the_command_says_in_one_line_that_there_is_no_database(tmp_path: Path, timetuner: Run) -> None:
    url = f"sqlite:///{tmp_path / 'nowhere' / 'registry.sqlite'}"
    result = timetuner("keys", "create", "--name", "n", DATABASE_URL=url)
    assert (result.code, result.out) == (3, "")
    assert len(result.err.splitlines()) == 1
    assert "timetuner db upgrade" in result.err


def test_keys_are_json_on_request(registry: Registry, timetuner: Run) -> None:  # noqa: F811
    url = registry.url.render_as_string(hide_password=False)
    made = json.loads(timetuner("keys", "create", "--name", "n", "--scope", "tune", "--json", DATABASE_URL=url).out)
    assert made["key"].startswith(f"tt_{made['prefix']}_")
    revoked = json.loads(timetuner("keys", "revoke", made["id"], "--json", DATABASE_URL=url).out)
    [listed] = json.loads(timetuner("keys", "list", "--json", DATABASE_URL=url).out)
    assert listed == revoked
    assert (listed["id"], listed["scopes"], "key" in listed) == (made["id"], ["tune"], False)
    assert listed["revoked_at"] is not None
