"""Every operation of the OpenAPI document, by every kind of caller, on their own and on others' things."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from service.app import create_app
from service.registry.keys import Scope, revoke_key
from service.registry.tables import AuditEntry, JobState, SampleJob, TuningJob
from service.registry.types import new_id
from tests.keys import NewUser, User
from tests.service.problems import assert_problem
from tests.stack import Json, Stack, wait_until

SECRET = re.compile("tt_nonsense|[0-9a-f]{64}")
METHODS = {"get", "put", "post", "delete", "patch"}


@dataclass(frozen=True)
class Operation:
    """One of the document; `scopes` is None if it needs no key."""

    id: str
    method: str
    path: str
    scopes: frozenset[str] | None

    @property
    def changes(self) -> bool:
        return self.method != "GET"

    @property
    def is_of_a_job(self) -> bool:
        return "{job_id}" in self.path or "{group_id}" in self.path


PATHS: Json = create_app().openapi()["paths"]


def operations() -> list[Operation]:
    found = []
    for path, of_path in PATHS.items():
        for method in METHODS & set(of_path):
            security = of_path[method].get("security")
            scopes = None if not security else frozenset(security[0]["api_key"])
            found.append(Operation(of_path[method]["operationId"], method.upper(), path, scopes))
    return sorted(found, key=lambda operation: operation.id)


OPERATIONS = operations()
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.id)

PUBLIC = None
READING: frozenset[str] = frozenset()
RULES: dict[str, frozenset[str] | None] = {
    "health": PUBLIC,
    "readiness": PUBLIC,
    "metrics": READING,
    "list_models": READING,
    "get_model": READING,
    "register_model": frozenset({"models:write"}),
    "rename_model": frozenset({"models:write"}),
    "delete_model": frozenset({"models:write"}),
    "list_schedules": READING,
    "get_schedule": READING,
    "export_schedule": READING,
    "resolve_schedule": READING,
    "import_schedule": frozenset({"models:write"}),
    "delete_schedule": frozenset({"models:write"}),
    "list_aliases": READING,
    "set_alias": frozenset({"models:write"}),
    "delete_alias": frozenset({"models:write"}),
    "list_tuning_jobs": READING,
    "get_tuning_job": READING,
    "list_tuning_job_events": READING,
    "submit_tuning_job": frozenset({"tune"}),
    "cancel_tuning_job": frozenset({"tune"}),
    "submit_tuning_group": frozenset({"tune"}),
    "get_tuning_group": READING,
    "sample": frozenset({"sample"}),
    "list_sample_jobs": READING,
    "get_sample_job": READING,
    "get_sample_content": READING,
    "follow_sample_job": READING,
    "cancel_sample_job": frozenset({"sample"}),
    "list_usage": READING,
    "list_audit": frozenset({"admin"}),
    "openai_generate_images": frozenset({"sample"}),
    "openai_list_models": READING,
    "openai_get_model": READING,
}
BODIES: dict[str, Json] = {
    "register_model": {"builtin": "mixture-ring"},
    "submit_tuning_job": {"num_steps": 2, "tuner": {"objective": "grid"}, "evaluation": {"num_samples": 16}},
    "submit_tuning_group": {"jobs": []},
    "import_schedule": {"num_steps": 1, "timesteps": [1, 0.001], "t_ratios": [1]},
    "set_alias": {},
    "rename_model": {"name": "mixture-ring"},
    "sample": {"num_steps": 1, "schedule": "none"},
    "openai_generate_images": {"prompt": "", "num_steps": 1, "schedule": "none", "seed": 321},
}
KINDS: dict[str, tuple[Scope, ...]] = {"reader": (), **{str(scope): (scope,) for scope in Scope}}


class World:
    """Things to ask for, new ones for each request."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.model = stack.register("mixture-ring")
        self.of_images = stack.register("mixture-gratings")
        body = {"model": self.model, "num_steps": 1, "seed": 321}
        answer = stack.client.post("/v1/samples", json=body, headers={"Accept": "application/x-npy"})
        with stack.registry.read() as session:
            job = session.get_one(SampleJob, answer.headers["content-location"].split("/")[3])
        self.request, self.artifact, self.artifact_row = job.request, job.artifact, job.artifact_row

    def send(self, client: httpx.Client, operation: Operation, owner: str | None) -> httpx.Response:
        """A request that is right in everything, but perhaps for who sends it."""
        path, body = operation.path, None
        params: dict[str, str | int] = {}
        if "{schedule_id}" in path or operation.id == "set_alias":
            schedule = self._schedule()
            path = path.replace("{schedule_id}", schedule)
        if path.startswith("/openai/"):
            path = path.replace("{name}", self.model)
        if "{name}" in path:
            path = path.replace("{name}", self._alias())
        if operation.is_of_a_job:
            job = self._job(operation, owner)
            path = path.replace("{job_id}", job).replace("{group_id}", job.replace("job_", "grp_"))
        if operation.id in BODIES:
            body = dict(BODIES[operation.id])
            if operation.id == "set_alias":
                body["schedule"] = schedule
            elif operation.id == "openai_generate_images":
                body["model"] = self.of_images
            elif operation.id == "submit_tuning_group":
                body["jobs"] = [BODIES["submit_tuning_job"] | {"model": self.model}]
            elif operation.id not in ("register_model", "rename_model"):
                body["model"] = self.model
        if operation.id == "resolve_schedule":
            params = {"model": self.model, "num_steps": 2}
        path = path.replace("{model_id}", self.model)
        return client.request(operation.method, path, json=body, params=params)

    def _job(self, operation: Operation, owner: str | None) -> str:
        common: dict[str, Any] = {"model_id": self.model, "request": self.request, "owner": owner}
        job: SampleJob | TuningJob
        if "/samples/" in operation.path:
            made: dict[str, Any] = {"artifact": self.artifact, "artifact_row": self.artifact_row, "num_images": 1}
            made["request_hash"] = ""
            job = SampleJob(**common, **made, state=JobState.SUCCEEDED)
        else:
            id = new_id("job")
            job = TuningJob(id=id, group_id=id.replace("job_", "grp_"), **common, state=JobState.CANCELLED)
        with self.stack.registry.write() as session:
            session.add(job)
        return job.id

    def _schedule(self) -> str:
        return str(self.stack.client.post("/v1/schedules", json=self._imported()).json()["id"])

    def _imported(self) -> Json:
        return BODIES["import_schedule"] | {"model": self.model}

    def _alias(self) -> str:
        name = new_id("a").lower().replace("_", "-")
        body = {"schedule": self._schedule()}
        assert self.stack.client.put(f"/v1/models/{self.model}/aliases/{name}", json=body).status_code == 200
        return name


