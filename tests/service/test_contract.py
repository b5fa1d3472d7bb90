"""The whole API: every error is a problem document, and the OpenAPI document tells the truth."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from service.http.openapi import TITLES
from tests.service.problems import assert_problem
from tests.stack import QUICK, Json, Stack

JSON_TYPE = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/models/mdl_nope/nope", 404),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/v1/tuning-jobs", 405),
        ("PATCH", "/v1/schedules/sch_nope", 405),
        ("GET", "/v1/tuning-jobs/job_nope/cancel", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_an_unknown_route_or_method_is_a_problem(client: httpx.Client, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert_problem(response, status)
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/models", "GET, POST"),
        ("/v1/schedules/sch_nope", "DELETE, GET"),
        ("/healthz", "GET"),
        ("/docs", "GET"),
    ],
)
def test_a_method_that_a_path_does_not_have_is_answered_with_those_it_has(
    client: httpx.Client, path: str, allowed: str
) -> None:
    allow = client.patch(path).headers["allow"]
    assert ", ".join(sorted(allow.split(", "))) == allowed


POSTS = ["/v1/models", "/v1/tuning-jobs", "/v1/tuning-groups", "/v1/schedules", "/v1/samples"]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_type_is_refused(client: httpx.Client, path: str, content_type: str) -> None:
    response = client.post(path, content=b"{}", headers={"Content-Type": content_type})
    assert_problem(response, 415, "Content-Type", "application/json")


def in_pieces(size: int) -> Iterator[bytes]:
    """A body that does not say in advance how long it is."""
    yield b'{"x": "'
    for _ in range(size // 1000):
        yield b"x" * 1000
    yield b'"}'


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("content", [b" " * 200_000, in_pieces], ids=["declared", "streamed"])
def test_a_body_that_is_too_large_is_refused(client: httpx.Client, path: str, content: Any) -> None:
    body = content if isinstance(content, bytes) else content(200_000)
    assert_problem(client.post(path, content=body, headers=JSON_TYPE), 413, accepted="up to 100000 bytes")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "[]",
        '"text"',
        "{",
        '{"model": NaN, "builtin": NaN, "num_steps": Infinity}',
        '{"model": "\\u0000", "builtin": "\\u0000", "num_steps": 5}',
        '{"model": "\\ud800", "builtin": "\\ud800", "num_steps": 5}',
        '{"\\ud800": 1, "x": [NaN]}',
        '{"model": ' + "9" * 5000 + "}",
    ],
)
def test_a_body_of_nonsense_is_refused(client: httpx.Client, path: str, body: str) -> None:
    response = client.post(path, content=body.encode(), headers=JSON_TYPE)
    assert_problem(response, 400 if response.status_code == 400 else 422)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models", '{"builtin": "mixture-ring", "builtin": "mixture-gratings"}'),
        ("/v1/tuning-jobs", '{"model": "%s", "num_steps": 5, "tuner": {"objective": "grid", "objective": "grid"}}'),
        (
            "/v1/schedules",
            '{"model": "%s", "num_steps": 1, "timesteps": [1, 0.001], "t_ratios": [1], "t_ratios": [0.9]}',
        ),
        ("/v1/samples", '{"model": "%s", "num_steps": 5, "seed": 1, "seed": 2}'),
    ],
)
def test_a_field_that_is_given_twice_is_refused(stack: Stack, path: str, body: str) -> None:
    content = body.replace("%s", stack.register("mixture-gratings")).encode()
    answer = stack.client.post(path, content=content, headers=JSON_TYPE)
    assert_problem(answer, 422, accepted="each field once")
    assert "is given 2 times" in answer.json()["detail"]


def test_a_name_no_database_can_keep_is_refused(client: httpx.Client) -> None:
    named = {"builtin": "mixture-gratings", "name": "a\0b"}
    assert_problem(client.post("/v1/models", json=named), 422, "name")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/tuning-jobs", "/v1/schedules", "/v1/samples"])
@pytest.mark.parametrize("identifier", ["%00", "a%20b", "%F0%9F%98%80", "x" * 100])
def test_an_identifier_that_can_be_none_is_refused(client: httpx.Client, path: str, identifier: str) -> None:
    response = client.get(f"{path}/{identifier}")
    assert_problem(response, 422, "path")


@pytest.mark.parametrize(
    "provenance", ['{"a": "\\ud800"}', '{"a": ' * 600 + "1" + "}" * 600, '{"a": ' + "[" * 50 + "]" * 50 + "}"]
)
def test_provenance_that_cannot_be_read_back_is_refused(stack: Stack, provenance: str) -> None:
    model = stack.register("mixture-ring")
    grid = '"num_steps": 1, "timesteps": [1, 0.001], "t_ratios": [1]'
    body = f'{{"model": "{model}", {grid}, "provenance": {provenance}}}'
    answer = stack.client.post("/v1/schedules", content=body.encode(), headers=JSON_TYPE)
    assert_problem(answer, 422, "provenance")
    assert stack.client.get("/v1/schedules").status_code == 200


def test_only_model_archives_may_be_large(client: httpx.Client) -> None:
    answer = client.post("/v1/samples", files={"archive": b"x" * 200_000})
    assert_problem(answer, 413, accepted="up to 100000 bytes")


@pytest.mark.parametrize("accept", ["image/png;q=nan", "image/png;q=inf, text/html"])
def test_a_nonsense_quality_accepts_nothing(stack: Stack, accept: str) -> None:
    body = {"model": stack.register("mixture-gratings"), "num_steps": 2}
    assert_problem(stack.client.post("/v1/samples", json=body, headers={"Accept": accept}), 406, "Accept")


@pytest.mark.parametrize("after", ["-1", "9" * 5000])
def test_an_event_number_that_can_be_none_is_refused(stack: Stack, after: str) -> None:
    model = stack.register("mixture-ring")
    job = stack.submit(model, num_steps=3, **QUICK)
    url = f"/v1/tuning-jobs/{job['id']}/events"
    assert_problem(stack.client.get(url, params={"after": after}), 422, "after")
    assert stack.client.get(url, headers={"Last-Event-ID": after}).status_code == 200


CONTRACT = {
    "/v1/models": {"get", "post"},
    "/v1/models/{model_id}": {"get", "patch", "delete"},
    "/v1/models/{model_id}/aliases": {"get"},
    "/v1/models/{model_id}/aliases/{name}": {"put", "delete"},
    "/v1/tuning-jobs": {"get", "post"},
    "/v1/tuning-jobs/{job_id}": {"get"},
    "/v1/tuning-jobs/{job_id}/cancel": {"post"},
    "/v1/tuning-jobs/{job_id}/events": {"get"},
    "/v1/schedules": {"get", "post"},
    "/v1/schedules/resolve": {"get"},
    "/v1/schedules/{schedule_id}": {"get", "delete"},
    "/v1/schedules/{schedule_id}/export": {"get"},
    "/v1/samples": {"get", "post"},
    "/v1/samples/{job_id}": {"get"},
    "/v1/samples/{job_id}/content": {"get"},
    "/v1/usage": {"get"},
    "/v1/audit": {"get"},
    "/openai/v1/images/generations": {"post"},
    "/openai/v1/models": {"get"},
    "/openai/v1/models/{name}": {"get"},
    "/healthz": {"get"},
    "/readyz": {"get"},
}


@pytest.fixture
def document(client: httpx.Client) -> Json:
    result: Json = client.get("/openapi.json").json()
    return result


def test_the_openapi_document_lists_the_whole_contract(document: Json) -> None:
    paths = {path: set(operations) for path, operations in document["paths"].items()}
    assert {path: paths.get(path) for path in CONTRACT} == CONTRACT


def test_every_operation_has_a_title_of_its_own_and_the_page_leads_back(client: httpx.Client, document: Json) -> None:
    titles = [operation["summary"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(titles)) == len(titles) == len(TITLES)
    for path in ("/docs", "/redoc"):
        page = client.get(path).text
        assert all(f'<a href="{link}"' in page for link in ("/", "/models", "/jobs", "/schedules"))
        assert "/openapi.json" in page and "://" not in page.replace("http://www.w3.org", "")


def test_every_error_is_documented_as_a_problem(document: Json) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "default" in operation["responses"], (method, path)
            for status, response in operation["responses"].items():
                if status == "default" or (int(status) >= 400 and path != "/readyz"):
                    if path.startswith("/openai/"):  # These have OpenAI's own form.
                        schema = response["content"]["application/json"]["schema"]
                        assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (method, path, status)
                        continue
                    assert list(response["content"]) == ["application/problem+json"], (method, path, status)


def test_every_reference_in_the_document_leads_somewhere(document: Json) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                yield from references(child)

    found = set(references(document))
    assert "#/components/schemas/Problem" in found
    assert {ref.removeprefix("#/components/schemas/") for ref in found} <= set(document["components"]["schemas"])
    operation_ids = [o["operationId"] for operations in document["paths"].values() for o in operations.values()]
    assert len(operation_ids) == len(set(operation_ids))


def json_bodies(document: Json) -> Iterator[tuple[str, Json]]:
    """Every JSON body of the document: what it is of, with its schema and example."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            messages = {"request": operation.get("requestBody", {}), **operation["responses"]}
            for of, message in messages.items():
                for media_type, content in message.get("content", {}).items():
                    if media_type.endswith("json"):
                        yield f"{method} {path} {of}", content


