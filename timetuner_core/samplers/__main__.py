"""`python -m timetuner_core.samplers` prints the facts of the samplers that installed packages add, as a line of JSON.

A process that has to do without PyTorch learns them so. A sampler that cannot be loaded has its `error` instead.
"""

import json
from dataclasses import asdict
from importlib.metadata import entry_points
from typing import Any

from timetuner_core.catalog import SAMPLER_ENTRY_POINTS
from timetuner_core.samplers import get_sampler


def _facts_of(name: str) -> dict[str, Any]:
    try:
        return asdict(get_sampler(name).facts)
    except Exception as error:  # A package's code may raise anything.
        return {"error": str(error)}


if __name__ == "__main__":
    print()  # Packages may have written a part of a line.
    print(json.dumps({entry.name: _facts_of(entry.name) for entry in entry_points(group=SAMPLER_ENTRY_POINTS)}))
