"""Sessions on SQLite or PostgreSQL, by URL."""

import math
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Engine, create_engine, event, func, make_url, select, update
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from service.registry.tables import Model, RegistryChanges, Schedule, ScheduleAlias

if TYPE_CHECKING:
    from alembic.config import Config

MAX_IDLE_IN_TRANSACTION_SECONDS = 30
SQLITE_LOCK_SECONDS = 30.0
MIGRATION_LOCK = 7283_1101  # An arbitrary number, which no other program that uses the database may use.
LAST_COMMIT_WITH_OLDER_MIGRATIONS = "e4c2e61"


class SchemaError(Exception):
    """This version's migrations do not know the database's schema.

    Attributes:
        found: the database, its schema, and what is accepted.
        mend: what may help.
    """

    def __init__(self, found: str, mend: str) -> None:
        super().__init__(f"{found}; {mend}")
        self.found = found
        self.mend = mend


def is_away(error: BaseException) -> bool:
    """Whether an error says that the database cannot be used at the moment. Errors of the query itself do not count."""
    if isinstance(error, PoolTimeoutError):  # All connections wait for locks.
        return True
    if not isinstance(error, DBAPIError):
        return False
    if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:  # The query does not fit the schema.
        return False
    return isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated


class RegistrySession(Session):
    """A session that notes whether it changed models, schedules or aliases, which other processes cache."""


@event.listens_for(RegistrySession, "after_flush")
def _note_changes(session: Session, _context: Any) -> None:
    changed = (*session.new, *session.dirty, *session.deleted)
    if any(isinstance(row, Model | Schedule | ScheduleAlias) for row in changed):
        session.info["changed"] = True


class Registry:
    """One database. `read()` and `write()` give a session each; `write()` commits if nothing was raised."""

    def __init__(
        self, database_url: str, lock_seconds: float | None = None, statement_seconds: float | None = None
    ) -> None:
        """Nothing is connected yet.

        Args:
            lock_seconds: how long to wait for a lock, and for a connection; None: 30 s on SQLite, else for ever.
            statement_seconds: how long PostgreSQL may work on one statement; None: for ever.
        """
        url = make_url(database_url)
        if url.drivername in ("postgresql", "postgres"):
            url = url.set(drivername="postgresql+psycopg")
        self.url = url
        waits: dict[str, Any] = {} if lock_seconds is None else {"pool_timeout": lock_seconds}
        if self.is_sqlite:
            self.engine = _sqlite_engine(url, lock_seconds or SQLITE_LOCK_SECONDS, **waits)
        else:
            self.engine = _postgresql_engine(url, lock_seconds or 0, statement_seconds or 0, **waits)
        self._writing = self.engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Session]:
        with RegistrySession(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        with RegistrySession(self._writing, expire_on_commit=False) as session, session.begin():
            yield session
            session.flush()
            # The update comes last: the lock on its row makes all other such writers wait.
            if session.info.get("changed"):
                session.execute(update(RegistryChanges).values(number=RegistryChanges.number + 1))

    def upgrade(self) -> None:
        """Bring the database to the newest migration, creating it if need be.

        Of several processes that do so at once, one migrates, and the others wait for it.

        Raises: SchemaError, if its schema is not one of this version's; the database is left as it is.
        """
        if self.is_sqlite and self.url.database:
            Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        from alembic import command  # Only migrations need Alembic, so other processes do not load it.

        with self._migrating():
            self.revisions()
            command.upgrade(alembic_config(self.url.render_as_string(hide_password=False)), "head")

    @contextmanager
    def _migrating(self) -> Iterator[None]:
        """A lock that one process has at a time. It ends with the process."""
        if not self.is_sqlite:
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(select(func.pg_advisory_lock(MIGRATION_LOCK)))
                try:
                    yield
                finally:
                    connection.execute(select(func.pg_advisory_unlock(MIGRATION_LOCK)))
        elif self.url.database:
            import fcntl  # Windows has none, and clients there import this module's neighbours.

            with Path(f"{self.url.database}.lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        else:
            yield

    def revisions(self) -> tuple[str | None, str | None]:
        """The database's migration, None before the first, and the newest one.

        Raises: SchemaError, if the database's migration is not one of this version's.
        """
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory

        with self.engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        scripts = ScriptDirectory.from_config(alembic_config(self.url.render_as_string(hide_password=False)))
        if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
            raise _unknown_schema(self.url.render_as_string(), current, str(scripts.get_base()))
        return current, scripts.get_current_head()

    def close(self) -> None:
        self.engine.dispose()


def _unknown_schema(database: str, current: str, oldest: str) -> SchemaError:
    mend = (
        f"run `timetuner db upgrade` of commit {LAST_COMMIT_WITH_OLDER_MIGRATIONS} on it first"
        if current < oldest
        else "a newer version of TimeTuner may have made it"
    )
    found = f"{database} has schema {current}; accepted: none yet, or one of this version's, from {oldest} on"
    return SchemaError(found, mend)


def alembic_config(database_url: str) -> "Config":
    """Alembic's configuration: the scripts of the `migrations` package on this database."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "migrations:")
    config.attributes["database_url"] = database_url
    return config


def _postgresql_engine(url: URL, lock_seconds: float, statement_seconds: float, **options: Any) -> Engine:
    engine = create_engine(url, pool_pre_ping=True, **options)
    timeouts = {
        # A process that hangs within a transaction must not keep its locks.
        "idle_in_transaction_session_timeout": MAX_IDLE_IN_TRANSACTION_SECONDS,
        "lock_timeout": lock_seconds,
        "statement_timeout": statement_seconds,
    }

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        for name, seconds in timeouts.items():
            connection.execute(f"SET {name} = {math.ceil(1000 * seconds)}")  # milliseconds; 0 is no limit
        connection.commit()

    return engine


def _sqlite_engine(url: URL, lock_seconds: float, **options: Any) -> Engine:
    engine = create_engine(url, connect_args={"timeout": lock_seconds}, **options)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        # The driver would begin transactions by itself, and too late.
        connection.isolation_level = None
        # A connection caches 500 KiB of pages, not 2 MiB: there are dozens, and the system caches the file, too.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "cache_size=-500"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        # A writer takes the write lock at once, because upgrading a read transaction can fail instead of waiting.
        connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))

    return engine
