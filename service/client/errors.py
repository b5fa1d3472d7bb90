"""The errors that the client raises."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.client.problems import Fault, Problem

MAX_SHOWN_CHARACTERS = 200  # Errors show this much of a refused value.


class TimeTunerError(Exception):
    """Any failure of the client; its text is one line."""


class UnreachableError(TimeTunerError):
    """No answer came from the service."""


class UnexpectedAnswerError(TimeTunerError):
    """An answer that the service does not give: another program's, or of a version that is not this client's."""


class WaitTimeoutError(TimeTunerError, TimeoutError):
    """A job was not over within the time that its waiter had. It goes on."""


class JobFailedError(TimeTunerError):
    """A job that failed or was cancelled."""


class NotReadyError(TimeTunerError):
    """A model that was handed in and that no worker has described yet."""


class NoScheduleError(TimeTunerError):
    """There is no accepted schedule for a setting, so that it is sampled untuned."""


class ApiError(TimeTunerError):
    """An answer that is a refusal.

    Attributes:
        status: of HTTP. problem: all that the service said. errors: the fields that are at fault.
        request_id: for the service's logs. retry_after: seconds after which the service wants to be asked again.
    """

    def __init__(self, problem: "Problem", retry_after: float | None = None) -> None:
        super().__init__(_line(problem))
        self.problem = problem
        self.status = problem.status
        self.errors: Sequence[Fault] = problem.errors
        self.request_id = problem.request_id
        self.retry_after = retry_after


class InvalidError(ApiError):
    """400, 406, 413, 415, 422: the request cannot be served as it is."""


class UnauthenticatedError(ApiError):
    """401: no valid API key."""


class ForbiddenError(ApiError):
    """403: the API key may not do this."""


class NotFoundError(ApiError):
    """404."""


class ConflictError(ApiError):
    """409: not as things stand."""


class TooManyRequestsError(ApiError):
    """429, after all attempts."""


class ServerError(ApiError):
    """5xx: the service, or a job that was waited for, failed."""


def _line(problem: "Problem") -> str:
    """One line that names what is wrong, and with what value."""
    faults = [_fault(fault) for fault in problem.errors] or [problem.detail]
    return f"{problem.status} {problem.title}: {' '.join('; '.join(faults).split())}"


def _fault(fault: "Fault") -> str:
    field = ".".join(str(part) for part in fault.loc[1:] or fault.loc)
    message = fault.msg if field in fault.msg else f"{field}: {fault.msg}"
    given = repr(fault.input)[:MAX_SHOWN_CHARACTERS]
    is_value = fault.input is not None and not isinstance(fault.input, dict)
    return f"{message} (given: {given})" if is_value and given not in message else message
