"""Each operation of the API as a value: what is sent, and how the answer is read."""

import base64
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx
import numpy as np
from httpx_sse import ServerSentEvent
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter

from service.client.choices import ExportFormat, UnreadyState
from service.client.errors import UnexpectedAnswerError
from service.client.problems import raise_for
from service.client.requests import (
    ModelFilters,
    ModelSource,
    SampleRequest,
    ScheduleFilters,
    ScheduleImport,
    Setting,
    TuningJobRequest,
    UsageFilters,
)
from service.client.results import (
    Alias,
    AuditEntry,
    Event,
    Health,
    Model,
    ModelRegistrationFields,
    Page,
    Readiness,
    Resolution,
    SampleJobFields,
    Samples,
    Schedule,
    ScheduleExport,
    TuningGroup,
    TuningJobFields,
    Usage,
)

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)
ARRAY_TYPE = "application/x-npy"
PLACES = ("builtin", "archive", "path", "hub")  # A model's files are in one of these.
UPLOAD_SLOWNESS = 20
WAIT_SECONDS = 30  # The service may hold a sampling request for this long. Then the client asks for its job.


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request.

    Attributes:
        operation: the OpenAPI document's name for it. read: makes the result of a successful response.
        archive: a file or folder that is sent as a form, with `json` as its fields.
        is_repeatable: it may be sent again when nobody knows what became of it.
        also_accepts: a status that is an answer, though not of success.
        slowness: how many times the client's timeout it may take.
    """

    operation: str
    method: str
    path: str
    read: Callable[[httpx.Response], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    json: Mapping[str, Any] | None = None
    archive: Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_repeatable: bool = True
    also_accepts: int | None = None
    slowness: int = 1

    @contextmanager
    def content(self) -> Iterator[dict[str, Any]]:
        """The arguments of an httpx request; a file is open until the end."""
        common = {"params": self.params, "headers": self.headers}
        if self.archive is None:
            yield common | ({} if self.json is None else {"json": self.json})
            return
        with _as_file(self.archive) as file:
            yield common | {"files": {"archive": (self.archive.name, file)}, "data": self.json}

    def result(self, response: httpx.Response) -> T:
        """Raises: ApiError, UnexpectedAnswerError."""
        if response.status_code != self.also_accepts:
            raise_for(response)
        try:
            return self.read(response)
        except (ValueError, KeyError) as error:
            what = f"{response.status_code} {response.headers.get('Content-Type', '')} from {response.url}"
            raise UnexpectedAnswerError(f"{what} is no answer of a TimeTuner service of this version") from error

    def after(self, cursor: str) -> "Call[T]":
        """The next page."""
        return replace(self, params={**self.params, "cursor": cursor})


def register_model(source: ModelSource) -> Call[Model | ModelRegistrationFields]:
    """The model, or its registration if the service does not wait any longer."""
    return _registered(source, _model_or_registration)


def submit_model(source: ModelSource) -> Call[ModelRegistrationFields]:
    if source.get("builtin") is not None:
        raise TypeError("a built-in model is ready at once; accepted: archive, path or hub")
    call = _registered(source, _reader(ModelRegistrationFields))
    return replace(call, headers={**call.headers, "Prefer": "respond-async"})


def _registered(source: ModelSource, read: Callable[[httpx.Response], T]) -> Call[T]:
    """Raises: TypeError, if the model is in none or several of `PLACES`."""
    given = [place for place in PLACES if source.get(place) is not None]
    if len(given) != 1:
        raise TypeError(f"accepted: one of {', '.join(PLACES)}")
    fields = {key: value for key, value in source.items() if key != "archive" and value not in (None, False)}
    archive = source.get("archive")
    path = None if archive is None else Path(archive)
    slowness = 1 if given == ["builtin"] else UPLOAD_SLOWNESS  # The service reads all weights before it answers.
    return _made_once(Call("register_model", "POST", "/v1/models", read, json=fields, archive=path, slowness=slowness))


def list_models(limit: int, filters: ModelFilters | None = None) -> Call[Page[Model]]:
    params = {**(filters or {}), "limit": limit}
    return Call("list_models", "GET", "/v1/models", _reader(Page[Model]), params=params)


def list_model_registrations(state: UnreadyState, limit: int) -> Call[Page[ModelRegistrationFields]]:
    reader, params = _reader(Page[ModelRegistrationFields]), {"state": state, "limit": limit}
    return Call("list_models", "GET", "/v1/models", reader, params=params)


def get_model(model: str) -> Call[ModelRegistrationFields]:
    """The registration of a model, which has the model's fields once it is ready."""
    return Call("get_model", "GET", _path("/v1/models", model), _reader(ModelRegistrationFields))