def test_every_json_body_has_an_example_that_is_one(document: Json) -> None:
    seen = []
    for of, content in json_bodies(document):
        examples = [content["example"]] if "example" in content else content["schema"]["examples"]
        whole = {**content["schema"], "components": document["components"]}
        for example in examples:
            Draft202012Validator(whole, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(example)
        seen.append(of)
    assert {"post /v1/tuning-jobs request", "get /v1/schedules 200", "get /v1/audit 403"} <= set(seen)


def test_the_examples_of_requests_are_understood(client: httpx.Client, document: Json) -> None:
    """They may name what does not exist, but nothing in them is of the wrong form."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body is not None:
                url = path.replace("{model_id}", "mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W").replace("{name}", "production")
                answer = client.request(method, url, json=body["example"], timeout=200)  # it loads a model
                refusal = {} if answer.is_success else answer.json()
                detail = refusal.get("error", {}).get("message", refusal.get("detail", ""))
                assert answer.is_success or "mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W" in detail, (method, path, detail)


def test_every_operation_is_described(document: Json) -> None:
    tags = {tag["name"] for tag in document["tags"] if tag["description"]}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["operationId"] and operation["summary"] and operation["description"], (method, path)
            assert set(operation["tags"]) <= tags, (method, path)


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_documentation_loads_nothing_from_elsewhere(client: httpx.Client, path: str) -> None:
    page = client.get(path)
    assert "http" not in page.headers["content-security-policy"]
    loaded = re.findall(
        r'<(?!a )[^>]*(?:src|href)="([^"]+)"', page.text
    )  # A link leads to a page, which is not loaded.
    assert any(url.endswith(".js") for url in loaded)
    for url in loaded:
        assert url.startswith("/"), url
        assert client.get(url).status_code == 200, url


def test_the_documentation_is_served(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    assert "openapi.json" in page.text
