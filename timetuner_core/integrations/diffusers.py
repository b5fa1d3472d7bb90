"""The module that a saved pipeline names for its tuned scheduler; `import timetuner_core` imports it.

`DiffusionPipeline.from_pretrained` reads a component's module and class from `model_index.json`, and accepts only
modules that are imported already. Importing diffusers takes seconds, so it waits until the class is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timetuner_core.integrations.time_tuner_scheduler import TimeTunerScheduler

__all__ = ["TimeTunerScheduler"]

# diffusers also looks for its own base classes here: it loads a class by the methods of the base class it derives from.
_IMPORTED_WHEN_ASKED_FOR = ("TimeTunerScheduler", "TimeTunerSchedulerOutput", "SchedulerMixin")


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from timetuner_core.integrations import time_tuner_scheduler

    return getattr(time_tuner_scheduler, name)
