"""The registry's database, for commands that use it directly and not the API."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from service.cli.output import UNREACHABLE, CommandError
from service.registry.database import Registry, SchemaError
from service.shared.settings import Settings


@contextmanager
def open_registry() -> Iterator[Registry]:
    """The registry of the settings. Raises: CommandError, if it cannot be used."""
    url = Settings().database_url
    with database_errors(url):
        registry = Registry(url)
        try:
            yield registry
        finally:
            registry.close()


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Errors of the database become those of a command. Raises: CommandError."""
    try:
        yield
    except SchemaError as error:
        raise CommandError(str(error), UNREACHABLE) from None
    except SQLAlchemyError as error:
        database = make_url(url).render_as_string()
        message = f"{database} cannot be used: {reason_of(error)}; accepted: a database after `timetuner db upgrade`"
        raise CommandError(message, UNREACHABLE) from None


def reason_of(error: SQLAlchemyError) -> str:
    """The error message of the database's driver, in one line."""
    return str(getattr(error, "orig", error)).partition("\n")[0]
