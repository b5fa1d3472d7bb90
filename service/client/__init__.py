"""The Python client of the service: `TimeTuner`, and `AsyncTimeTuner` for asyncio."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.client.asynchronous import AsyncModelRegistration, AsyncSampleJob, AsyncTimeTuner, AsyncTuningJob
    from service.client.errors import (
        ApiError,
        ConflictError,
        ForbiddenError,
        InvalidError,
        JobFailedError,
        NoScheduleError,
        NotFoundError,
        NotReadyError,
        ServerError,
        TimeTunerError,
        TooManyRequestsError,
        UnauthenticatedError,
        UnexpectedAnswerError,
        UnreachableError,
        WaitTimeoutError,
    )
    from service.client.results import Evaluation, Model, Resolution, Samples, Schedule, ScheduleExport, TuningGroup
    from service.client.synchronous import ModelRegistration, SampleJob, TimeTuner, TuningJob

__all__ = [
    "ApiError",
    "AsyncModelRegistration",
    "AsyncSampleJob",
    "AsyncTimeTuner",
    "AsyncTuningJob",
    "ConflictError",
    "Evaluation",
    "ForbiddenError",
    "InvalidError",
    "JobFailedError",
    "Model",
    "ModelRegistration",
    "NoScheduleError",
    "NotFoundError",
    "NotReadyError",
    "Resolution",
    "SampleJob",
    "Samples",
    "Schedule",
    "ScheduleExport",
    "ServerError",
    "TimeTuner",
    "TimeTunerError",
    "TooManyRequestsError",
    "TuningGroup",
    "TuningJob",
    "UnauthenticatedError",
    "UnexpectedAnswerError",
    "UnreachableError",
    "WaitTimeoutError",
]

_MODULES = ("errors", "synchronous", "asynchronous", "results")


def __getattr__(name: str) -> Any:
    """Import what is asked for: a command that only prints its help needs no HTTP client."""
    if name in __all__:
        for module in _MODULES:
            found = import_module(f"{__name__}.{module}")
            if name in vars(found):
                globals()[name] = value = vars(found)[name]
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
