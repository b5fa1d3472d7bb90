"""The old client against today's OpenAPI document: nothing that the client knows is gone or of another type."""

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
from pydantic import BaseModel, create_model

from service.app import create_app
from tests.compatibility.client import calls, requests, results
from tests.compatibility.client.calls import Call
from tests.compatibility.client.errors import Problem
from tests.stack import Json
from timetuner_core.samplers import sampler_names

SETTING: requests.Setting = {"model": "m", "num_steps": 1}
CALLS: list[Call[Any]] = [
    calls.register_model("digits8", None, "n"),
    calls.list_models(1),
    calls.get_model("i"),
    calls.delete_model("i"),
    calls.submit_tuning_job({**SETTING}),
    calls.list_tuning_jobs("queued", 1),
    calls.get_tuning_job("i"),
    calls.cancel_tuning_job("i"),
    calls.list_tuning_job_events("i", 0),
    calls.list_schedules({}, 1),
    calls.import_schedule({**SETTING, "timesteps": [1, 0], "t_ratios": [1]}),
    calls.resolve_schedule(SETTING),
    calls.get_schedule("i"),
    calls.delete_schedule("i"),
    calls.list_aliases("i"),
    calls.set_alias("i", "i", "i"),
    calls.delete_alias("i", "i"),
    calls.sample({**SETTING}),
    calls.submit_samples({**SETTING}),
    calls.get_sample_job("i"),
    calls.cancel_sample_job("i"),
    calls.get_sample_content("i"),
    calls.follow_sample_job("i"),
    calls.list_audit(1),
    calls.health(),
    calls.readiness(),
    calls.metrics(),
]
RESPONSES: dict[str, type[BaseModel]] = {
    "ModelOut": results.Model,
    "ModelPage": results.Page[results.Model],
    "TuningJobOut": results.TuningJobFields,
    "TuningJobDetail": results.TuningJobFields,
    "TuningJobPage": results.Page[results.TuningJobFields],
    "EventPage": results.Page[results.Event],
    "ScheduleOut": results.Schedule,
    "SchedulePage": results.Page[results.Schedule],
    "Resolution": results.Resolution,
    "AliasOut": results.Alias,
    "AliasList": results.Page[results.Alias],
    "SampleJobOut": results.SampleJobFields,
    "AuditPage": results.Page[results.AuditEntry],
    "Readiness": results.Readiness,
    "Health": results.Health,
    "Problem": Problem,
}
# The client has one type for responses of which some lack a field.
NEVER_SENT = {
    "TuningJobOut": [".timesteps is gone", ".steps is gone"],
    "TuningJobPage": [".items[].timesteps is gone", ".items[].steps is gone"],
    "EventPage": [".next_cursor is gone"],
    "AliasList": [".next_cursor is gone"],
}
REQUESTS: dict[str, Any] = {
    "TuningJobRequest": requests.TuningJobRequest,
    "SampleRequest-Input": requests.SampleRequest,
    "ScheduleImport": requests.ScheduleImport,
}
QUERIES: dict[str, Any] = {"list_schedules": requests.ScheduleFilters, "resolve_schedule": requests.Setting}
OF_PAGES = {"limit", "cursor"}
ENCODED = ("condition", "uncond_condition")  # arrays, which the client sends as text


@cache
def document() -> Json:
    return create_app().openapi()


def operations() -> dict[str, tuple[str, str, Json]]:
    """Method, path and description by operation id."""
    return {
        operation["operationId"]: (method.upper(), path, operation)
        for path, methods in document()["paths"].items()
        for method, operation in methods.items()
    }


def test_every_operation_is_there() -> None:
    assert {call.operation for call in CALLS} <= set(operations())


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.operation)
def test_a_call_is_what_the_document_says(call: Call[Any]) -> None:
    method, path, operation = operations()[call.operation]
    assert (call.method, call.path) == (method, re.sub(r"\{\w+\}", "i", path))
    parameters = {parameter["name"] for parameter in operation.get("parameters", [])}
    assert set(call.params) <= parameters
    assert set(call.headers) & {"Idempotency-Key"} <= parameters


@pytest.mark.parametrize(("name", "kind"), RESPONSES.items())
def test_every_field_that_is_read_is_in_the_response(name: str, kind: type[BaseModel]) -> None:
    theirs = values({"$ref": f"#/components/schemas/{name}"}, document())
    assert misfits(values(own := kind.model_json_schema(), own), theirs, gains=True) == NEVER_SENT.get(name, [])


@pytest.mark.parametrize(("name", "kind"), REQUESTS.items())
def test_every_field_of_a_request_can_be_given(name: str, kind: Any) -> None:
    theirs = values({"$ref": f"#/components/schemas/{name}"}, document())
    own = json_schema(kind)
    assert misfits(theirs, values(own, own)) == []


