"""`timetuner models`"""

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.completion import complete_builtins
from service.cli.connection import Url, connected
from service.cli.options import ModelName, Private, find_model, given
from service.cli.output import NOT_FOUND, USAGE, AsJson, CommandError, Limit, print_facts, print_json, print_table
from service.client.choices import BUILTINS, Dtype, ModelKind, ModelSort, ModelState

if TYPE_CHECKING:
    from service.client import Model, ModelRegistration

models = typer.Typer(no_args_is_help=True, help="Register and list models.")

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
Source = Annotated[
    str | None,
    typer.Argument(
        help=f"A built-in model, {', '.join(BUILTINS)}; or a diffusers-format folder, or a zip, tar or tar.gz of one.",
        autocompletion=complete_builtins,
    ),
]


@models.command(name="import")
def import_(
    source: Source = None,
    path: Annotated[
        str | None, typer.Option(help="In place of SOURCE: a pipeline below the service's MODELS_DIR.")
    ] = None,
    hub: Annotated[str | None, typer.Option(help="In place of SOURCE: a pipeline in the Hugging Face cache.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, with --hub. [main]")] = None,
    kind: Annotated[ModelKind | None, typer.Option(help="What an archive is read as. [auto]")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="A pipeline's precision. [that of its files]")] = None,
    name: Annotated[str | None, typer.Option(help="[the built-in's or the file's]")] = None,
    private: Private = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for a worker: print the model's id.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Register a model, and wait until a worker has tried it."""
    place = given(**_place_of(source), path=path, hub=hub)
    if len(place) != 1:
        raise typer.BadParameter("accepted: one of SOURCE, --path and --hub")
    request = {**place, **given(revision=revision, kind=kind, dtype=dtype, name=name, private=private or None)}
    with connected(url, outlives=detach) as client:
        if detach and "builtin" not in place:
            registration = client.models.submit(**request)
            print_json(registration) if as_json else typer.echo(registration.id)
            return
        model = client.models.create(**request)
    _show(model, as_json)


def _place_of(source: str | None) -> dict[str, str]:
    """A source as a field of the client's request."""
    if source is None:
        return {}
    if Path(source).exists():
        return {"archive": source}
    if _is_path(source):
        accepted = "a diffusers-format folder, or a zip, tar or tar.gz of one; or the name of a built-in model"
        raise CommandError(f"there is no file or folder {source!r}; accepted: {accepted}", NOT_FOUND)
    return {"builtin": source}


@models.command(name="list")
def list_(
    state: Annotated[ModelState, typer.Option(help="Models that are not ready wait, or were refused.")] = "ready",
    search: Annotated[str | None, typer.Option(help="A part of the name or id, in any case.")] = None,
    sort: Annotated[ModelSort, typer.Option(help="The order.")] = "newest",
    limit: Limit = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List the registered models, newest first; or those that are not ready."""
    if state != "ready" and (search is not None or sort != "newest"):
        raise CommandError(f"--state is {state}; accepted with --search or --sort: ready", USAGE)
    with connected(url) as client:
        if state != "ready":
            _list_registrations(list(islice(client.models.registrations(state=state), limit)), as_json)
            return
        found = list(islice(client.models.list(**given(search=search), sort=sort), limit))
    if as_json:
        print_json(found)
        return
    columns = ("id", "name", "shape", "predicts", "parameters", "created")
    rows = (
        (
            m.id,
            m.name,
            "x".join(map(str, m.spec.image_shape)),
            m.spec.model_type,
            f"{m.spec.num_parameters:,}",
            m.created_at,
        )
        for m in found
    )
    print_table(columns, rows)


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
def rename(
    model: ModelName,
    name: Annotated[str, typer.Argument(help="The new name.")],
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Give a model another name. Its id stays the same."""
    with connected(url) as client:
        renamed = client.models.rename(find_model(client, model), name)
    if as_json:
        print_json(renamed)
    else:
        typer.echo(renamed.name)


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
