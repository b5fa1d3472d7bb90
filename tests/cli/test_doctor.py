"""`timetuner doctor` on this machine: what is well, and what is not and how to mend it."""

import json
import signal
import socket
from pathlib import Path

import pytest
from sqlalchemy import text

from service.registry.database import Registry
from service.registry.stored_bytes import take_bytes
from tests.cli.conftest import Run
from tests.registry.conftest import registry  # noqa: F401
from tests.stack import free_port

LOCAL = {"python", "packages", "device", "memory", "home", "database", "broker", "port"}


def examine(
    timetuner: Run, tmp_path: Path, *arguments: str, **environment: str
) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and the findings by check."""
    port = [] if "--port" in arguments else ["--port", str(free_port())]
    result = timetuner("doctor", "--json", *port, *arguments, TIMETUNER_HOME=str(tmp_path / "home"), **environment)
    findings = {finding["check"]: finding for finding in json.loads(result.out)}
    assert result.code == (0 if all(finding["ok"] for finding in findings.values()) else 1)
    return result.code, findings


def test_a_machine_that_has_all_is_well(timetuner: Run, tmp_path: Path) -> None:
    code, findings = examine(timetuner, tmp_path)
    assert code == 0, findings
    assert findings.keys() == LOCAL
    assert "none yet; timetuner up makes it" in findings["database"]["found"]
    assert "Valkey" in findings["broker"]["found"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "check", "mend"),
    [
        ({"DEVICE": "cuda:77"}, "device", "set DEVICE to auto, cpu, or a device that this machine has"),
        ({"DEVICE": "abacus"}, "settings", "set the variable to what is accepted, or not at all"),
        ({"BROKER_URL": "redis://user:secret@127.0.0.1:1/0"}, "broker", "start it, and set BROKER_URL to where it is"),
        ({"DATABASE_URL": "postgresql://u:secret@127.0.0.1:1/db"}, "database", "start it, and set DATABASE_URL"),
    ],
)
def test_what_is_missing_is_named_without_passwords(
    timetuner: Run, tmp_path: Path, environment: dict[str, str], check: str, mend: str
) -> None:
    _, findings = examine(timetuner, tmp_path, **environment)
    assert [name for name, finding in findings.items() if not finding["ok"]] == [check]
    assert findings[check]["mend"].startswith(mend)
    assert "secret" not in str(findings)


def test_an_old_schema_is_found(
    timetuner: Run,
    registry: Registry,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from alembic import command

    from service.registry.database import alembic_config

    url = registry.url.render_as_string(hide_password=False)
    _, findings = examine(timetuner, tmp_path, DATABASE_URL=url)
    assert findings["database"]["ok"]
    command.downgrade(alembic_config(url), "-1")
    _, findings = examine(timetuner, tmp_path, DATABASE_URL=url)
    assert (findings["database"]["ok"], findings["database"]["mend"]) == (False, "timetuner db upgrade")
    assert timetuner("db", "upgrade", "--json", DATABASE_URL=url).code == 0
    _, findings = examine(timetuner, tmp_path, DATABASE_URL=url)
    assert findings["database"]["ok"]
    with registry.write() as session:
        take_bytes(session, 2**30, 2**31)
    _, findings = examine(timetuner, tmp_path, DATABASE_URL=url, MAX_STORED_BYTES=str(2**31))
    assert (findings["store"]["ok"], findings["store"]["found"][:18]) == (True, "1.0 GiB of 2.0 GiB")
    _, findings = examine(timetuner, tmp_path, DATABASE_URL=url, MAX_STORED_BYTES=str(2**30))
    assert not findings["store"]["ok"]
    with registry.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0007'"))
    _, findings = examine(timetuner, tmp_path, DATABASE_URL=url)
    mend = "run `timetuner db upgrade` of commit e4c2e61 on it first"
    assert (findings["database"]["ok"], findings["database"]["mend"]) == (False, mend)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # `up` would have the tests' process ignore Ctrl-C
    for arguments in (("db", "upgrade"), ("up", "--port", str(free_port()), "--unlisted", "--home", str(tmp_path))):
        refused = timetuner(*arguments, DATABASE_URL=url)
        assert (refused.code, refused.out) == (3, "")
        assert "has schema 0007" in refused.err
        assert mend in refused.err


def test_a_port_in_use_is_found(timetuner: Run, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        _, findings = examine(timetuner, tmp_path, "--port", str(taken.getsockname()[1]))
    assert (findings["port"]["ok"], "timetuner up --port" in findings["port"]["mend"]) == (False, True)


def test_what_is_not_well_is_a_line_that_says_how_to_mend_it(timetuner: Run, tmp_path: Path) -> None:
    environment = {"TIMETUNER_HOME": str(tmp_path), "DEVICE": "cuda:77"}
    result = timetuner("doctor", "--port", str(free_port()), **environment)
    [line] = [line for line in result.out.splitlines() if " BAD " in line]
    assert (result.code, line.split()[0]) == (1, "device")
    assert "set DEVICE to auto" in line