@pytest.mark.parametrize(("operation", "kind"), QUERIES.items())
def test_every_parameter_of_a_query_can_be_given(operation: str, kind: Any) -> None:
    parameters = operations()[operation][2]["parameters"]
    of_query = {p["name"]: p["schema"] for p in parameters if p["in"] == "query" and p["name"] not in OF_PAGES}
    required = [p["name"] for p in parameters if p.get("required")]
    theirs = values({"type": "object", "properties": of_query, "required": required}, document())
    own = json_schema(kind)
    assert misfits(theirs, values(own, own)) == []


def test_every_field_of_a_model_registration_can_be_given() -> None:
    archive = operations()["register_model"][2]["requestBody"]["content"]["multipart/form-data"]["schema"]
    builtin = document()["components"]["schemas"]["BuiltinModelRequest"]
    fields = set(archive["properties"]) | set(builtin["properties"])
    assert fields >= set(inspect.signature(calls.register_model).parameters)
    call = calls.register_model(None, Path("a.zip"), "n")
    assert (call.archive, call.json) == (Path("a.zip"), {"name": "n"})


def json_schema(kind: Any) -> Json:
    """The JSON schema of a request's TypedDict."""
    hints = get_type_hints(kind) | {name: str | None for name in ENCODED if name in kind.__annotations__}
    hints["sampler"] = Literal[tuple(sampler_names())]  # the service's depend on what is installed there
    fields = {name: (hint, ... if name in kind.__required_keys__ else None) for name, hint in hints.items()}
    return create_model(kind.__name__, **fields).model_json_schema()


def values(schema: Json, root: Json) -> list[Json]:
    """All that a JSON schema allows, as alternatives without references, bounds and words."""
    if "$ref" in schema:
        return values(_follow(schema["$ref"], root), root)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            found = [value for each in schema[union] for value in values(each, root)]
            is_exact = {"type": "number"} in found  # a number that may also come as text, for all its digits
            return [value for value in found if not (is_exact and value == {"type": "string"})]
    if "enum" in schema or "const" in schema:
        return [{"const": value} for value in schema.get("enum", [schema.get("const")])]
    value: Json = {"type": schema.get("type", "any")}
    if "properties" in schema:
        fields = {name: values(each, root) for name, each in schema["properties"].items()}
        value = {"type": "fields", "properties": fields, "required": set(schema.get("required", []))}
    elif value["type"] == "array":
        value["items"] = values(schema["items"], root)
    elif value["type"] == "object":
        inner = schema.get("additionalProperties", True)
        value = {"type": "dict", "values": [{"type": "any"}] if inner is True else values(inner, root)}
    return [value]


def misfits(wide: list[Json], narrow: list[Json], where: str = "", *, gains: bool = False) -> list[str]:
    """The places where something that `narrow` allows does not fit `wide`.

    Args:
        gains: `narrow` is a response, and may have fields that `wide` does not know, but lack none that it does.
    """
    if len(wide) == len(narrow) == 1 and wide[0].get("type") == narrow[0].get("type"):
        if wide[0].get("type") == "fields":
            return _misfits_of_fields(wide[0], narrow[0], where, gains)
        if wide[0].get("type") == "array":
            return misfits(wide[0]["items"], narrow[0]["items"], f"{where}[]", gains=gains)
    return [f"{where}: {value}" for value in narrow if not any(_fits(each, value, where, gains) for each in wide)]


def _misfits_of_fields(wide: Json, narrow: Json, where: str, gains: bool) -> list[str]:
    known, needed = (narrow, wide) if gains else (wide, narrow)
    missing = [f"{where}.{name} is gone" for name in needed["properties"] if name not in known["properties"]]
    missing += [f"{where}.{name} may be missing" for name in wide["required"] - narrow["required"]]
    return missing + [
        misfit
        for name, value in narrow["properties"].items()
        if name in wide["properties"]
        for misfit in misfits(wide["properties"][name], value, f"{where}.{name}", gains=gains)
    ]


def _fits(wide: Json, narrow: Json, where: str, gains: bool) -> bool:
    if wide == narrow or wide.get("type") == "any":
        return True
    if "const" in narrow:
        return wide.get("type") == "string" and isinstance(narrow["const"], str)
    kinds = (wide.get("type"), narrow.get("type"))
    if kinds == ("array", "array"):
        return misfits(wide["items"], narrow["items"], where, gains=gains) == []
    if kinds == ("dict", "dict"):
        return misfits(wide["values"], narrow["values"], where, gains=gains) == []
    if kinds == ("fields", "fields"):
        return _misfits_of_fields(wide, narrow, where, gains) == []
    return kinds in (("number", "integer"), ("dict", "fields"))


def _follow(reference: str, root: Json) -> Json:
    node = root
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node
