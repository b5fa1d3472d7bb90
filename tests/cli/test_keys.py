"""`timetuner keys`: what it makes, shows and refuses."""

from pathlib import Path

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from service.cli import app
from service.registry.database import Registry
from service.registry.tables import ApiKey
from tests.registry.conftest import registry  # noqa: F401
from tests.service.conftest import keys


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
    ("arguments", "message"),
    [
        (["create", "--name", "n", "--scope", "everything"], "'models:write'"),
        (["create", "--name", "n", "--expires-in", "0d"], "12h or 90d"),
        (["create", "--name", "n", "--expires-in", "soon"], "12h or 90d"),
        (["create", "--name", "n", "--expires-in", "999999999d"], "12h or 90d"),
        (["create", "--name", "n", "--requests-per-minute", "0"], "--requests-per-minute"),
        (["create", "--name", "a\nb"], "printable"),
        (["create"], "--name"),
        (["revoke", "key_nobodys"], "timetuner keys list"),
    ],
)
def test_the_command_says_what_it_would_accept(
    registry: Registry,  # noqa: F811
    arguments: list[str],
    message: str,
) -> None:
    environment = {"DATABASE_URL": registry.url.render_as_string(hide_password=False), "COLUMNS": "200"}
    result = CliRunner().invoke(app, ["keys", *arguments], env=environment)
    assert result.exit_code == 2
    assert message in result.stderr
    with registry.read() as session:
        assert session.scalars(select(ApiKey)).all() == []


def test_the_command_says_in_one_line_that_there_is_no_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'nowhere' / 'registry.sqlite'}"
    result = CliRunner().invoke(app, ["keys", "create", "--name", "n"], env={"DATABASE_URL": url})
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "timetuner db upgrade" in result.stderr
