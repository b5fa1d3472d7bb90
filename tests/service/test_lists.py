"""Lists that are searched and sorted, renamed models, and usage, as the API and the pages show them."""

from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from service.registry.keys import Scope, create_key
from service.registry.tables import UsageKind, UsageTotal
from service.registry.types import utc_now
from service.registry.usage import Payer, Use, add_usage, first_total_id
from tests.service.problems import assert_problem
from tests.web.test_home import serving

NAMES = {"digits8": "beta", "mixture-ring": "Alpha_1", "mixture-gratings": "gamma"}
FORM = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def client(database_url: str, tmp_path: Path) -> Iterator[TestClient]:
    with serving(database_url, tmp_path, "off") as client:
        yield client


@pytest.fixture
def models(client: TestClient) -> dict[str, str]:
    """The ids of some models by their names, the oldest first."""
    made = [client.post("/v1/models", json={"builtin": builtin, "name": name}) for builtin, name in NAMES.items()]
    return {answer.json()["name"]: answer.json()["id"] for answer in made}


def names_of(client: TestClient, **query: Any) -> list[str]:
    """The names in all pages of a list, each of which has one model."""
    names, cursor = [], None
    while True:
        page = client.get("/v1/models", params={**query, "limit": 1, **({"cursor": cursor} if cursor else {})}).json()
        names += [model["name"] for model in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            return names


def test_models_are_searched_and_sorted(client: TestClient, models: dict[str, str]) -> None:
    assert names_of(client) == ["gamma", "Alpha_1", "beta"]
    assert names_of(client, sort="oldest") == ["beta", "Alpha_1", "gamma"]
    assert names_of(client, sort="name") == ["Alpha_1", "beta", "gamma"]
    assert names_of(client, search="A", sort="name") == ["Alpha_1", "beta", "gamma"]
    assert names_of(client, search="alpha") == names_of(client, search="a_1") == ["Alpha_1"]
    assert names_of(client, search=models["beta"][-8:]) == ["beta"]
    assert names_of(client, search="a%1") == []
    assert_problem(client.get("/v1/models?sort=name&cursor=mdl_nope"), 422, "cursor", "the next_cursor of the page")
    assert_problem(client.get("/v1/models?sort=size"), 422, "sort", "'newest', 'oldest' or 'name'")
    assert_problem(client.get("/v1/models?search=a&state=refused"), 422, "state", "ready")
    page = client.get("/models?search=alpha&sort=name").text
    assert "Alpha_1" in page and "gamma" not in page


def test_a_model_is_renamed_and_keeps_its_id(client: TestClient, models: dict[str, str]) -> None:
    url = f"/v1/models/{models['beta']}"
    answer = client.patch(url, json={"name": "delta"})
    assert (answer.status_code, answer.json()["name"], answer.json()["id"]) == (200, "delta", models["beta"])
    assert client.get(url).json() == answer.json()
    for wrong in ("", "x" * 201, "a\nb", 5, None):
        assert_problem(client.patch(url, json={"name": wrong}), 422, "name")
    assert_problem(client.patch(url, json={"name": "a", "private": True}), 422, "private")
    assert_problem(client.patch("/v1/models/mdl_nope", json={"name": "a"}), 404)
    posted = client.post(
        f"/models/{models['beta']}/rename", data={"name": "omega"}, headers=FORM, follow_redirects=False
    )
    assert (posted.status_code, posted.headers["location"]) == (303, f"/models/{models['beta']}")
    assert "<h1>omega" in client.get(f"/models/{models['beta']}").text


def test_a_models_page_lists_what_would_be_deleted_with_it(client: TestClient, models: dict[str, str]) -> None:
    model = models["gamma"]
    assert "Nothing uses it" in client.get(f"/models/{model}").text
    grid = {"num_steps": 1, "timesteps": [1, 0.001], "t_ratios": [1]}
    schedules = [client.post("/v1/schedules", json={"model": model, **grid}).json()["id"] for _ in range(12)]
    job = client.post("/v1/tuning-jobs", json={"model": model, "num_steps": 2}).json()["id"]
    page = client.get(f"/models/{model}").text
    section = page[page.index('id="delete"') :]
    assert f"/jobs/{job}" in section
    assert [schedule for schedule in schedules if f"/schedules/{schedule}" in section] == schedules[2:]
    assert f"/schedules?model={model}" in section


def test_schedules_are_sorted_and_searched_on_their_page(client: TestClient, models: dict[str, str]) -> None:
    model, grid = models["beta"], {"num_steps": 1, "timesteps": [1, 0.001], "t_ratios": [1]}
    schedule = client.post("/v1/schedules", json={"model": model, **grid}).json()["id"]
    assert client.get("/v1/schedules?search=beta").json()["items"][0]["id"] == schedule
    assert client.get("/v1/schedules?sort=score").json()["items"] == []  # It was imported.
    assert_problem(client.get(f"/v1/schedules?sort=score&cursor={schedule}"), 422, "cursor", "the next_cursor")
    assert schedule in client.get("/schedules?search=BETA").text
    assert schedule not in client.get("/schedules?search=gamma").text


@pytest.mark.parametrize("engine", ["sqlite"])
def test_usage_is_each_keys_own_and_an_admins_is_everybodys(
    make_database_url: Any, tmp_path: Path, engine: str
) -> None:
    today = utc_now().date()
    with serving(make_database_url(engine, tmp_path), tmp_path, "on") as client:
        state: Any = client.app.state.timetuner  # type: ignore[attr-defined]
        with state.registry.write() as session:
            keys = {
                name: create_key(session, name, (scope,))
                for name, scope in (("ann", Scope.SAMPLE), ("root", Scope.ADMIN))
            }
        ann, root = ({"Authorization": f"Bearer {text}"} for _, text in keys.values())
        model = client.post("/v1/models", json={"builtin": "digits8"}, headers=root).json()["id"]
        with state.registry.write() as session:
            for name, use in (("ann", Use(1.5, 6, 0.25)), ("root", Use(2, 3, 4))):
                add_usage(session, [(Payer(keys[name][0].id, model, UsageKind.SAMPLING), use)])
        with state.registry.write() as session:  # Root's use was nine days ago.
            before = today - timedelta(days=9)
            of_root = update(UsageTotal).where(UsageTotal.owner == keys["root"][0].id)
            session.execute(of_root.values(day=before, id=first_total_id(before) + "_x"))

        def usage(headers: Any, **query: Any) -> list[tuple[str, str, float]]:
            items = client.get("/v1/usage", params=query, headers=headers).json()["items"]
            return [(item["key_name"], item["day"], item["network_rows"]) for item in items]

        own, roots = ("ann", f"{today}", 6.0), ("root", f"{before}", 3.0)
        assert usage(ann) == usage(root, since=today) == usage(root, key=keys["ann"][0].id) == [own]
        assert usage(root) == [own, roots]
        assert usage(root, until=before) == usage(root, since=before, until=before) == [roots]
        assert usage(ann, key=keys["root"][0].id) == usage(root, model="mdl_nope") == []
        assert usage(root, until=date.max) == usage(root, since="0999-12-31") == [own, roots]
        assert usage(root, until=date.min) == []
        assert client.get(f"/usage?until={date.min}", headers={"Cookie": f"timetuner_key={keys['root'][1]}"}).is_success
        assert_problem(client.get(f"/v1/usage?since={today}&until={before}", headers=root), 422, "since", "up to until")
        assert_problem(client.get("/v1/usage?since=yesterday", headers=root), 422, "since")
        pages = [
            client.get("/usage", headers={"Cookie": f"timetuner_key={keys[name][1]}"}).text for name in ("ann", "root")
        ]
        assert ["root" in page and ">3<" in page for page in pages] == [False, True]
        assert all("0.25 s" in page and "digits8" in page for page in pages)
