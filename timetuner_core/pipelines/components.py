"""The components of a saved pipeline: each is built without memory for its weights, and compared with its files."""

import importlib
import inspect
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timetuner_core.models.folder_files import (
    BUFFER_DTYPES,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    ModelFormatError,
    Shape,
    read_json,
    read_weight_shapes,
)
from timetuner_core.pipelines.files import CONFIG, ENCODER_WEIGHTS, NETWORK_WEIGHTS, PipelineIndex, encoder_of

LIBRARIES = ("diffusers", "transformers")


def pipeline_class(index: PipelineIndex) -> Any:
    """The class of a pipeline in diffusers.

    Raises:
        ModelFormatError: there is none of that name, it loads other pipelines, or the index lacks components.
    """
    import diffusers

    found = getattr(diffusers, index.pipeline, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)) or found.__module__.startswith(
        "diffusers.utils."
    ):
        message = f"_class_name is {index.pipeline[:200]!r}; accepted: a pipeline of diffusers {diffusers.__version__}"
        raise ModelFormatError(MODEL_INDEX, message)
    if found._load_connected_pipes:
        message = f"{index.pipeline} loads other pipelines; accepted: those that it consists of, each for itself"
        raise ModelFormatError(MODEL_INDEX, message)
    arguments = inspect.signature(found.__init__).parameters
    needed = [name for name, argument in arguments.items() if argument.default is inspect.Parameter.empty]
    for name in needed[1:]:
        is_optional = name in found._optional_components
        if name not in index.components and not is_optional and arguments[name].kind.name != "VAR_KEYWORD":
            message = f"component {name!r} is missing; accepted: {index.pipeline} with all its components"
            raise ModelFormatError(MODEL_INDEX, message)
    for name in index.components:
        if name not in arguments:
            message = f"{index.pipeline} has no component {name!r}; accepted: {', '.join(list(arguments)[1:])}"
            raise ModelFormatError(MODEL_INDEX, message)
    return found


def check_classes(index: PipelineIndex) -> Any:
    """The pipeline's class, once each component's class is known to be of diffusers or transformers.

    Raises:
        ModelFormatError.
    """
    for name, entry in index.components.items():
        _class_of(name, *entry)
    return pipeline_class(index)


def check_components(folder: Path, index: PipelineIndex) -> dict[str, Any]:
    """Build each component, those with weights on the meta device, and compare them with the files.

    Raises:
        ModelFormatError: names the component's file, and what is accepted.
    """
    built = {name: _build(folder, name, *entry) for name, entry in index.components.items()}
    for name, tokenizer in built.items():
        encoder = built.get(encoder_of(name)) or built.get("bert")
        if "tokenizer" in name and isinstance(encoder, torch.nn.Module):
            _check_vocabulary(name, tokenizer, encoder)
    return built


def _build(folder: Path, name: str, library: str, class_name: str) -> Any:
    import diffusers
    import transformers

    cls = _class_of(name, library, class_name)
    if issubclass(cls, diffusers.ModelMixin):
        return _check_network(folder, name, cls)
    if issubclass(cls, transformers.PreTrainedModel):
        return _check_transformers_model(folder, name, cls)
    if issubclass(cls, diffusers.SchedulerMixin):
        config = read_json(folder, f"{name}/{SCHEDULER_CONFIG.rpartition('/')[2]}")
        return _made(f"{name}/scheduler_config.json", class_name, lambda: cls.from_config(config))
    if issubclass(cls, _preparing()):
        return _made(name, class_name, lambda: cls.from_pretrained(folder / name, local_files_only=True))
    accepted = "networks, text encoders, tokenizers, schedulers and processors"
    raise ModelFormatError(MODEL_INDEX, f"{name!r} is {library}.{class_name}; accepted: {accepted}")


def _preparing() -> tuple[type, ...]:
    """The classes of what prepares inputs."""
    from transformers import PreTrainedTokenizerBase, ProcessorMixin
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.image_processing_base import ImageProcessingMixin

    return PreTrainedTokenizerBase, ProcessorMixin, FeatureExtractionMixin, ImageProcessingMixin


def _class_of(name: str, library: str, class_name: str) -> Any:
    """A component's class. Raises: ModelFormatError, if it is in neither library."""
    from diffusers import pipelines

    found = None
    if library in LIBRARIES:
        found = getattr(importlib.import_module(library), class_name, None)
    elif (
        inspect.ismodule(own := getattr(pipelines, library, None)) and own.__name__ == f"{pipelines.__name__}.{library}"
    ):
        found = getattr(own, class_name, None)  # Safety checkers are in the modules of their pipelines.
    if not inspect.isclass(found) or not found.__module__.startswith(LIBRARIES):
        versions = ", ".join(f"{each} {importlib.import_module(each).__version__}" for each in LIBRARIES)
        message = f"{name!r} is {library[:100]}.{class_name[:100]}; accepted: classes of {versions}"
        raise ModelFormatError(MODEL_INDEX, message)
    return found


