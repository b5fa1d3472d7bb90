"""Documents that say where things are are true: the lists of imports, and CONTRIBUTING.md."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# These put the parts together, so they may import any of them.
COMPOSED = {"service.__init__", "service.__main__", "service.app"}


def test_every_module_of_the_service_and_package_of_the_core_has_a_list_of_what_it_may_import() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    listed = {contract["source"] for contract in contracts if contract["type"] == "allowed"}
    modules = {f"service.{path.stem}" for path in (ROOT / "service").iterdir() if path.suffix == ".py" or path.is_dir()}
    modules = {name for name in modules if not name.endswith("__pycache__")}
    core = {f"timetuner_core.{path.parent.name}" for path in (ROOT / "timetuner_core").glob("*/__init__.py")}
    assert (modules - COMPOSED) | core <= listed
    assert {"worker", "migrations", "timetuner_core"} <= listed


def test_contributing_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:\w+/|\.ci/)[\w./-]+|worker|migrations|[A-Z]+\.md|\w+\.(?:lock|toml|yml))`", text))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", text))
    assert len(named) > 50
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
