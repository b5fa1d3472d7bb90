"""The `timetuner` command."""

import os
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from service.registry.database import Registry
from service.settings import Settings

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Tuned timesteps for frozen diffusion models.")
db = typer.Typer(no_args_is_help=True, help="The registry's database.")
app.add_typer(db, name="db")

Host = Annotated[str, typer.Option(help="Address to listen on. There is no authentication yet: keep it on loopback.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]


@app.command()
def up(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    home: Annotated[Path | None, typer.Option(help="Folder of the database and all artifacts.")] = None,
    tuning_workers: Annotated[int, typer.Option(min=1, help="Tuning jobs at once, sharing the cores.")] = 2,
) -> None:
    """Run everything on this machine: broker, dispatcher, workers and API; Ctrl-C or SIGTERM stops it all.

    DATABASE_URL, ARTIFACTS_URL and BROKER_URL replace the embedded parts.
    """
    from service.supervisor import Supervisor

    if home is not None:
        os.environ["TIMETUNER_HOME"] = str(home.absolute())
    raise typer.Exit(Supervisor(host, port, tuning_workers).run())


@app.command()
def api(host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Run the API alone."""
    uvicorn.run("service.app:create_app", factory=True, host=host, port=port, log_level="warning")


@db.command()
def upgrade() -> None:
    """Bring the database to the newest schema, creating it if need be."""
    registry = Registry(Settings().database_url)
    registry.upgrade()
    registry.close()


def main() -> None:
    """The console script."""
    app()
