"""What requests depend on of each sampler, for processes without PyTorch."""

import json
import subprocess
import threading
from functools import cache
from typing import Any

from service.shared.processes import python
from timetuner_core.catalog import SAMPLER_FACTS, SamplerFacts, sampler_names

LOAD_SECONDS = 120.0

_lock = threading.Lock()


def sampler_facts(name: str) -> SamplerFacts:
    """The facts of a sampler of this package, or of one that an installed package adds.

    Raises:
        ValueError: no such name, or a package's sampler that cannot be loaded.
    """
    if name in SAMPLER_FACTS:
        return SAMPLER_FACTS[name]
    if name not in sampler_names():
        raise ValueError(f"sampler is {name!r}; accepted: {', '.join(sampler_names())}")
    facts = installed_samplers().get(name, {"error": "its package was installed after this process started"})
    if "error" in facts:
        raise ValueError(f"the sampler {name!r} cannot be loaded ({facts['error']})")
    return SamplerFacts(**facts)


def installed_samplers() -> dict[str, dict[str, Any]]:
    """The facts, or the `error`, of each sampler that an installed package adds.

    The first call takes seconds: it loads the packages, which need PyTorch, in a process of its own. If that process
    cannot be run or does not end in time, all have that error, and the next call tries again.
    """
    with _lock:
        try:
            return _installed_samplers()
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            return {name: {"error": str(error)} for name in sampler_names() if name not in SAMPLER_FACTS}


@cache
def _installed_samplers() -> dict[str, dict[str, Any]]:
    if all(name in SAMPLER_FACTS for name in sampler_names()):
        return {}
    command = python("-m", "timetuner_core.samplers")
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LOAD_SECONDS)
    facts: dict[str, dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return facts
