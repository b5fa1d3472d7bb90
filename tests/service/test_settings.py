"""Settings that the environment gives, and those that it does not."""

from pathlib import Path

import pytest

from service.shared.settings import Settings

# Variables that shells, terminals, systemd, containers and CI systems set for themselves.
SET_BY_SYSTEMS = {
    "CI",
    "HOME",
    "HOSTNAME",
    "LANG",
    "LOGNAME",
    "MAIL",
    "PATH",
    "PWD",
    "SHELL",
    "TERM",
    "USER",
    "XDG_DATA_HOME",
}


def test_the_default_home_is_a_folder_of_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TIMETUNER_HOME", "DATABASE_URL", "ARTIFACTS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    assert settings.timetuner_home == Path("timetuner-data")
    assert settings.database_url == f"sqlite:///{tmp_path}/timetuner-data/registry.sqlite"
    assert settings.artifacts_url == f"file://{tmp_path}/timetuner-data/artifacts"


def test_no_setting_is_read_from_a_variable_that_systems_set() -> None:
    variables = {name.upper() for name in Settings.model_fields}
    assert not variables & SET_BY_SYSTEMS
