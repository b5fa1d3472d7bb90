"""The `timetuner` command; `python -m timetuner` is the same.

Our packages have names that other folders have, too. They are imported from the folder of this file, whatever else of
their names is on the path.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

PACKAGES = ("service", "worker", "migrations", "timetuner_core")


def main() -> None:
    """Run the command of the process's arguments."""
    _import_our_packages()
    from service.cli import main as run

    run()


def _import_our_packages() -> None:
    folder = str(Path(__file__).resolve().parent)
    for name in PACKAGES:
        spec = PathFinder.find_spec(name, [folder])
        if spec is None or spec.loader is None:
            raise ImportError(f"{folder} has no package {name!r}; install timetuner again, into a new environment")
        sys.modules[name] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
