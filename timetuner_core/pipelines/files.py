"""The files of a saved pipeline, read without PyTorch: which there are, what they may be, and a hash of them."""

import hashlib
import json
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from timetuner_core.models.folder_files import (
    LFS_POINTER,
    MODEL_INDEX,
    ModelFormatError,
    check_header,
    files_of,
    read_json,
    refuse_lfs_pointer,
    values_by_dtype,
    weight_files,
)
from timetuner_core.pipelines.kinds import SHARED_NETWORKS

README = "README.md"
CONFIG = "config.json"
NETWORK_WEIGHTS = "diffusion_pytorch_model.safetensors"
ENCODER_WEIGHTS = "model.safetensors"
# The name of a file of weights has its variant besides these words.
WORDS_OF_WEIGHTS = ("", "diffusion_pytorch_model", "index", "json", "model", "safetensors")
# Besides weights, a component's files are JSON, lists of words, models of sentencepiece, and templates of chats.
READ_SUFFIXES = (".json", ".txt", ".model", ".jinja")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
CODE_SUFFIXES = (".py", ".pyc", ".so")
COMPONENT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
# These keys of a JSON file name code, or a format of weights, that is not in diffusers or transformers.
CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "quantization_config")
MAX_VOCABULARY_BYTES = 2**27
MAX_README_BYTES = 2**20

DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class PipelineIndex:
    """The content of `model_index.json`.

    Attributes:
        pipeline: the name of the pipeline's class.
        components: library and class of each component that is there, by its name.
        options: the pipeline's further arguments; an absent component is None.
    """

    pipeline: str
    components: Mapping[str, tuple[str, str]]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "PipelineIndex":
        """Raises: ModelFormatError."""
        pipeline = content.get("_class_name")
        if not isinstance(pipeline, str):
            message = f"_class_name is {str(pipeline)[:200]!r}; accepted: the name of a pipeline in diffusers, no code"
            raise ModelFormatError(MODEL_INDEX, message)
        components: dict[str, tuple[str, str]] = {}
        options: dict[str, Any] = {}
        for name, value in content.items():
            if name.startswith("_"):
                continue
            # An entry that is no list is an option of the pipeline; an absent component is [null, null].
            if not _is_component(value) or not any(value):
                options[name] = None if _is_component(value) else value
            elif not COMPONENT_NAME.fullmatch(name) or not all(isinstance(each, str) and each for each in value):
                message = f"{name[:100]!r} is {str(value)[:200]}; accepted: a name, with its library and class"
                raise ModelFormatError(MODEL_INDEX, message)
            else:
                components[name] = (value[0], value[1])
        return cls(pipeline, components, options)

    @property
    def has_prompts(self) -> bool:
        """Whether there is a text encoder with its tokenizer."""
        return any(encoder_of(name) in self.components for name in self.components if "tokenizer" in name)


def _is_component(value: Any) -> bool:
    """Whether an entry is a library and a class. Options of pipelines may be lists of numbers."""
    return isinstance(value, list) and len(value) == 2 and all(each is None or isinstance(each, str) for each in value)


def encoder_of(tokenizer: str) -> str:
    """The name of the component whose embeddings a tokenizer's numbers choose."""
    return tokenizer.replace("tokenizer", "text_encoder")


def read_index(folder: Path) -> PipelineIndex:
    """Raises: ModelFormatError."""
    return PipelineIndex.of(read_json(folder, MODEL_INDEX))


def is_pipeline(names: Collection[str], index: PipelineIndex) -> bool:
    """Whether a folder with such files is a whole pipeline with prompts, none of whose weights are pickles only."""
    whole = all(
        (own := _own_files(names, component)) and (component_weights(own, component) or not _pickles(own))
        for component in index.components
    )
    return index.has_prompts and whole


def _own_files(names: Collection[str], component: str) -> list[str]:
    return sorted(name for name in names if name.startswith(f"{component}/") and name.count("/") == 1)


def _pickles(names: Collection[str]) -> list[str]:
    return [name for name in names if PurePosixPath(name).suffix in PICKLE_SUFFIXES]


def pipeline_files(names: Collection[str], index: PipelineIndex) -> list[str]:
    """Those of a folder's files that are read as a pipeline, sorted.

    Raises:
        ModelFormatError: code, a component without files, or weights in several variants or as pickles only.
    """
    refuse_code(names)
    chosen = {name for name in (MODEL_INDEX, README) if name in names}
    for component in sorted(index.components):
        own = _own_files(names, component)
        if not own:
            message = f"it names {component!r}, but there is no folder {component}/; accepted: all components"
            raise ModelFormatError(MODEL_INDEX, message)
        weights = component_weights(own, component)
        if (pickles := _pickles(own)) and not weights:
            raise ModelFormatError(pickles[0], "it may be a pickle; accepted: weights as .safetensors only")
        is_index = re.compile(r".*\.index(\.\w+)?\.json")
        read = [name for name in own if name.endswith(READ_SUFFIXES) and not is_index.fullmatch(name)]
        chosen.update(read, weights)
    return sorted(chosen)


def component_weights(names: Collection[str], component: str) -> list[str]:
    """The files with a component's weights, none for one without. Raises: ModelFormatError."""
    return next(
        (files for name in (NETWORK_WEIGHTS, ENCODER_WEIGHTS) if (files := weight_files(names, f"{component}/{name}"))),
        [],
    )


