"""Pydantic's faults of a request in words for its sender: the field's name as it was sent, and what is accepted."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Tag, ValidationError

MAX_SHOWN_FIELDS = 30
MIN_SIMILARITY = 0.7  # Names are proposed whose `difflib` ratio to the given one is as large.
UNKNOWN_FIELD = ("extra_forbidden", "unexpected_keyword_argument")
TAG, TAG_UNKNOWN = "objective", "union_tag_invalid"  # The only tagged unions of requests are tuners.
NOT_AN_OBJECT = ("model_type", "model_attributes_type", "dataclass_type", "dict_type")

Location = tuple[str | int, ...]


class FieldsError(RequestValidationError):
    """Faults that our own code found by validating a part of a request.

    Attributes:
        models: the type that the part was validated by, by the part's name.
    """

    def __init__(self, error: ValidationError, where: str, model: type[BaseModel], body: Any = None) -> None:
        """`where` is `body` or `query`."""
        super().__init__(
            [{**each, "loc": (where, *each["loc"])} for each in error.errors(include_url=False)], body=body
        )
        self.models = {where: model}


class Fault(NamedTuple):
    """One fault: where it is, what is accepted there, and what was given."""

    loc: Location
    message: str
    given: Any


def describe(errors: Sequence[Mapping[str, Any]], body: Any, models: Mapping[str, Any]) -> list[Fault]:
    """The faults of pydantic's errors, each place once.

    Args:
        body: the body that was validated, if the faults are of a body.
        models: the types that `body` and `query` were validated by. Their fields are proposed in place of unknown ones.
    """
    found: dict[Location, Fault] = {}
    of_alternatives: set[Location] = set()
    for error in errors:
        loc = _sent(tuple(error["loc"]), body)
        fault = _fault(error, loc, models.get(str(loc[0])) if loc else None)
        if len(loc) < len(error["loc"]):
            of_alternatives.add(fault.loc)
        before = found.get(fault.loc)
        if before is not None and before.message != fault.message:
            other = fault.message.removeprefix("Input should be ")
            fault = fault._replace(message=f"{before.message}; or {other[:1].lower()}{other[1:]}")
        found[fault.loc] = fault
    return [fault for loc, fault in found.items() if not _is_beside_a_closer_one(loc, of_alternatives)]


def close_match(name: str, names: Collection[str]) -> str | None:
    """The name that was probably meant."""
    return next(iter(get_close_matches(name, list(names), n=1, cutoff=MIN_SIMILARITY)), None)


def _is_beside_a_closer_one(loc: Location, of_alternatives: set[Location]) -> bool:
    """Whether the value is as another alternative has it but for a fault within."""
    return loc in of_alternatives and any(
        len(other) > len(loc) and other[: len(loc)] == loc for other in of_alternatives
    )


def _sent(loc: Location, body: Any) -> Location:
    """A location without the names of alternatives and functions, which pydantic puts between the fields."""
    if not loc or loc[0] != "body" or not isinstance(body, dict | list):
        return loc
    kept: list[str | int] = [loc[0]]
    value: Any = body
    for k, part in enumerate(loc[1:], 1):
        is_item = isinstance(part, int) and isinstance(value, list) and part < len(value)
        if is_item or (isinstance(value, dict) and part in value):
            value = value[part]
        elif k < len(loc) - 1 or not isinstance(value, dict) or not str(part).isidentifier():
            continue  # A missing field is the last of its location; any other name is no field.
        kept.append(part)
    return tuple(kept)


def _fault(error: Mapping[str, Any], loc: Location, model: Any) -> Fault:
    kind, message, context = error["type"], error["msg"], error.get("ctx") or {}
    given: Any = error.get("input")
    if kind in UNKNOWN_FIELD:
        return Fault(loc, _unknown(str(loc[-1]), _fields_at(model, tuple(error["loc"])[1:-1])), given)
    if kind in NOT_AN_OBJECT or (kind == TAG_UNKNOWN and not isinstance(given, dict)):
        return Fault(loc, "Input should be an object", given)
    if kind == TAG_UNKNOWN:
        return Fault((*loc, TAG), f"Input should be one of {context['expected_tags']}", given.get(TAG))
    if kind == "json_invalid":
        reason = f"{context.get('error', message)}, at character {loc[-1]}"
        return Fault(loc[:1], f"this is no JSON ({reason})", given)
    if kind == "decimal_type":
        message = "Input should be a number"
    return Fault(loc, message.removeprefix("Value error, "), given)


def _unknown(name: str, names: Collection[str]) -> str:
    meant = close_match(name, names)
    if meant is not None:
        return f"there is no field {name[:100]!r}; did you mean {meant!r}?"
    if not names:
        return f"there is no field {name[:100]!r}"
    accepted = ", ".join(sorted(names)[:MAX_SHOWN_FIELDS])
    return f"there is no field {name[:100]!r}; accepted: {accepted}"


def _fields_at(model: Any, loc: Location) -> list[str]:
    """The names of the fields that a type has at a location of pydantic's."""
    for part in loc:
        model = next((inner for each in _alternatives(model) if (inner := _inside(each, part)) is not None), None)
    return [name for each in _alternatives(model) for name in _hints(each)]


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, without what is only annotated; a tagged member stays as it is."""
    if get_origin(annotation) is Annotated and not any(isinstance(each, Tag) for each in annotation.__metadata__):
        yield from _alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _alternatives(member)
    else:
        yield annotation


def _inside(annotation: Any, part: str | int) -> Any:
    """The type that a part of a location leads to: of a tagged member, of a field, or of an item."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0] if Tag(str(part)) in annotation.__metadata__ else None
    if get_origin(annotation) is list and isinstance(part, int):
        return get_args(annotation)[0]
    return _hints(annotation).get(str(part))


def _hints(annotation: Any) -> dict[str, Any]:
    """The fields of a model or a dataclass, and their types."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {field.alias or name: field.annotation for name, field in annotation.model_fields.items()}
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return dict.fromkeys(field.name for field in dataclasses.fields(annotation))
    return {}


def printable(value: Any) -> Any:
    """The offending input as JSON, or a description of what JSON cannot hold (bytes, NaN)."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (ValueError, TypeError):
        return str(value)[:200]
