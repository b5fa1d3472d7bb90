"""Completion of values by a shell: models, samplers, tuners and grids."""

import os
from contextlib import suppress
from itertools import islice

from service.client.choices import BUILTINS, GRIDS, OBJECTIVES, SAMPLERS

SECONDS = 2.0  # A shell waits for a completion.
MAX_MODELS = 200


def complete_samplers(incomplete: str) -> list[str]:
    return _beginning(incomplete, SAMPLERS)


def complete_grids(incomplete: str) -> list[str]:
    return _beginning(incomplete, GRIDS)


def complete_builtins(incomplete: str) -> list[str]:
    return _beginning(incomplete, BUILTINS)


def complete_objectives(incomplete: str) -> list[str]:
    """The objectives that may end a list, such as `solver,dm`."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in _beginning(last, OBJECTIVES)]


def complete_models(incomplete: str) -> list[str]:
    """The names of models of the service that runs. None is started for it, and no error is told."""
    from service.cli.connection import home
    from service.up.announcement import running_url

    with suppress(Exception):
        from service.client import TimeTuner

        url = os.environ.get("TIMETUNER_URL") or running_url(home())
        if url is not None:
            with TimeTuner(url, timeout=SECONDS, max_attempts=1) as client:
                models = islice(client.models.list(sort="name", limit=MAX_MODELS), MAX_MODELS)
                return _beginning(incomplete, dict.fromkeys(model.name for model in models))
    return []


def _beginning(incomplete: str, names: "tuple[str, ...] | dict[str, None]") -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
