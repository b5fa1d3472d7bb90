"""Parts of the OpenAPI document that FastAPI does not derive from the code."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

Json = dict[str, Any]

ABOUT: Json = {
    "title": "TimeTuner",
    "description": "Tuned timesteps for frozen diffusion models: tune, keep, resolve and sample with them.",
    "contact": {"name": "The TimeTuner service developers"},
    "license_info": {"name": "MIT", "identifier": "MIT"},
    "servers": [{"url": "/", "description": "This one."}],
    "openapi_tags": [
        {"name": "models", "description": "The diffusion models to tune and to sample from."},
        {"name": "tuning jobs", "description": "Making schedules."},
        {"name": "schedules", "description": "What tuning made: time grids with a ratio per step, and their names."},
        {"name": "samples", "description": "Images, by the best schedule or a chosen one."},
        {"name": "openai", "description": "OpenAI's images API, for clients that know no other."},
        {"name": "usage", "description": "What jobs used of networks and devices."},
        {"name": "audit", "description": "Who changed what."},
        {"name": "health", "description": "For those who run the service."},
    ],
}
# The title of each operation, for people. FastAPI would repeat the names of functions.
TITLES = {
    "register_model": "Register a model",
    "list_models": "List models",
    "get_model": "Get a model",
    "rename_model": "Rename a model",
    "delete_model": "Delete a model",
    "submit_tuning_job": "Tune a schedule",
    "list_tuning_jobs": "List tuning jobs",
    "get_tuning_job": "Get a tuning job",
    "cancel_tuning_job": "Cancel a tuning job",
    "list_tuning_job_events": "List or follow a tuning job's events",
    "submit_tuning_group": "Tune several schedules, or price them",
    "get_tuning_group": "Get the tuning jobs of a group",
    "list_schedules": "List schedules",
    "import_schedule": "Import a schedule",
    "resolve_schedule": "Find the schedule that sampling would use",
    "get_schedule": "Get a schedule",
    "export_schedule": "Export a schedule for another program",
    "delete_schedule": "Delete a schedule",
    "list_aliases": "List the aliases of a model's schedules",
    "set_alias": "Name a schedule",
    "delete_alias": "Delete an alias",
    "sample": "Sample images",
    "list_sample_jobs": "List sampling jobs",
    "get_sample_job": "Get a sampling job",
    "get_sample_content": "Get the images of a sampling job",
    "follow_sample_job": "Follow a sampling job",
    "cancel_sample_job": "Cancel a sampling job",
    "list_usage": "List what jobs used",
    "list_audit": "List the audit log",
    "openai_generate_images": "Generate images, as OpenAI's API does",
    "openai_list_models": "List models, as OpenAI's API does",
    "openai_get_model": "Get a model, as OpenAI's API does",
    "health": "Say whether the API answers",
    "readiness": "Say whether requests can be served",
    "metrics": "Get the API's metrics",
}
REFERENCE = "#/components/schemas/"
EXAMPLES: Json = {"integer": 1, "number": 0.0, "boolean": False, "null": None, "object": {}}


def complete(document: Json, *schemas: type[BaseModel]) -> None:
    """Add `schemas`, which only errors and hand-parsed bodies refer to, titles, and an example of each JSON body."""
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["summary"] = TITLES[operation["operationId"]]
    known = document.setdefault("components", {}).setdefault("schemas", {})
    for schema in schemas:
        own = schema.model_json_schema(ref_template=f"{REFERENCE}{{model}}")
        known.update(own.pop("$defs", {}))
        known[schema.__name__] = own
    for media_type, content in bodies(document):
        if media_type == "application/json" and not content.keys() & {"example", "examples"}:
            content["example"] = example_of(content["schema"], known)


def bodies(document: Json) -> Iterator[tuple[str, Json]]:
    """The media types of all requests and answers, with what is said of each."""
    for operations in document["paths"].values():
        for operation in operations.values():
            for message in (operation.get("requestBody", {}), *operation["responses"].values()):
                yield from message.get("content", {}).items()


def example_of(schema: Json, known: Json) -> Any:
    """The example that a schema gives, or its default, or one made of its parts' examples."""
    match schema:
        case {"$ref": str(name)}:
            example = example_of(known[name.removeprefix(REFERENCE)], known)
        case {"examples": [example, *_]} | {"default": example} | {"const": example} | {"enum": [example, *_]}:
            pass
        case {"anyOf": [choice, *_]}:
            example = example_of(choice, known)
        case {"properties": parts}:
            example = {name: example_of(part, known) for name, part in parts.items()}
        case {"type": "array", "items": item}:
            example = [example_of(item, known)]
        case _:
            example = EXAMPLES[schema["type"]]  # There is none for strings, so each must have an example of its own.
    return example
