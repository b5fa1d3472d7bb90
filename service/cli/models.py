"""`timetuner models`"""

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.connection import Url, connected
from service.cli.options import ModelName, Private, find_model
from service.cli.output import NOT_FOUND, AsJson, CommandError, Limit, print_facts, print_json, print_table
from service.client.choices import ModelState

if TYPE_CHECKING:
    from service.client import Model, ModelRegistration

models = typer.Typer(no_args_is_help=True, help="Register and list models.")

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
Source = Annotated[
    str, typer.Argument(help="A built-in model's name; or a diffusers-format folder, or a zip, tar or tar.gz of one.")
]


@models.command(name="import")
def import_(
    source: Source,
    name: Annotated[str | None, typer.Option(help="[the built-in's or the file's]")] = None,
    private: Private = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for a worker: print the model's id.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Register a model, and wait until a worker has tried it."""
    is_there = Path(source).exists()
    if not is_there and _is_path(source):
        accepted = "a diffusers-format folder, or a zip, tar or tar.gz of one; or the name of a built-in model"
        raise CommandError(f"there is no file or folder {source!r}; accepted: {accepted}", NOT_FOUND)
    with connected(url, outlives=detach) as client:
        if not is_there:
            model = client.models.create(builtin=source, name=name, private=private)
        elif detach:
            registration = client.models.submit(archive=source, name=name, private=private)
            print_json(registration) if as_json else typer.echo(registration.id)
            return
        else:
            model = client.models.create(archive=source, name=name, private=private)
    _show(model, as_json)


@models.command(name="list")
def list_(
    state: Annotated[ModelState, typer.Option(help="Models that are not ready wait, or were refused.")] = "ready",
    limit: Limit = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List the registered models, newest first; or those that are not ready."""
    with connected(url) as client:
        if state != "ready":
            _list_registrations(list(islice(client.models.registrations(state=state), limit)), as_json)
            return
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
    """Show one model, or why it is not ready."""
    with connected(url) as client:
        found = client.models.registration(find_model(client, model))
    if found.state == "ready":
        _show(found.model(), as_json)
    elif as_json:
        print_json(found)
    else:
        problem = found.problem.detail if found.problem else None
        print_facts({**found.model_dump(exclude={"spec", "problem"}), "problem": problem})


@models.command()
def rm(
    model: ModelName,
    cascade: Annotated[bool, typer.Option("--cascade", help="Delete its schedules and their aliases, too.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Delete a model and its files, or one that was refused. Jobs that are over and stored samples remain."""
    with connected(url) as client:
        model_id = find_model(client, model)
        client.models.delete(model_id, cascade=cascade)
    if as_json:
        print_json({"deleted": model_id})
    else:
        typer.echo(model_id)


def _is_path(source: str) -> bool:
    """Whether a source can only be meant as a path. Names of built-in models have no slash, and end like no archive."""
    return os.sep in source or source.startswith((".", "~")) or source.endswith(ARCHIVES)


def _list_registrations(found: "list[ModelRegistration]", as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    columns = ("id", "name", "state", "created", "problem")
    print_table(columns, ((m.id, m.name, m.state, m.created_at, m.problem and m.problem.detail) for m in found))


def _show(model: "Model", as_json: bool) -> None:
    if as_json:
        print_json(model)
    else:
        print_facts({**model.model_dump(exclude={"spec"}), **model.spec.model_dump()})