def _made(field: str, class_name: str, make: Any) -> Any:
    try:
        return make()
    except MemoryError:
        raise
    except Exception as error:  # Constructors may raise anything.
        words = " ".join(str(error).split())[:500] or type(error).__name__
        raise ModelFormatError(
            field, f"no {class_name} can be built from it ({words}); accepted: its own files"
        ) from None


def _check_network(folder: Path, name: str, cls: Any) -> Any:
    """A network of diffusers on the meta device. Raises: ModelFormatError."""
    config_name = f"{name}/{CONFIG}"
    config = read_json(folder, config_name)
    shapes_by_file = read_weight_shapes(folder, f"{name}/{NETWORK_WEIGHTS}", BUFFER_DTYPES)
    with torch.device("meta"):
        module = _made(config_name, cls.__name__, lambda: cls.from_config(config))
    found = _on_meta(shapes_by_file)
    module._fix_state_dict_keys_on_load(found)  # It gives old names of weights their new ones.
    expected: dict[str, Tensor] = module.state_dict()
    pairs = {name: (tuple(found[name].shape), tuple(expected[name].shape)) for name in found.keys() & expected.keys()}
    wrong = {name: (given, accepted) for name, (given, accepted) in pairs.items() if given != accepted}
    missing = expected.keys() - found.keys() - _tied(module, found)
    unexpected = _not_ignored(found.keys() - expected.keys(), cls)
    _refuse_differences(next(iter(shapes_by_file)), config_name, wrong, missing, unexpected)
    return module


def _tied(module: torch.nn.Module, found: Mapping[str, Tensor]) -> set[str]:
    """The names of parameters that are the same as one whose weights are there."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for same in names.values() if any(each in found for each in same) for name in same}


def _not_ignored(names: Collection[str], cls: Any) -> list[str]:
    """Those names for which a class has no place, and which it does not know either."""
    patterns = cls._keys_to_ignore_on_load_unexpected or []
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def _check_transformers_model(folder: Path, name: str, cls: Any) -> Any:
    """A model of transformers on the meta device, loaded as the library loads it, from tensors without values.

    Raises:
        ModelFormatError.
    """
    config_name = f"{name}/{CONFIG}"
    read_json(folder, config_name)
    shapes_by_file = read_weight_shapes(folder, f"{name}/{ENCODER_WEIGHTS}", BUFFER_DTYPES)

    def load() -> Any:
        config = cls.config_class.from_pretrained(folder / name, local_files_only=True)
        return cls.from_pretrained(
            None,
            config=config,
            state_dict=_on_meta(shapes_by_file),
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )

    module, info = _made(config_name, cls.__name__, load)
    wrong = {name: (tuple(given), tuple(wanted)) for name, given, wanted in info["mismatched_keys"]}
    missing = set(info["missing_keys"]) - wrong.keys()
    unexpected = sorted(info["unexpected_keys"])
    _refuse_differences(next(iter(shapes_by_file)), config_name, wrong, missing, unexpected)
    return module


def _on_meta(shapes_by_file: Mapping[str, Mapping[str, Shape]]) -> dict[str, Tensor]:
    shapes = {name: shape for tensors in shapes_by_file.values() for name, shape in tensors.items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _refuse_differences(
    file: str,
    config_name: str,
    wrong: Mapping[str, tuple[Shape, Shape]],
    missing: set[str],
    unexpected: list[str],
) -> None:
    """Raises: ModelFormatError, naming the first weight that is at odds with the configuration."""
    if wrong:
        name = min(wrong)
        given, accepted = wrong[name]
        raise ModelFormatError(file, f"tensor {name!r} has shape {given}; accepted, by {config_name}: {accepted}")
    if missing:
        message = f"tensor {min(missing)!r} is missing; accepted: all weights of the model of {config_name}"
        raise ModelFormatError(file, message)
    if unexpected:
        message = f"tensor {min(unexpected)!r} has no place in the model of {config_name}; accepted: its weights"
        raise ModelFormatError(file, message)


def _check_vocabulary(name: str, tokenizer: Any, encoder: Any) -> None:
    """Refuse a tokenizer with numbers beyond its encoder's embeddings. Raises: ModelFormatError."""
    rows = encoder.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        message = f"its vocabulary goes up to {largest}, but {encoder_of(name)} has {rows} embeddings"
        raise ModelFormatError(name, f"{message}; accepted: up to {rows - 1}")
