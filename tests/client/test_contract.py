"""The client against the service's OpenAPI document: no operation, field or value is missing or of another type."""

import inspect
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_type_hints

import pytest
from pydantic import BaseModel, create_model

from service.app import create_app
from service.client import asynchronous, calls, requests, results, synchronous
from service.client.calls import Call
from service.client.problems import Problem
from service.client.requests import ModelSource
from tests.stack import Json
from timetuner_core.samplers import sampler_names

SETTING: requests.Setting = {"model": "m", "num_steps": 1}
CALLS: list[Call[Any]] = [
    calls.register_model({"builtin": "digits8", "name": "n", "private": True}),
    calls.submit_model({"archive": "a.zip", "name": "n", "private": True}),
    calls.list_models(1, {"search": "n", "sort": "name"}),
    calls.list_model_registrations("refused", 1),
    calls.get_model("i"),
    calls.rename_model("i", "n"),
    calls.delete_model("i", True),
    calls.submit_tuning_job({**SETTING}),
    calls.list_tuning_jobs("queued", 1),
    calls.get_tuning_job("i"),
    calls.cancel_tuning_job("i"),
    calls.list_tuning_job_events("i", 0),
    calls.submit_tuning_group([{**SETTING}], True),
    calls.get_tuning_group("i"),
    calls.list_schedules({}, 1),
    calls.import_schedule({**SETTING, "timesteps": [1, 0], "t_ratios": [1]}),
    calls.resolve_schedule(SETTING),
    calls.get_schedule("i"),
    calls.export_schedule("i", "json", True),
    calls.delete_schedule("i"),
    calls.list_aliases("i"),
    calls.set_alias("i", "i", "i"),
    calls.delete_alias("i", "i"),
    calls.sample({**SETTING}),
    calls.submit_samples({**SETTING}),
    calls.list_sample_jobs("queued", "m", "s", 1),
    calls.get_sample_job("i"),
    calls.cancel_sample_job("i"),
    calls.get_sample_content("i"),
    calls.follow_sample_job("i"),
    calls.list_usage({"since": "2026-11-01", "until": "2026-11-30", "model": "m", "key": "k"}, 1),
    calls.list_audit(1),
    calls.health(),
    calls.readiness(),
    calls.metrics(),
]
RESPONSES: dict[str, type[BaseModel]] = {
    "ModelOut": results.Model,
    "ModelPage": results.Page[results.Model],
    "ModelRegistrationOut": results.ModelRegistrationFields,
    "ModelRegistrationPage": results.Page[results.ModelRegistrationFields],
    "TuningJobOut": results.TuningJobFields,
    "TuningJobDetail": results.TuningJobFields,
    "TuningGroupOut": results.TuningGroup,
    "TuningJobPage": results.Page[results.TuningJobFields],
    "SampleJobPage": results.Page[results.SampleJobFields],
    "EventPage": results.Page[results.Event],
    "ScheduleOut": results.Schedule,
    "SchedulePage": results.Page[results.Schedule],
    "Resolution": results.Resolution,
    "AliasOut": results.Alias,
    "AliasList": results.Page[results.Alias],
    "SampleJobOut": results.SampleJobFields,
    "UsagePage": results.Page[results.Usage],
    "AuditPage": results.Page[results.AuditEntry],
    "Readiness": results.Readiness,
    "Health": results.Health,
    "Problem": Problem,
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
        if not path.startswith("/openai/")  # OpenAI's own client calls it.
    }


def test_there_is_a_call_for_every_operation() -> None:
    assert {call.operation for call in CALLS} == set(operations())


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.operation)
def test_a_call_is_what_the_document_says(call: Call[Any]) -> None:
    method, path, operation = operations()[call.operation]
    assert (call.method, call.path) == (method, re.sub(r"\{\w+\}", "i", path))
    parameters = {parameter["name"] for parameter in operation.get("parameters", [])}
    assert set(call.params) <= parameters
    takes_key = "Idempotency-Key" in parameters
    assert ("Idempotency-Key" in call.headers) == takes_key
    assert call.is_repeatable


@pytest.mark.parametrize("client", [synchronous, asynchronous])
def test_both_clients_offer_every_call(client: ModuleType) -> None:
    built = {
        name for name, function in vars(calls).items() if inspect.isfunction(function) and not name.startswith("_")
    }
    used = set(re.findall(r"\bcalls\.(\w+)\(", inspect.getsource(client)))
    assert used == {name for name in built if inspect.getmodule(getattr(calls, name)) is calls}


def test_both_clients_are_used_alike() -> None:
    def methods(module: ModuleType) -> dict[str, list[str]]:
        return {
            f"{name.removeprefix('Async')}.{method.replace('__a', '__')}": list(inspect.signature(function).parameters)
            for name, kind in vars(module).items()
            if inspect.isclass(kind) and kind.__module__ == module.__name__
            for method, function in vars(kind).items()
            if inspect.isfunction(function)
        }

    assert methods(synchronous) == methods(asynchronous)


