"""The Python client of the service: `TimeTuner`, and `AsyncTimeTuner` for asyncio."""

from tests.compatibility.client.errors import (
    ApiError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    JobFailedError,
    NoScheduleError,
    NotFoundError,
    ServerError,
    TimeTunerError,
    TooManyRequestsError,
    UnauthenticatedError,
    UnexpectedAnswerError,
    UnreachableError,
    WaitTimeoutError,
)
from tests.compatibility.client.results import Evaluation, Model, Resolution, Samples, Schedule
from tests.compatibility.client.synchronous import SampleJob, TimeTuner, TuningJob

__all__ = [
    "ApiError",
    "ConflictError",
    "Evaluation",
    "ForbiddenError",
    "InvalidError",
    "JobFailedError",
    "Model",
    "NoScheduleError",
    "NotFoundError",
    "Resolution",
    "SampleJob",
    "Samples",
    "Schedule",
    "ServerError",
    "TimeTuner",
    "TimeTunerError",
    "TooManyRequestsError",
    "TuningJob",
    "UnauthenticatedError",
    "UnexpectedAnswerError",
    "UnreachableError",
    "WaitTimeoutError",
]
