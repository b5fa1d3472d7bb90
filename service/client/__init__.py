"""The Python client of the service: `TimeTuner`, and `AsyncTimeTuner` for asyncio."""

from service.client.asynchronous import AsyncSampleJob, AsyncTimeTuner, AsyncTuningJob
from service.client.errors import (
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
from service.client.results import Evaluation, Model, Resolution, Samples, Schedule
from service.client.synchronous import SampleJob, TimeTuner, TuningJob

__all__ = [
    "ApiError",
    "AsyncSampleJob",
    "AsyncTimeTuner",
    "AsyncTuningJob",
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
