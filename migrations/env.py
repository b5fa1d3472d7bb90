"""Run by Alembic: the database's URL comes from the caller, or else from the service's settings."""

from typing import Any, Literal

from alembic import context
from sqlalchemy import TypeDecorator

from service.registry.database import Registry
from service.registry.tables import Base
from service.shared.settings import Settings


def render_item(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    """Write our column types as what they are in the database: migrations must not change when the code does."""
    if kind == "type" and isinstance(item, TypeDecorator):
        return f"sa.{item.impl!r}"
    return False


registry = Registry(context.config.attributes.get("database_url") or Settings().database_url)
with registry.engine.connect() as connection:
    if registry.is_sqlite:
        # A changed table is made anew there, and dropping the old one would count as deleting its rows. No
        # transaction may have begun, hence the driver's own connection.
        driver_connection: Any = connection.connection.driver_connection
        driver_connection.execute("PRAGMA foreign_keys=OFF")
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_item=render_item,
        compare_type=True,
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
registry.close()
