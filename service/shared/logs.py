"""Logs: readable lines on a terminal, JSON elsewhere, each with the ids it is about.

Modules log by the standard library. Ids bound by `about` are in every line of the same task or thread.
"""

import logging
import sys
from contextlib import AbstractContextManager
from typing import Any

import structlog
from structlog.contextvars import bound_contextvars, get_contextvars, merge_contextvars

OWN_PACKAGES = ("service", "worker", "timetuner_core")


def start_logging(level: str) -> None:
    """Log to stderr from now on: lines of this project's packages from `level` on, and warnings of others."""
    shared: list[Any] = [
        merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    rendering: list[Any] = [structlog.dev.ConsoleRenderer()]
    if not sys.stderr.isatty():
        rendering = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for package in OWN_PACKAGES:
        logging.getLogger(package).setLevel(level.upper())


def about(**ids: str | None) -> AbstractContextManager[None]:
    """A context in which every log line has these ids. Ids that are None are left out."""
    return bound_contextvars(**{name: value for name, value in ids.items() if value is not None})


def request_id() -> str | None:
    """The id of the HTTP request that is being answered."""
    value = get_contextvars().get("request_id")
    return None if value is None else str(value)
