"""Commands without a URL: the home's service, begun for them and ended with them."""

import json
import os
import subprocess
from pathlib import Path

import psutil
from starlette.testclient import TestClient

from service.app import create_app
from service.registry.database import Registry
from service.shared.settings import Settings
from tests.cli.conftest import COMMAND


def processes_of(home: Path) -> list[str]:
    """The command lines of all processes that have this home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TIMETUNER_HOME") == str(home):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def register_in(home: Path) -> str:
    """The id of a model that the home's registry knows from before."""
    settings = Settings(timetuner_home=home, broker_url=f"redis+socket://{home / 'none.sock'}")
    registry = Registry(settings.database_url)
    registry.upgrade()
    registry.close()
    with TestClient(create_app(settings), "http://127.0.0.1", client=("127.0.0.1", 50000)) as client:
        model_id: str = client.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"]
    return model_id


def test_a_command_without_a_url_brings_its_own_service_and_leaves_nothing_behind(tmp_path: Path) -> None:
    unset = ("TIMETUNER_URL", "TIMETUNER_API_KEY", "DATABASE_URL", "BROKER_URL", "ARTIFACTS_URL")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"TIMETUNER_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    tune = ["--num-steps", "2", "--tuner", "total_iters=1", "--tuner", "population_size=16"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False)
        assert processes_of(tmp_path / "home") == []
        return done

    registered = register_in(tmp_path / "home")
    tuned = run("tune", "mixture-ring", *tune, "--evaluation", "num_samples=16", "--json")
    assert tuned.returncode == 0, tuned.stderr
    assert tuned.stderr.startswith(f"starting a service in {tmp_path / 'home'} for this command")
    assert json.loads(tuned.stdout)["schedule"]["model"] == registered
    assert not (tmp_path / "home" / "url").exists()