@pytest.fixture(scope="module")
def world(stack: Stack) -> World:
    return World(stack)


@pytest.fixture(scope="module")
def users(new_user: NewUser) -> dict[str, User]:
    return {kind: new_user(*scopes) for kind, scopes in KINDS.items()}


@pytest.fixture(scope="module")
def strangers(stack: Stack, guarded: str, new_user: NewUser) -> Iterator[dict[str, httpx.Client]]:
    """Clients without a key that is worth anything."""
    expired = new_user(Scope.ADMIN, expires_in=timedelta(seconds=-1))
    revoked = new_user(Scope.ADMIN)
    with stack.registry.write() as session:
        revoke_key(session, revoked.id)
    good = new_user(Scope.ADMIN).key
    headers = {
        "no key": None,
        "expired": f"Bearer {expired.key}",
        "revoked": f"Bearer {revoked.key}",
        "malformed": "Bearer tt_nonsense",
        "empty": "",
        "not ASCII": "Bearer tt_\xe9",
        "another secret": f"Bearer {good[:-8]}{'0' * 8}",
        "another prefix": f"Bearer tt_{'0' * 12}_{good.rpartition('_')[2]}",
        "another scheme": f"Basic {good}",
        "more than a key": f"Bearer {good}x",
    }
    clients = {}
    for name, value in headers.items():
        given = {} if value is None else {b"Authorization": value.encode("latin-1")}
        clients[name] = httpx.Client(base_url=guarded, timeout=60, headers=given)
    yield clients
    for client in clients.values():
        client.close()