def rename_model(model: str, name: str) -> Call[Model]:
    return Call("rename_model", "PATCH", _path("/v1/models", model), _reader(Model), json={"name": name})


def delete_model(model: str, cascade: bool = False) -> Call[None]:
    params = {"cascade": True} if cascade else {}
    return Call("delete_model", "DELETE", _path("/v1/models", model), _nothing, params=params)


def submit_tuning_job(request: TuningJobRequest) -> Call[TuningJobFields]:
    reader = _reader(TuningJobFields)
    return _made_once(Call("submit_tuning_job", "POST", "/v1/tuning-jobs", reader, json=_plain(request)))


def list_tuning_jobs(state: str | None, limit: int) -> Call[Page[TuningJobFields]]:
    params = {"limit": limit} | ({} if state is None else {"state": state})
    return Call("list_tuning_jobs", "GET", "/v1/tuning-jobs", _reader(Page[TuningJobFields]), params=params)


def get_tuning_job(job: str) -> Call[TuningJobFields]:
    return Call("get_tuning_job", "GET", _path("/v1/tuning-jobs", job), _reader(TuningJobFields))


def cancel_tuning_job(job: str) -> Call[TuningJobFields]:
    return Call("cancel_tuning_job", "POST", _path("/v1/tuning-jobs", job, "cancel"), _reader(TuningJobFields))


def submit_tuning_group(jobs: Sequence[TuningJobRequest], dry_run: bool) -> Call[TuningGroup]:
    body: dict[str, Any] = {"jobs": [_plain(job) for job in jobs], "dry_run": dry_run}
    return _made_once(Call("submit_tuning_group", "POST", "/v1/tuning-groups", _reader(TuningGroup), json=body))


def get_tuning_group(group: str) -> Call[TuningGroup]:
    return Call("get_tuning_group", "GET", _path("/v1/tuning-groups", group), _reader(TuningGroup))


def list_tuning_job_events(job: str, after: int) -> Call[Page[Event]]:
    path = _path("/v1/tuning-jobs", job, "events")
    return Call("list_tuning_job_events", "GET", path, _reader(Page[Event]), params={"after": after})


def list_schedules(filters: ScheduleFilters, limit: int) -> Call[Page[Schedule]]:
    params = {**filters, "limit": limit}
    return Call("list_schedules", "GET", "/v1/schedules", _reader(Page[Schedule]), params=params)


def import_schedule(request: ScheduleImport) -> Call[Schedule]:
    return _made_once(Call("import_schedule", "POST", "/v1/schedules", _reader(Schedule), json=_plain(request)))


def resolve_schedule(setting: Setting) -> Call[Resolution]:
    given = {name: value for name, value in setting.items() if value is not None}
    if "call" in given:
        given["call"] = json.dumps(given["call"])
    return Call("resolve_schedule", "GET", "/v1/schedules/resolve", _reader(Resolution), params=given)


def get_schedule(schedule: str) -> Call[Schedule]:
    return Call("get_schedule", "GET", _path("/v1/schedules", schedule), _reader(Schedule))


def export_schedule(schedule: str, format: ExportFormat, lossy: bool) -> Call[ScheduleExport]:
    """A call that may take long, as the service loads PyTorch for most formats."""
    path, params = _path("/v1/schedules", schedule, "export"), {"format": format, "lossy": lossy}
    return Call("export_schedule", "GET", path, _export, params=params, slowness=UPLOAD_SLOWNESS)


def delete_schedule(schedule: str) -> Call[None]:
    return Call("delete_schedule", "DELETE", _path("/v1/schedules", schedule), _nothing)


def list_aliases(model: str) -> Call[Page[Alias]]:
    return Call("list_aliases", "GET", _path("/v1/models", model, "aliases"), _reader(Page[Alias]))


def set_alias(model: str, name: str, schedule: str) -> Call[Alias]:
    path = _path("/v1/models", model, "aliases", name)
    return Call("set_alias", "PUT", path, _reader(Alias), json={"schedule": schedule})


def delete_alias(model: str, name: str) -> Call[None]:
    return Call("delete_alias", "DELETE", _path("/v1/models", model, "aliases", name), _nothing)


def sample(request: SampleRequest) -> Call[Samples | SampleJobFields]:
    """The samples, or the job if they take longer than `WAIT_SECONDS`."""
    headers = {"Accept": ARRAY_TYPE, "Prefer": f"wait={WAIT_SECONDS}"}
    call = Call("sample", "POST", "/v1/samples", _samples_or_job, json=_plain(request), headers=headers)
    return _made_once(call)


def submit_samples(request: SampleRequest) -> Call[SampleJobFields]:
    headers = {"Prefer": "respond-async"}
    call = Call("sample", "POST", "/v1/samples", _reader(SampleJobFields), json=_plain(request), headers=headers)
    return _made_once(call)


def list_sample_jobs(
    state: str | None, model: str | None, schedule: str | None, limit: int
) -> Call[Page[SampleJobFields]]:
    filters = {"state": state, "model": model, "schedule": schedule}
    params = {"limit": limit} | {name: value for name, value in filters.items() if value is not None}
    return Call("list_sample_jobs", "GET", "/v1/samples", _reader(Page[SampleJobFields]), params=params)


def get_sample_job(job: str) -> Call[SampleJobFields]:
    return Call("get_sample_job", "GET", _path("/v1/samples", job), _reader(SampleJobFields))


def cancel_sample_job(job: str) -> Call[SampleJobFields]:
    return Call("cancel_sample_job", "POST", _path("/v1/samples", job, "cancel"), _reader(SampleJobFields))


def get_sample_content(job: str) -> Call[Samples]:
    headers = {"Accept": ARRAY_TYPE}
    return Call("get_sample_content", "GET", _path("/v1/samples", job, "content"), _samples, headers=headers)


def follow_sample_job(job: str) -> Call[None]:
    """A stream, which is not read here."""
    return Call("follow_sample_job", "GET", _path("/v1/samples", job, "events"), _nothing)


def list_audit(limit: int) -> Call[Page[AuditEntry]]:
    return Call("list_audit", "GET", "/v1/audit", _reader(Page[AuditEntry]), params={"limit": limit})


def list_usage(filters: UsageFilters, limit: int) -> Call[Page[Usage]]:
    params = {**{name: str(value) for name, value in filters.items() if value is not None}, "limit": limit}
    return Call("list_usage", "GET", "/v1/usage", _reader(Page[Usage]), params=params)


def health() -> Call[Health]:
    return Call("health", "GET", "/healthz", _reader(Health))


def readiness() -> Call[Readiness]:
    return Call("readiness", "GET", "/readyz", _reader(Readiness), also_accepts=503)


def metrics() -> Call[str]:
    return Call("metrics", "GET", "/metrics", lambda response: response.text)


def _path(collection: str, *parts: str) -> str:
    return "/".join([collection, *(quote(part, safe="") for part in parts)])


def _made_once(call: Call[T]) -> Call[T]:
    """However often it is sent, the service does it once."""
    return replace(call, headers={**call.headers, "Idempotency-Key": uuid4().hex})


def _reader(kind: type[B]) -> Callable[[httpx.Response], B]:
    return lambda response: kind.model_validate_json(response.content)


def _nothing(_response: httpx.Response) -> None:
    pass


def _model_or_registration(response: httpx.Response) -> Model | ModelRegistrationFields:
    kind: type[Model | ModelRegistrationFields] = ModelRegistrationFields if response.status_code == 202 else Model
    return kind.model_validate_json(response.content)


def _samples(response: httpx.Response) -> Samples:
    array = np.load(io.BytesIO(response.content), allow_pickle=False)
    schedule = response.headers["TimeTuner-Schedule"]
    job = response.headers["Content-Location"].split("/")[-2]
    flagged = response.headers.get("TimeTuner-Flagged", "none")
    numbers = [] if flagged == "none" else [int(number) for number in flagged.split(",")]
    return Samples(array, job, None if schedule == "none" else schedule, numbers)


def _export(response: httpx.Response) -> ScheduleExport:
    name = response.headers["Content-Disposition"].partition('filename="')[2].rstrip('"')
    not_carried = json.loads(response.headers["TimeTuner-Not-Carried"])
    return ScheduleExport(response.content, name, response.headers["Content-Type"], not_carried)


def _samples_or_job(response: httpx.Response) -> Samples | SampleJobFields:
    return _reader(SampleJobFields)(response) if response.status_code == 202 else _samples(response)


def _plain(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request as JSON. Arrays become lists, and arrays of conditions base64 `.npy` files."""
    conditions = {
        name: _npy(request[name])
        for name in ("condition", "uncond_condition")
        if isinstance(request.get(name), np.ndarray)
    }
    plain: dict[str, Any] = TypeAdapter(Any).dump_python(
        {**request, **conditions}, mode="json", fallback=lambda value: value.tolist()
    )
    return plain


def _npy(array: NDArray[Any]) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.float32), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def _as_file(path: Path) -> Iterator[Any]:
    """An archive that is open for reading; of a folder, one that is made for the occasion."""
    if not path.is_dir():
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
            archive.add(path, arcname=".")
        file.seek(0)
        yield file


def sent_event(sent: ServerSentEvent) -> dict[str, Any]:
    """The fields of a `SampleEvent`."""
    data = sent.json()
    return {"type": sent.event} | (data if sent.event == "step" else {"job": data})