@contextmanager
def only_read_files(folder: Path) -> Iterator[Path]:
    """A folder with links to the files that are read, so that libraries find no others. Raises: ModelFormatError."""
    with tempfile.TemporaryDirectory(prefix="timetuner-pipeline-") as made:
        for name in pipeline_files(files_of(folder), read_index(folder)):
            link = Path(made, name)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to((folder / name).resolve())
        yield Path(made)


def variant_of(names: Collection[str], index: PipelineIndex) -> str | None:
    """The variant of the weights, such as `fp16`; None for plain ones.

    Raises:
        ModelFormatError: components with different variants.
    """
    variants: dict[str, str] = {}
    for component in index.components:
        for name in component_weights(names, component):
            words = re.split(r"\.|-\d{5}-of-\d{5}", PurePosixPath(name).name)
            variants |= {word: name for word in words if word not in WORDS_OF_WEIGHTS}
    if len(variants) > 1:
        given = ", ".join(sorted(variants.values()))
        raise ModelFormatError(MODEL_INDEX, f"the weights are {given}; accepted: one variant for all components")
    return next(iter(variants), None)


def refuse_code(names: Collection[str]) -> None:
    """Raises: ModelFormatError, naming a file with code."""
    for name in sorted(names):
        if name.endswith(CODE_SUFFIXES):
            raise ModelFormatError(name, "it is code, which is never run; accepted: pipelines of diffusers without it")


def check_pipeline_files(folder: Path) -> PipelineIndex:
    """Refuse a folder whose JSON or safetensors headers cannot be read, and one with code.

    Raises:
        ModelFormatError: names the file.
    """
    index = read_index(folder)
    for name in pipeline_files(files_of(folder), index):
        if name.endswith(".safetensors"):
            check_header(folder, name)
        elif name.endswith((f"/{CONFIG}", "_config.json", ".index.json")) and "tokenizer" not in name:
            _refuse_code_keys(name, read_json(folder, name))
        else:
            _check_text(folder, name)
    _refuse_code_keys(MODEL_INDEX, read_json(folder, MODEL_INDEX))
    return index


def _check_text(folder: Path, name: str) -> None:
    size, most = (folder / name).stat().st_size, MAX_README_BYTES if name == README else MAX_VOCABULARY_BYTES
    if size > most:
        raise ModelFormatError(name, f"the file has {size} bytes; accepted: up to {most}")
    with (folder / name).open("rb") as file:
        refuse_lfs_pointer(name, file.read(len(LFS_POINTER)))
    if name.endswith("_config.json"):  # A tokenizer's list of added tokens is longer than other configurations.
        try:
            _refuse_code_keys(name, json.loads((folder / name).read_bytes()))
        except ModelFormatError:
            raise
        except (ValueError, RecursionError) as error:
            raise ModelFormatError(name, f"not valid JSON ({error})") from None


def _refuse_code_keys(name: str, content: Any) -> None:
    if isinstance(content, list):
        for each in content:
            _refuse_code_keys(name, each)
    elif isinstance(content, dict):
        for key, value in content.items():
            is_kernel = "attn_implementation" in key and isinstance(value, str) and "/" in value
            if is_kernel or (key in CODE_KEYS and value):
                message = f"{key} is {str(value)[:200]}; accepted: without it, as no code is loaded from elsewhere"
                raise ModelFormatError(name, message)
            _refuse_code_keys(name, value)


def pipeline_hash(folder: Path, dtype: str) -> str:
    """SHA-256 over the dtype, and over names and contents of the files that are read, as hexadecimal digits."""
    digest = hashlib.sha256(f"pipeline:{dtype}\n".encode())
    for name in pipeline_files(files_of(folder), read_index(folder)):
        with (folder / name).open("rb") as file:
            digest.update(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """A digest of the names, sizes and times of the files that are read: while it is the same, so is their content."""
    digest = hashlib.sha256()
    for name in pipeline_files(files_of(folder), read_index(folder)):
        found = (folder / name).stat()
        digest.update(f"{name}:{found.st_size}:{found.st_mtime_ns}:{found.st_ino}\n".encode())
    return digest.hexdigest()


def denoisers_of(index: PipelineIndex) -> list[str]:
    """The components that are called in each step, those that control others among them."""
    return [name for name in SHARED_NETWORKS if name in index.components]


def saved_dtype(folder: Path) -> str:
    """The dtype of most values in the denoiser's files: float32, bfloat16 or float16. Raises: ModelFormatError."""
    index = read_index(folder)
    names = files_of(folder)
    for denoiser in denoisers_of(index):
        counts: dict[str, int] = {}
        for name in component_weights(names, denoiser):
            if name.endswith(".safetensors"):
                for dtype, values in values_by_dtype(folder, name).items():
                    counts[dtype] = counts.get(dtype, 0) + values
        known = {dtype: values for dtype, values in counts.items() if dtype in DTYPES}
        if known:
            return DTYPES[max(known, key=known.__getitem__)]
    accepted = f"a pipeline with one of {', '.join(SHARED_NETWORKS)}, as safetensors"
    raise ModelFormatError(MODEL_INDEX, f"{index.pipeline} has no denoiser with weights; accepted: {accepted}")