def last_entry(stack: Stack) -> AuditEntry | None:
    with stack.registry.read() as session:
        return session.scalar(select(AuditEntry).order_by(AuditEntry.id.desc()).limit(1))


def test_every_operation_has_its_rule_and_the_document_tells_it() -> None:
    assert {operation.id: operation.scopes for operation in OPERATIONS} == RULES


@each_operation
def test_the_document_tells_of_refusals(operation: Operation) -> None:
    responses = PATHS[operation.path][operation.method.lower()]["responses"]
    assert ({"401", "403", "429"} <= set(responses)) == (operation.scopes is not PUBLIC)


@each_operation
def test_nobody_gets_in_without_a_valid_key(
    request: pytest.FixtureRequest, world: World, strangers: dict[str, httpx.Client], operation: Operation
) -> None:
    """Each operation is tried without a key and with one bad key, another one for each; with `--all`, with all."""
    _, *bad = strangers
    names = ["no key", bad[OPERATIONS.index(operation) % len(bad)]]
    for name in strangers if request.config.getoption("--all") else names:
        client = strangers[name]
        answer = world.send(client, operation, owner=None)
        if operation.scopes is PUBLIC:
            assert answer.status_code == 200, name
        else:
            assert_refusal(operation, answer, 401, "Authorization", "Bearer tt_...")
            assert answer.headers["www-authenticate"].startswith("Bearer"), name
            assert not SECRET.search(answer.text), name


@pytest.mark.parametrize(
    ("operation", "whose"),
    [
        pytest.param(operation, whose, id=f"{operation.id} {whose}")
        for operation in OPERATIONS
        for whose in (("own", "other's") if operation.is_of_a_job else ("shared",))
    ],
)
def test_a_key_may_do_what_its_scopes_say_with_what_is_its_own(
    stack: Stack, world: World, users: dict[str, User], operation: Operation, whose: str
) -> None:
    for kind, user in users.items():
        before = last_entry(stack)
        answer = world.send(user.client, operation, "key_others" if whose == "other's" else user.id)
        allowed = operation.scopes is PUBLIC or kind == "admin" or operation.scopes <= {kind}
        if not allowed:
            needed = min(operation.scopes or ())
            assert_refusal(operation, answer, 403, accepted=f"accepted: one that has {needed!r}")
        elif whose == "other's" and kind != "admin":
            assert_problem(answer, 404)
        elif operation.id == "delete_model":
            assert_problem(answer, 409)  # it has jobs
        else:
            assert answer.is_success, (kind, answer.text)
        changed = operation.changes and not (operation.id == "register_model" and answer.status_code == 200)
        if changed or not allowed:
            check_entry(stack, before, user, operation, answer)


def assert_refusal(
    operation: Operation, answer: httpx.Response, status: int, field: str | None = None, accepted: str = ""
) -> None:
    """A problem; of operations under /openai/, an error in OpenAI's form."""
    if not operation.path.startswith("/openai/"):
        assert_problem(answer, status, field, accepted)
        return
    assert answer.status_code == status, answer.text
    assert accepted in answer.json()["error"]["message"]


def check_entry(
    stack: Stack, before: AuditEntry | None, user: User, operation: Operation, answer: httpx.Response
) -> None:
    """Wait until the audit log has the request; a refusal comes into it after the answer."""

    def newer() -> AuditEntry | None:
        entry = last_entry(stack)
        return entry if entry is not None and (before is None or entry.id != before.id) else None

    entry: AuditEntry = wait_until(newer, f"entry of {operation.id}")
    outcome = "done" if answer.is_success else f"refused: {answer.status_code}"
    # OpenAI's request for images makes a sampling job as ours does.
    action = "sample" if operation.id == "openai_generate_images" and answer.is_success else operation.id
    assert (entry.actor, entry.action, entry.outcome) == (user.id, action, outcome)


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1", "/v1/models/", "/metrics"])
def test_what_is_not_there_needs_a_key_too(guarded: str, path: str) -> None:
    status = httpx.get(f"{guarded}{path}").status_code
    assert status == (404 if path == "/v1" else 401)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/login"])
def test_the_documentation_needs_no_key(guarded: str, path: str) -> None:
    assert httpx.get(f"{guarded}{path}", follow_redirects=True, timeout=60).status_code == 200
