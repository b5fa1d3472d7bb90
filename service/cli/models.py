"""`timetuner models`"""

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.connection import Url, connected
from service.cli.options import ModelName, find_model
from service.cli.output import NOT_FOUND, AsJson, CommandError, Limit, print_facts, print_json, print_table

if TYPE_CHECKING:
    from service.client import Model

models = typer.Typer(no_args_is_help=True, help="Register and list models.")

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
Source = Annotated[
    str, typer.Argument(help="A built-in model's name; or a diffusers-format folder, or a zip, tar or tar.gz of one.")
]


@models.command(name="import")
def import_(
    source: Source,
    name: Annotated[str | None, typer.Option(help="[the built-in's or the file's]")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Register a model."""
    is_there = Path(source).exists()
    if not is_there and _is_path(source):
        accepted = "a diffusers-format folder, or a zip, tar or tar.gz of one; or the name of a built-in model"
        raise CommandError(f"there is no file or folder {source!r}; accepted: {accepted}", NOT_FOUND)
    with connected(url) as client:
        if is_there:
            model = client.models.create(archive=source, name=name)
        else:
            model = client.models.create(builtin=source, name=name)
    _show(model, as_json)


@models.command(name="list")
def list_(limit: Limit = None, url: Url = None, as_json: AsJson = False) -> None:
    """List the registered models, newest first."""
    with connected(url) as client:
        found = list(islice(client.models.list(), limit))
    if as_json:
        print_json(found)
        return
    columns = ("id", "name", "shape", "predicts", "parameters", "created")
    print_table(
        columns,
        ((m.id, m.name, m.spec.image_shape, m.spec.model_type, m.spec.num_parameters, m.created_at) for m in found),
    )


@models.command()
def show(model: ModelName, url: Url = None, as_json: AsJson = False) -> None:
    """Show one model."""
    with connected(url) as client:
        found = client.models.get(find_model(client, model))
    _show(found, as_json)


@models.command()
def rm(model: ModelName, url: Url = None, as_json: AsJson = False) -> None:
    """Delete a model that no schedule and no job refers to."""
    with connected(url) as client:
        model_id = find_model(client, model)
        client.models.delete(model_id)
    if as_json:
        print_json({"deleted": model_id})
    else:
        typer.echo(model_id)


def _is_path(source: str) -> bool:
    """Whether a source can only be meant as a path. Names of built-in models have no slash, and end like no archive."""
    return os.sep in source or source.startswith((".", "~")) or source.endswith(ARCHIVES)


def _show(model: "Model", as_json: bool) -> None:
    if as_json:
        print_json(model)
    else:
        print_facts({**model.model_dump(exclude={"spec"}), **model.spec.model_dump()})