@pytest.mark.parametrize(("name", "kind"), RESPONSES.items())
def test_every_field_of_a_response_is_read(name: str, kind: type[BaseModel]) -> None:
    theirs = values({"$ref": f"#/components/schemas/{name}"}, document())
    assert misfits(values(own := kind.model_json_schema(), own), theirs) == []


@pytest.mark.parametrize(("name", "kind"), REQUESTS.items())
def test_every_field_of_a_request_can_be_given_and_no_other(name: str, kind: Any) -> None:
    theirs = values({"$ref": f"#/components/schemas/{name}"}, document())
    own = json_schema(kind)
    assert misfits(values(own, own), theirs) == []
    assert misfits(theirs, values(own, own)) == []


@pytest.mark.parametrize(("operation", "kind"), QUERIES.items())
def test_every_parameter_of_a_query_can_be_given_and_no_other(operation: str, kind: Any) -> None:
    parameters = operations()[operation][2]["parameters"]
    of_query = {p["name"]: p["schema"] for p in parameters if p["in"] == "query" and p["name"] not in OF_PAGES}
    required = [p["name"] for p in parameters if p.get("required")]
    theirs = values({"type": "object", "properties": of_query, "required": required}, document())
    own = json_schema(kind)
    assert misfits(values(own, own), [{**theirs[0], "properties": _given(theirs[0]["properties"])}]) == []
    assert misfits(theirs, values(own, own)) == []


def test_every_field_of_a_model_registration_can_be_given() -> None:
    archive = operations()["register_model"][2]["requestBody"]["content"]["multipart/form-data"]["schema"]
    schemas = document()["components"]["schemas"]
    requests = [archive, *(schemas[f"{place}ModelRequest"] for place in ("Builtin", "Path", "Hub"))]
    assert {field for request in requests for field in request["properties"]} == ModelSource.__annotations__.keys()
    call = calls.register_model({"archive": Path("a.zip"), "name": "n"})
    assert (call.archive, call.json) == (Path("a.zip"), {"name": "n"})
    assert calls.register_model({"hub": "them/tiny", "private": False}).json == {"hub": "them/tiny"}
    with pytest.raises(TypeError, match="accepted: one of builtin, archive, path, hub"):
        calls.register_model({"hub": "them/tiny", "path": "tiny"})


def json_schema(kind: Any) -> Json:
    """The JSON schema of a request's TypedDict."""
    hints = get_type_hints(kind) | {name: str | None for name in ENCODED if name in kind.__annotations__}
    own = ("own",) if kind in (requests.SampleRequest, requests.Setting) else ()
    hints["sampler"] = Literal[(*own, *sampler_names())]  # the service's depend on what is installed there
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


def misfits(wide: list[Json], narrow: list[Json], where: str = "") -> list[str]:
    """The places where something that `narrow` allows does not fit `wide`."""
    if len(wide) == len(narrow) == 1 and wide[0].get("type") == narrow[0].get("type") == "fields":
        return _misfits_of_fields(wide[0], narrow[0], where)
    return [f"{where}: {value}" for value in narrow if not any(_fits(each, value, where) for each in wide)]


def _misfits_of_fields(wide: Json, narrow: Json, where: str) -> list[str]:
    missing = [f"{where}.{name} is not known" for name in narrow["properties"] if name not in wide["properties"]]
    missing += [f"{where}.{name} may be missing" for name in wide["required"] - narrow["required"]]
    return missing + [
        misfit
        for name, value in narrow["properties"].items()
        if name in wide["properties"]
        for misfit in misfits(wide["properties"][name], value, f"{where}.{name}")
    ]


def _fits(wide: Json, narrow: Json, where: str) -> bool:
    if wide == narrow or wide.get("type") == "any":
        return True
    if "const" in narrow:
        return wide.get("type") == "string" and isinstance(narrow["const"], str)
    kinds = (wide.get("type"), narrow.get("type"))
    if kinds == ("array", "array"):
        return misfits(wide["items"], narrow["items"], where) == []
    if kinds == ("dict", "dict"):
        return misfits(wide["values"], narrow["values"], where) == []
    if kinds == ("fields", "fields"):
        return _misfits_of_fields(wide, narrow, where) == []
    return kinds in (("number", "integer"), ("dict", "fields"))


def _given(fields: dict[str, list[Json]]) -> dict[str, list[Json]]:
    """The alternatives without null: a query leaves a parameter out instead."""
    return {name: [value for value in each if value != {"type": "null"}] for name, each in fields.items()}


def _follow(reference: str, root: Json) -> Json:
    node = root
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node
