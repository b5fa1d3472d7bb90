"""Exporting a schedule. Formats that need PyTorch are written by a short-lived process, as the API has none."""

import base64
import json
import logging
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from anyio import to_thread

from service.access.callers import Caller
from service.http.errors import InvalidError, NotInstalledError, UnavailableError
from service.registry.tables import Model
from service.schedules.logic import get_schedule
from service.schedules.schemas import ExportQuery, ScheduleImport, ScheduleOut
from service.shared.artifacts import ArtifactStore, DamagedArtifactError
from service.shared.pipeline_calls import SIZES, sizes_of_import
from service.shared.processes import python
from service.state import AppState
from timetuner_core.catalog import BUILTIN_FOLDERS, BUILTINS
from timetuner_core.exports.card import guidance_notes, model_card
from timetuner_core.exports.formats import FORMATS, Exported, Format
from timetuner_core.models.folder_files import SCHEDULER_CONFIG

EXPORT_SECONDS = 120.0
MAX_REMEMBERED = 32
WITHOUT_TORCH = ", ".join(name for name, each in FORMATS.items() if not each.needs_torch)

# The registry that imports a schedule decides these by itself.
NOT_EXPORTED = {"private", "override", "model_content_hash"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A schedule to export and its model, as plain data.

    Attributes:
        schedule: as `GET /v1/schedules/{id}` gives it. model: what the model card says of it.
    """

    schedule: dict[str, Any]
    model: dict[str, Any]


def read_subject(state: AppState, caller: Caller, schedule_id: str) -> Subject:
    """Raises: NotFoundError."""
    with state.registry.read() as session:
        schedule = get_schedule(session, caller, schedule_id)
        model = session.get_one(Model, schedule.model_id)
        facts = {name: getattr(model, name) for name in ("name", "content_hash", "spec", "source")}
        return Subject(ScheduleOut.model_validate(schedule).model_dump(mode="json"), facts)


async def export(state: AppState, subject: Subject, query: ExportQuery) -> Exported:
    """A schedule in a format of `FORMATS`.

    Raises:
        InvalidError: the format cannot carry it, or the model has no scheduler of diffusers.
        NotInstalledError: the format needs PyTorch, which is not installed here.
        UnavailableError: the process that writes it did not end in time, or was killed.
    """
    if query.format == "json":
        return _import_file(subject)
    if query.format == "card":
        return Exported(model_card(subject.schedule, subject.model).encode(), guidance_notes(subject.schedule))
    # Each of these processes takes seconds and hundreds of megabytes, so that others wait for it, without a thread.
    return await to_thread.run_sync(_export_elsewhere, state.artifacts, subject, query, limiter=state.exporters)


def _import_file(subject: Subject) -> Exported:
    """The body that `POST /v1/schedules` takes."""
    schedule = subject.schedule
    names = ScheduleImport.model_fields.keys() - NOT_EXPORTED
    content = {name: value for name, value in schedule.items() if name in names}
    call = content.pop("call", None) or {}  # Only a pipeline's schedule has arguments of a call.
    content |= sizes_of_import(call)
    others = {name: value for name, value in call.items() if name not in (*SIZES, "image_sizes")}
    content |= {"call": others} if others else {}
    content["model_content_hash"] = subject.model["content_hash"]
    return Exported((json.dumps(content, indent=2) + "\n").encode(), ["The evaluation stays in this registry."])


def _export_elsewhere(artifacts: ArtifactStore, subject: Subject, query: ExportQuery) -> Exported:
    request = {
        "format": query.format,
        "schedule": subject.schedule,
        "model": subject.model,
        "scheduler_config": _scheduler_config(artifacts, subject.model),
        "lossy": query.lossy,
    }
    answer = _run(json.dumps(request, sort_keys=True))
    if "error" in answer:
        raise InvalidError(f"format is {query.format!r}: {answer['error']}", ("query", "format"), query.format)
    return Exported(base64.b64decode(answer["content"]), answer["not_carried"])


def formats_of(model: Model) -> dict[str, Format]:
    """The formats in which schedules of a model can be exported: mixtures have no scheduler of diffusers."""
    has_scheduler = model.source.get("builtin") not in set(BUILTINS) - set(BUILTIN_FOLDERS)
    return {name: each for name, each in FORMATS.items() if has_scheduler or not each.needs_torch}


def _scheduler_config(artifacts: ArtifactStore, model: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the scheduler that a model came with. Raises: InvalidError, if it came with none."""
    source, spec = model["source"], model["spec"]
    if "scheduler_config" in spec:  # A worker has put that of a pipeline there, wherever its files are.
        found: dict[str, Any] = spec["scheduler_config"]
        return found
    accepted = f"accepted as format: {WITHOUT_TORCH}"
    try:
        if "artifact" in source:
            content = artifacts.read(f"{source['artifact']}/{SCHEDULER_CONFIG}")
        elif source.get("builtin") in BUILTIN_FOLDERS:
            content = (BUILTIN_FOLDERS[source["builtin"]] / SCHEDULER_CONFIG).read_bytes()
        else:
            message = f"the model {model['name']!r} has no diffusers scheduler to export a schedule for"
            raise InvalidError(f"{message}; {accepted}", ("query", "format"))
    except DamagedArtifactError as error:
        raise InvalidError(f"{error}; {accepted}", ("query", "format")) from None
    config: dict[str, Any] = json.loads(content)
    return config


@lru_cache(maxsize=MAX_REMEMBERED)
def _run(request: str) -> dict[str, Any]:
    """The answer of `python -m timetuner_core.exports`; that to the same request is remembered."""
    command = python("-m", "timetuner_core.exports")
    try:
        run = subprocess.run(
            command, check=False, capture_output=True, text=True, input=request, timeout=EXPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(
            f"the export took more than {EXPORT_SECONDS:g} seconds; accepted: the same request, later"
        ) from None
    last_line = run.stderr.strip().rpartition("\n")[2]
    if run.returncode > 0 and last_line.startswith("ModuleNotFoundError"):
        accepted = f"accepted as format: {WITHOUT_TORCH}; the others, where timetuner[diffusers] is installed"
        raise NotInstalledError(f"this API cannot compute with noise schedules ({last_line}); {accepted}")
    if run.returncode < 0:
        raise UnavailableError("the export was killed, for lack of memory perhaps; accepted: the same request, later")
    if run.returncode > 0:
        raise RuntimeError(f"the export failed: {run.stderr}")
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer
