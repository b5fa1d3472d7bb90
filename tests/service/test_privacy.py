"""Things that are private to an API key are not there for others: no endpoint tells them apart from what never was."""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from service.access.callers import Caller
from service.access.cookies import COOKIE
from service.app import create_app
from service.registry.keys import Scope, create_key
from service.registry.models import keep_described
from service.registry.schedules import next_version
from service.registry.tables import JobState, Model, ModelRegistration, SampleJob, Schedule, ScheduleStatus, TuningJob
from service.registry.types import new_id
from service.samples.catalog import Catalog
from service.schedules.logic import resolve
from service.shared.job_requests import SampleRequest, SamplingSetting, TuningJobRequest
from service.shared.settings import Settings
from service.state import AppState
from service.web import endpoints as web
from service.web import forms
from tests.service.problems import assert_problem
from timetuner_core.catalog import BUILTIN_FOLDERS

pytestmark = pytest.mark.both_engines

Headers: TypeAlias = dict[str, str]
NAME = "secret-ring"
UNKNOWN = "mdl_00000000000000000000000000"
NAMES = r"{(model_id|schedule_id|job_id|group_id)}"
GRID: Any = {"num_steps": 2, "timesteps": [1.0, 0.5, 0.001], "t_ratios": [0.98, 0.95]}

# The bodies of requests whose path names something. Without its body a request would be refused for that.
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("PUT", "/v1/models/{model_id}/aliases/{name}"): {"json": {"schedule": UNKNOWN}},
    ("PATCH", "/v1/models/{model_id}"): {"json": {"name": "another"}},
    ("POST", "/models/{model_id}/rename"): {"data": {"name": "another"}},
    ("POST", "/schedules/{schedule_id}/aliases"): {"data": {"name": "production"}},
    ("POST", "/schedules/{schedule_id}/aliases/delete"): {"data": {"name": "production"}},
}
# Operations whose query or body names a model or a schedule, which stands for `ID`.
NAMING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "submit_tuning_job": ("POST", "/v1/tuning-jobs", {"json": {"model": "ID", "num_steps": 2}}),
    "submit_tuning_group": ("POST", "/v1/tuning-groups", {"json": {"jobs": [{"model": "ID", "num_steps": 2}]}}),
    "sample": ("POST", "/v1/samples", {"json": {"model": "ID", "num_steps": 2}}),
    "import_schedule": ("POST", "/v1/schedules", {"json": {"model": "ID", **GRID}}),
    "resolve_schedule": ("GET", "/v1/schedules/resolve?model=ID&num_steps=2", {}),
    "list_schedules": ("GET", "/v1/schedules?model=ID", {}),
    "openai_get_model": ("GET", "/openai/v1/models/ID", {}),
    "openai_generate_images": ("POST", "/openai/v1/images/generations", {"json": {"model": "ID", "prompt": ""}}),
    "page: tune": ("POST", "/jobs", {"data": {"model": "ID", "num_steps": 2}}),
    "page: price": ("POST", "/jobs/price", {"data": {"model": "ID", "num_steps": 2}}),
    "page: compare": ("GET", "/compare?model=ID", {}),
    "page: playground": ("GET", "/playground?model=ID", {}),
    "page: compare two": ("GET", "/compare/schedules?a=ID&b=ID", {}),
    "page: schedules": ("GET", "/schedules?model=ID", {}),
}
# Operations that name nothing, whose answers hold what the caller sees; or nothing that could be private.
LISTING = {"list_models", "openai_list_models", "list_tuning_jobs", "list_sample_jobs", "list_usage", "list_audit"}
NAMELESS = {"register_model", "health", "readiness", "metrics"}
LISTS = (
    "/v1/models",
    "/v1/models?state=queued",
    "/v1/schedules",
    "/v1/tuning-jobs",
    "/v1/samples",
    "/v1/usage",
    "/v1/models?search=ring&sort=name",
    "/v1/schedules?search=ring&sort=score",
    "/openai/v1/models",
    "/metrics",
    "/",
    "/models",
    "/jobs",
    "/schedules",
    "/compare",
    "/matrix",
    "/playground",
    "/usage",
    "/models?search=ring",
    "/v1/models/PUBLIC",
    "/v1/models/PUBLIC/aliases",
    "/v1/schedules?model=PUBLIC",
    "/models/PUBLIC",
    "/compare?model=PUBLIC",
    "/playground?model=PUBLIC",
)


@dataclass
class World:
    """Three keys, and what belongs to the first of them.

    Attributes:
        model: private. Its schedule and its jobs are not, by themselves.
        public: everybody's model, which has a private schedule of each status.
    """

    client: TestClient
    state: AppState
    owner: Headers
    other: Headers
    admin: Headers
    owner_id: str
    model: str
    public: str
    schedule: str
    private_schedules: list[str]
    tuning_job: str
    group: str
    sample_job: str
    registration: str

    def ids_of(self, route: APIRoute) -> list[str]:
        """Ids that a path may name."""
        if "{model_id}" in route.path:
            return [self.model, self.registration]
        if "{schedule_id}" in route.path:
            return [self.schedule, *self.private_schedules]
        if "{group_id}" in route.path:
            return [self.group]
        return [self.sample_job if "/samples" in route.path else self.tuning_job]

    @property
    def hidden(self) -> list[str]:
        made = [self.model, self.schedule, *self.private_schedules, self.tuning_job, self.sample_job]
        return [*made, self.registration, NAME]


def import_schedule(client: TestClient, headers: Headers, model: str, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/schedules", json={"model": model, **GRID, **fields}, headers=headers)
    assert answer.status_code == 201, answer.text
    schedule: dict[str, Any] = answer.json()
    return schedule


def store(session: Session, model: str, owner: str, status: ScheduleStatus, score: float) -> str:
    """A private schedule, as a worker stores it."""
    key = SamplingSetting(model=model, num_steps=2).key()
    grid = {"timesteps": GRID["timesteps"], "t_ratios": GRID["t_ratios"], "provenance": {}, "evaluation": None}
    version = next_version(session, key, owner)
    row = Schedule(**key, **grid, owner=owner, private_to=owner, version=version, status=status, score=score)
    session.add(row)
    session.flush()
    return row.id


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[World]:
    settings: Any = {"timetuner_home": tmp_path, "database_url": database_url, "broker_url": "redis://127.0.0.1:1/0"}
    app = create_app(Settings(**settings, auth="on"))
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        state: AppState = app.state.timetuner
        may = (Scope.SAMPLE, Scope.TUNE, Scope.MODELS_WRITE)
        with state.registry.write() as session:
            keys = [
                create_key(session, name, scopes) for name, scopes in (("a", may), ("b", may), ("c", (Scope.ADMIN,)))
            ]
        owner, other, admin = ({"Authorization": f"Bearer {text}"} for _, text in keys)
        owner_id = keys[0][0].id

        def post(path: str, **given: Any) -> str:
            answer = client.post(path, headers=owner | given.pop("headers", {}), **given)
            assert answer.is_success, answer.text
            made: str = answer.json()["id"]
            return made

        model = post("/v1/models", json={"builtin": "mixture-ring", "name": NAME, "private": True})
        public = post("/v1/models", json={"builtin": "mixture-gratings"})
        schedule = import_schedule(client, owner, model)["id"]
        client.put(f"/v1/models/{model}/aliases/production", json={"schedule": schedule}, headers=owner)
        private = [import_schedule(client, owner, public, private=True)["id"]]
        with state.registry.write() as session:
            private += [
                store(session, public, owner_id, status, score)
                for status, score in ((ScheduleStatus.ACCEPTED, 0.5), (ScheduleStatus.REJECTED, 1.5))
            ]
            about: Any = {"name": NAME, "content_hash": "0", "artifact": "models/none", "request": {}}
            registration = ModelRegistration(owner=owner_id, private_to=owner_id, **about)
            over: Any = {"owner": owner_id, "model_id": model, "state": JobState.CANCELLED}  # A stream ends at once.
            tuning = TuningJob(request=TuningJobRequest(model=model, num_steps=2).model_dump(mode="json"), **over)
            tuning.group_id = group = new_id("grp")
            sampling = SampleJob(request={"model": model, "num_steps": 2}, request_hash="", num_images=1, **over)
            session.add_all([registration, tuning, sampling])
        made = (model, public, schedule, private, tuning.id, group, sampling.id, registration.id)
        yield World(client, state, owner, other, admin, owner_id, *made)


def routes_of(client: TestClient) -> list[APIRoute]:
    """All routes of the API and of the page."""
    app: Any = client.app
    assert isinstance(app, FastAPI)
    routers = [route for route in app.routes if not isinstance(route, APIRoute)]
    found = [route for route in app.routes if isinstance(route, APIRoute)]
    for router in routers:  # FastAPI may keep included routers as they are.
        inner = getattr(router, "original_router", None)
        found += [route for route in getattr(inner, "routes", ()) if isinstance(route, APIRoute)]
    return found


def ask(client: TestClient, method: str, path: str, key: Headers, **given: Any) -> httpx.Response:
    """Send a request with a key; one for a page has it in a cookie, as browsers do."""
    if not path.startswith(("/v1/", "/openai/", "/metrics")):
        key = {"Cookie": f"{COOKIE}={key['Authorization'].removeprefix('Bearer ')}", "Sec-Fetch-Site": "same-origin"}
    return client.request(method, path, headers=key, follow_redirects=False, **given)


def told(answer: httpx.Response, named: str) -> tuple[int, str]:
    """The content of an answer, whatever it was asked about."""
    text = answer.text.replace(named, "ID").replace(named[-8:], "ID")
    return answer.status_code, re.sub(r"req_\w+|request_id\W+\w+", "", text)


def test_no_path_leads_to_what_is_private_to_another(world: World) -> None:
    routes = [
        route for route in routes_of(world.client) if re.search(r"{(model_id|schedule_id|job_id|group_id)}", route.path)
    ]
    assert len(routes) > 20
    for route in routes:
        for method in sorted(route.methods or ()):
            for named in world.ids_of(route):
                body = BODIES.get((method, route.path), {})
                paths = {
                    id: re.sub(r"{\w+_id}", id, route.path).replace("{name}", "production") for id in (named, UNKNOWN)
                }
                answers = {id: ask(world.client, method, path, world.other, **body) for id, path in paths.items()}
                what = f"{method} {route.path} {named}"
                assert answers[named].status_code == 404, f"{what}: {answers[named].text}"
                assert told(answers[named], named) == told(answers[UNKNOWN], UNKNOWN), what
    for route in routes:
        if route.methods == {"GET"}:
            for key in (world.owner, world.admin):
                path = re.sub(r"{\w+_id}", world.ids_of(route)[0], route.path).replace("{name}", "production")
                assert ask(world.client, "GET", path, key).status_code not in (401, 404), path


def test_every_operation_is_walked_or_decided_about(world: World) -> None:
    document = world.client.get("/openapi.json").json()
    operations = {
        operation["operationId"]: path for path, methods in document["paths"].items() for operation in methods.values()
    }
    walked = {name for name, path in operations.items() if re.search(NAMES, path)}
    assert operations.keys() == walked | {name for name in NAMING if ":" not in name} | LISTING | NAMELESS
    pages = {route.path for module in (web, forms) for route in module.router.routes if isinstance(route, APIRoute)}
    named = {path.partition("?")[0] for _, path, _ in NAMING.values()}
    assert {path for path in pages if "_id}" not in path} <= {*LISTS, *named, "/login", "/logout", "/start"}


def test_a_private_model_that_a_request_names_is_as_unknown_as_any(world: World) -> None:
    for operation, (method, path, given) in NAMING.items():

        def told_about(id: str) -> tuple[int, str]:
            sent = json.loads(json.dumps(given).replace('"ID"', json.dumps(id)))  # noqa: B023 (called at once)
            return told(ask(world.client, method, path.replace("ID", id), world.other, **sent), id)  # noqa: B023

        for named, unknown in ((world.model, UNKNOWN), (world.registration, UNKNOWN), (NAME, "nobody-has")):
            assert told_about(named) == told_about(unknown), operation


def test_a_private_schedule_that_a_page_names_is_as_unknown_as_any(world: World) -> None:
    unknown = "sch_00000000000000000000000000"
    for path in ("/compare/schedules?a=ID&b=ID", "/playground?model=PUBLIC&schedule=ID"):
        for named in world.private_schedules:
            answers = [
                told(ask(world.client, "GET", path.replace("PUBLIC", world.public).replace("ID", id), world.other), id)
                for id in (named, unknown)
            ]
            assert answers[0] == answers[1], path
            own = ask(world.client, "GET", path.replace("PUBLIC", world.public).replace("ID", named), world.owner)
            assert own.status_code == 200, path


def test_lists_pages_and_counts_hold_nothing_that_is_private_to_another(world: World) -> None:
    shown = ""
    for path in LISTS:
        url = path.replace("PUBLIC", world.public)
        answer = ask(world.client, "GET", url, world.other)
        assert answer.status_code == 200, url
        assert [hidden for hidden in world.hidden if hidden in answer.text or hidden[-8:] in answer.text] == [], url
        shown += ask(world.client, "GET", url, world.owner).text
    not_listed = {world.sample_job}
    assert [hidden for hidden in world.hidden if hidden not in shown and hidden not in not_listed] == []
    assert_problem(world.client.get("/v1/audit", headers=world.other), 403)
    everything = world.client.get("/v1/models", headers=world.admin).json()["items"]
    row = next(row for row in everything if row["id"] == world.model)
    assert (row["private"], row["owner"]) == (True, world.owner_id)
    assert "0 schedules" in ask(world.client, "GET", "/models", world.other).text
    assert "3 schedules" in ask(world.client, "GET", "/models", world.owner).text


def test_auto_takes_the_public_schedules_and_the_callers_own(world: World) -> None:
    accepted = world.private_schedules[1]
    query: Any = {"model": world.public, "num_steps": 2}

    def resolved(headers: Headers) -> Any:
        return world.client.get("/v1/schedules/resolve", params=query, headers=headers).json()

    assert resolved(world.owner)["schedule"]["id"] == accepted
    for headers in (world.other, world.admin):
        assert resolved(headers) == {
            "schedule": None,
            "reason": "untuned: no accepted schedule for this setting (0 rejected)",
        }
    sampled = {}
    for name in ("owner", "other", "owner"):  # The resolution of one key's request is not another's.
        headers = getattr(world, name) | {"Prefer": "respond-async"}
        sampled[name] = world.client.post("/v1/samples", json=query, headers=headers).json()["schedule"]
    assert sampled == {"owner": accepted, "other": None}
    for named in (accepted, "sch_00000000000000000000000000"):
        answer = world.client.post("/v1/samples", json=query | {"schedule": named}, headers=world.other)
        assert_problem(answer, 422, "schedule", accepted="'auto', 'none', or the id or alias")


def test_the_better_of_a_public_and_an_own_schedule_is_taken(world: World) -> None:
    with world.state.registry.write() as session:
        key = SamplingSetting(model=world.public, num_steps=2).key()
        grid = {"timesteps": GRID["timesteps"], "t_ratios": GRID["t_ratios"], "provenance": {}, "evaluation": None}
        for score in (0.7, 0.3):
            row = Schedule(
                **key, **grid, version=next_version(session, key), status=ScheduleStatus.ACCEPTED, score=score
            )
            session.add(row)
            session.flush()
            best = resolve(session, Caller(), SamplingSetting(model=world.public, num_steps=2))[0]
            assert best is not None and best.score == score
    query = {"model": world.public, "num_steps": "2"}
    found = world.client.get("/v1/schedules/resolve", params=query, headers=world.owner).json()["schedule"]
    assert found["score"] == 0.3


def test_versions_of_private_schedules_are_counted_apart(world: World) -> None:
    assert import_schedule(world.client, world.other, world.public)["version"] == 1
    mine = import_schedule(world.client, world.owner, world.public, private=True)
    assert (mine["version"], mine["private"], mine["owner"]) == (4, True, world.owner_id)


def test_content_that_is_private_to_one_key_is_new_to_another(world: World) -> None:
    def register(headers: Headers, **fields: Any) -> tuple[int, str]:
        answer = world.client.post("/v1/models", json={"builtin": "mixture-ring", **fields}, headers=headers)
        return answer.status_code, answer.json()["id"]

    assert register(world.owner, private=True) == (200, world.model)
    status, private = register(world.other, private=True, name=NAME)
    assert (status, private != world.model) == (201, True)
    status, public = register(world.other, name="ring")
    assert (status, public not in (private, world.model)) == (201, True)
    assert register(world.owner) == (200, public)
    assert register(world.owner, private=True) == (200, world.model)


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as file:
        file.add(BUILTIN_FOLDERS["digits8"], arcname=".")
    return buffer.getvalue()


def test_an_archive_that_is_private_to_one_key_is_new_to_another_before_and_after_it_is_described(world: World) -> None:
    content = archive()

    def upload(headers: Headers, **fields: str) -> Any:
        headers = headers | {"Prefer": "respond-async"}
        answer = world.client.post("/v1/models", files={"archive": ("m.tgz", content)}, data=fields, headers=headers)
        assert answer.status_code in (200, 201, 202), answer.text
        return answer.json()

    first = upload(world.owner, private="true")
    assert (first["private"], first["owner"]) == (True, world.owner_id)
    assert upload(world.owner, private="true")["id"] == first["id"]
    second = upload(world.other)
    assert second["id"] != first["id"]
    assert second["private"] is False
    with world.state.registry.write() as session:
        for made in (first, second):
            registration = session.get_one(ModelRegistration, made["id"])
            registration.state = JobState.SUCCEEDED
            spec = session.get_one(Model, world.public).spec
            assert keep_described(session, registration, spec).id == made["id"]
    assert upload(world.owner, private="true")["id"] == first["id"]
    assert upload(world.other)["id"] == second["id"]
    assert_problem(world.client.get(f"/v1/models/{first['id']}", headers=world.other), 404)
    data = {"private": "yes"}
    answer = world.client.post("/v1/models", files={"archive": ("m.tgz", content)}, data=data, headers=world.owner)
    assert_problem(answer, 422, "private", accepted="true or false")


def test_a_private_schedule_gets_no_name_on_a_model_that_everybody_sees(world: World) -> None:
    url, body = f"/v1/models/{world.public}/aliases/best", {"schedule": world.private_schedules[0]}
    assert_problem(world.client.put(url, json=body, headers=world.owner), 422, "schedule", "one that is not private")
    problem = assert_problem(world.client.put(url, json=body, headers=world.other), 422, "schedule")
    assert "private" not in problem["detail"]


def test_a_model_is_not_deleted_with_what_others_have_privately(world: World) -> None:
    url = f"/v1/models/{world.public}?cascade=true"
    problem = assert_problem(world.client.delete(url, headers=world.other), 409, accepted="nobody else's")
    assert not any(id in problem["detail"] for id in world.hidden)
    assert world.client.delete(url, headers=world.admin).status_code == 204


def test_without_a_key_nothing_can_be_private(database_url: str, tmp_path: Path) -> None:
    settings: Any = {"timetuner_home": tmp_path, "database_url": database_url, "broker_url": "redis://127.0.0.1:1/0"}
    with TestClient(create_app(Settings(**settings)), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        body = {"builtin": "mixture-ring"}
        assert_problem(client.post("/v1/models", json=body | {"private": True}), 422, "private", accepted="an API key")
        model = client.post("/v1/models", json=body).json()
        assert (model["owner"], model["private"]) == (None, False)
        for path, more in (("/v1/tuning-jobs", {"num_steps": 2}), ("/v1/schedules", GRID)):
            body = {"model": model["id"], "private": True, **more}
            assert_problem(client.post(path, json=body), 422, "private", accepted="an API key")


def test_what_a_catalog_remembers_of_one_caller_is_not_told_another(world: World) -> None:
    catalog, request = Catalog(), SampleRequest(model=world.model, num_steps=2)
    with world.state.registry.read() as session:
        catalog.refresh(session)
        admin = Caller()
        assert catalog.model(session, admin, world.model).name == NAME
        row = session.get_one(TuningJob, world.tuning_job)
        assert row.request["private"] is False
        assert catalog.schedule(session, admin, request) is None
    answer = world.client.post("/v1/samples", json={"model": world.model, "num_steps": 2}, headers=world.other)
    assert_problem(answer, 422, "model", accepted="the id of a registered model")
