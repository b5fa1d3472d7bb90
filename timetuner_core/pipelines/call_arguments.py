"""The arguments of a pipeline's call that a request may give, by its signature and annotations."""

import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

from timetuner_core.pipelines.checks import SET_BY_THE_TUNER

ArgumentType: TypeAlias = Literal[
    "text", "integer", "number", "boolean", "image", "images", "integers", "numbers", "texts"
]

# The service sets these itself as the tuner does, or they are no data. Requests do give a prompt.
NOT_GIVEN = (SET_BY_THE_TUNER - {"prompt"}) | {
    "decode_chunk_size",
    "num_waveforms_per_prompt",
    "output_latent",
    "output_uncertainty",
    "self",
}
NOT_GIVEN_ENDINGS = ("_embeds", "_embeds_2", "_embeddings", "_embeds_mask", "_kwargs", "_latents", "attention_mask")
NOT_GIVEN_BEGINNINGS = ("ip_adapter_", "negative_ip_adapter_")  # They need an adapter, which no pipeline is saved with.

SCALARS: dict[type, ArgumentType] = {bool: "boolean", int: "integer", float: "number", str: "text"}
LISTS: dict[str, ArgumentType] = {
    "integer": "integers",
    "number": "numbers",
    "text": "texts",
    "image": "images",
}


def call_arguments(pipeline_class: type) -> dict[str, dict[str, Any]]:
    """Type, default, and whether it is required, of each argument, as JSON."""
    call: Any = pipeline_class.__call__
    try:
        hints = typing.get_type_hints(call)
    except Exception:  # An annotation may name what only type checkers import.
        hints = {}
    found: dict[str, dict[str, Any]] = {}
    for name, parameter in inspect.signature(call).parameters.items():
        kind = _type_of(hints.get(name, parameter.annotation), parameter.default)
        is_variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if kind is None or is_variadic or not _may_be_given(name):
            continue
        required = parameter.default is parameter.empty
        default = None if required else _plain(parameter.default)
        found[name] = {"type": kind, "default": default, "required": required}
    return found


def needed_arguments(pipeline_class: type) -> list[str]:
    """The arguments without which there is no call."""
    call: Any = pipeline_class.__call__
    return [
        name
        for name, parameter in list(inspect.signature(call).parameters.items())[1:]
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]


def _may_be_given(name: str) -> bool:
    return not (name in NOT_GIVEN or name.endswith(NOT_GIVEN_ENDINGS) or name.startswith(NOT_GIVEN_BEGINNINGS))


def _type_of(annotation: Any, default: Any) -> ArgumentType | None:
    """The first type of an annotation that a request can carry; without an annotation, that of the default."""
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return SCALARS.get(type(default))
    leaves = list(_leaves(annotation))
    kinds = [kind for leaf in leaves if (kind := _simple(leaf)) is not None]
    for kind in ("image", "text", "number", "integer", "boolean"):
        if kind in kinds:
            return typing.cast(ArgumentType, kind)
    for leaf in leaves:
        if typing.get_origin(leaf) in (list, tuple):
            items = {_simple(each) for part in typing.get_args(leaf) for each in _leaves(part)} - {None}
            for kind in ("image", "text", "number", "integer"):
                if kind in items:
                    return LISTS[kind]
    return None


def _leaves(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the annotation itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _leaves(member)
    elif annotation is not type(None):
        yield annotation


def _simple(annotation: Any) -> str | None:
    if not isinstance(annotation, type):
        return None
    if annotation.__module__.startswith("PIL."):
        return "image"
    return SCALARS.get(annotation)


def _plain(value: Any) -> Any:
    """A default as JSON; None for one that is none."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool | int | float | str) else None
