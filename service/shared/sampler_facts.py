"""The facts of each sampler that requests depend on, for processes without PyTorch."""

import json
import logging
import subprocess
import threading
from functools import cache
from typing import Any

from service.shared.processes import python
from timetuner_core.catalog import SAMPLER_FACTS, SamplerFacts, sampler_names

LOAD_SECONDS = 120.0

logger = logging.getLogger(__name__)
_lock = threading.Lock()


class SamplersUnknownError(Exception):
    """The samplers of installed packages could not be loaded. The next call tries again."""


class _FailedError(Exception):
    """The process that loads the packages ended with an error. Its text is the last line that the process wrote."""


def sampler_facts(name: str) -> SamplerFacts:
    """The facts of a sampler of this package, or of one that an installed package adds.

    Raises:
        ValueError: no such name, or a package's sampler that cannot be loaded.
        SamplersUnknownError: see `installed_samplers`.
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

    The first call takes seconds: it loads the packages, which need PyTorch, in a process of its own. Where that
    process fails, for lack of PyTorch say, all have its error.

    Raises:
        SamplersUnknownError: that process could not be run, did not end in time, or was killed.
    """
    with _lock:
        try:
            return _installed_samplers()
        except _FailedError as error:
            return {name: {"error": str(error)} for name in sampler_names() if name not in SAMPLER_FACTS}
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            raise SamplersUnknownError(f"the samplers of installed packages cannot be loaded now ({error})") from error


def load_installed_samplers() -> None:
    """Load them before a request needs them. A failure is logged, as the first request tries again."""
    try:
        installed_samplers()
    except SamplersUnknownError as error:
        logger.warning("%s", error)


@cache
def _installed_samplers() -> dict[str, dict[str, Any]]:
    if all(name in SAMPLER_FACTS for name in sampler_names()):
        return {}
    command = python("-m", "timetuner_core.samplers")
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LOAD_SECONDS)
    if run.returncode > 0:
        raise _FailedError(run.stderr.strip().rpartition("\n")[2] or f"exit status {run.returncode}")
    run.check_returncode()
    facts: dict[str, dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return facts
