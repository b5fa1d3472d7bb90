"""Reading a model folder's JSON and the headers of its safetensors files, without PyTorch. Nothing is unpickled."""

import hashlib
import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

UNET_CONFIG = "unet/config.json"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TRANSFORMER_CONFIG = "transformer/config.json"
TRANSFORMER_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
VAE_CONFIG = "vae/config.json"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
VQVAE_CONFIG = "vqvae/config.json"
VQVAE_WEIGHTS = "vqvae/diffusion_pytorch_model.safetensors"
MODEL_INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
METADATA = "timetuner.json"
DATA = "data.safetensors"
# These files make the model. The index only decides, with others, whether a folder is accepted.
MODEL_FILES = (
    UNET_CONFIG,
    UNET_WEIGHTS,
    SCHEDULER_CONFIG,
    METADATA,
    DATA,
    TRANSFORMER_CONFIG,
    TRANSFORMER_WEIGHTS,
    VAE_CONFIG,
    VAE_WEIGHTS,
    VQVAE_CONFIG,
    VQVAE_WEIGHTS,
)
WEIGHTS = (UNET_WEIGHTS, TRANSFORMER_WEIGHTS, VAE_WEIGHTS, VQVAE_WEIGHTS)
READ_FOLDERS = tuple(sorted({name.partition("/")[0] for name in MODEL_FILES if "/" in name}))

Shape = tuple[int, ...]

MAX_JSON_BYTES = 2**20
MAX_JSON_DEPTH = 20
MAX_HEADER_BYTES = 2**22  # A network of billions of parameters has a safetensors header of a tenth of this.
MAX_TENSORS = 20_000
MAX_SHARDS = 100
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LENGTH_BYTES = 8  # A safetensors file begins with its header's length.
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
BUFFER_DTYPES = (*WEIGHT_DTYPES, "I64", "I32", "BOOL")  # Text encoders are saved with the numbers of their positions.

# The safetensors library raises these for other files, and for dtypes that PyTorch does not have.
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError)


class ModelFormatError(ValueError):
    """A model folder that cannot be used: which file or key is at fault, and what is accepted."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


def model_files(names: Collection[str]) -> list[str]:
    """Those of a folder's files that loading its model reads, `MODEL_FILES` first: weights may be sharded or a variant.

    Raises:
        ModelFormatError: weights in several variants, none of which is the plain one.
    """
    weights = [file for name in WEIGHTS for file in weight_files(names, name)]
    plain = [name for name in MODEL_FILES if name in names and (name not in WEIGHTS or name in weights)]
    return [*plain, *sorted(set(weights) - set(plain))]


def weight_files(names: Collection[str], weights_name: str) -> list[str]:
    """The files with a component's weights, as diffusers names them: one, or an index and its shards; or none.

    The plain ones come first, then those of the only variant: `.fp16`, say.

    Raises:
        ModelFormatError: several variants, none of which is the plain one.
    """
    stem = re.escape(weights_name.removesuffix(".safetensors"))
    # Older versions of diffusers put a shard's variant after its number, and an index's before "index".
    weights = rf"{stem}(?:\.(\w+))?(?:-\d{{5}}-of-\d{{5}})?(?:\.(\w+))?\.safetensors"
    index = r"(?:(?:\.(\w+))?\.index(?:\.(\w+))?\.json)?"
    variants: dict[str, list[str]] = {}
    for name in sorted(names):
        if match := re.fullmatch(weights + index, name):
            variants.setdefault(next((group for group in match.groups() if group), ""), []).append(name)
    # Shards without an index are nobody's, and a single file beside an index is not what diffusers reads.
    complete = {variant: chosen for variant, files in variants.items() if (chosen := _one_or_sharded(files))}
    if "" not in complete and len(complete) > 1:
        given = ", ".join(sorted(complete))
        raise ModelFormatError(
            weights_name, f"the weights are there as {given}; accepted: one variant, or the plain one"
        )
    return next((complete[variant] for variant in sorted(complete)), [])


def _one_or_sharded(files: list[str]) -> list[str]:
    """The index and its shards if there is an index, else the single file."""
    index = [name for name in files if name.endswith(".json")]
    shards = [name for name in files if re.search(r"-\d{5}-of-\d{5}", name)]
    return [*index, *shards] if index else [name for name in files if name not in shards]


def files_of(path: Path) -> list[str]:
    """The names of a folder's files, two levels deep, as `MODEL_FILES` gives them."""
    return [file.relative_to(path).as_posix() for depth in ("*", "*/*") for file in path.glob(depth) if file.is_file()]


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's files, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in model_files(files_of(folder)):
        with (folder / name).open("rb") as file:
            digest.update(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object. Raises: ModelFormatError."""
    try:
        if (path / name).stat().st_size > MAX_JSON_BYTES:
            raise ModelFormatError(name, f"the file is too large; accepted: up to {MAX_JSON_BYTES} bytes")
        raw = (path / name).read_bytes()
    except FileNotFoundError:
        raise ModelFormatError(name, "the file is missing; a diffusers-format folder has it") from None
    return parse_json(name, raw)


def parse_json(name: str, raw: bytes) -> dict[str, Any]:
    """The JSON object in a file's content. Raises: ModelFormatError."""
    refuse_lfs_pointer(name, raw)
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_unambiguous)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(name, f"not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelFormatError(name, "accepted: a JSON object")
    if _is_deeper(content, MAX_JSON_DEPTH):
        raise ModelFormatError(name, f"nested too deeply; accepted: up to {MAX_JSON_DEPTH} levels")
    return content


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises: ValueError, if a key comes twice: readers differ in which value they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return content


def _is_deeper(content: Any, depth: int) -> bool:
    level = [content]
    for _ in range(depth):
        children = [list(node.values()) if isinstance(node, dict) else node for node in level]
        level = [child for nodes in children for child in nodes if isinstance(child, dict | list)]
    return bool(level)


def read_weight_shapes(
    path: Path, weights_name: str, dtypes: tuple[str, ...] = WEIGHT_DTYPES
) -> dict[str, dict[str, Shape]]:
    """The names and shapes of the weights in each of a component's safetensors files. Raises: ModelFormatError."""
    files = weight_files(files_of(path), weights_name)
    if not files:
        raise ModelFormatError(weights_name, "the file is missing; weights are accepted as safetensors only")
    if files[0].endswith(".json"):
        files = _shards(path, files[0], weights_name)
    shapes = {name: _read_shapes(path, name, dtypes) for name in files}
    seen: set[str] = set()
    for name, tensors in shapes.items():
        if twice := seen & tensors.keys():
            raise ModelFormatError(name, f"tensor {min(twice)!r} is in another shard too; accepted: once")
        seen |= tensors.keys()
    if len(seen) > MAX_TENSORS:
        raise ModelFormatError(weights_name, f"it has {len(seen)} tensors; accepted: up to {MAX_TENSORS}")
    return shapes


def _shards(path: Path, index_name: str, weights_name: str) -> list[str]:
    """The files that an index of sharded weights names, all of which are there. Raises: ModelFormatError."""
    weight_map = read_json(path, index_name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(index_name, "accepted: a weight_map of tensors to files")
    folder = index_name.rpartition("/")[0]
    known = set(weight_files(files_of(path), weights_name))
    names = sorted({f"{folder}/{file}" for file in weight_map.values()})
    if len(names) > MAX_SHARDS:
        raise ModelFormatError(index_name, f"it names {len(names)} shards; accepted: up to {MAX_SHARDS}")
    for name in names:
        if name not in known or name == index_name:
            raise ModelFormatError(
                index_name, f"its shard {name[:200]!r} is missing; accepted: a folder with all of them"
            )
    return names


def _read_shapes(path: Path, name: str, dtypes: tuple[str, ...]) -> dict[str, Shape]:
    slices = _slices(path, name)
    for key, tensor in slices.items():
        if tensor.get_dtype() not in dtypes:
            message = f"tensor {key!r} has dtype {tensor.get_dtype()}; accepted: {', '.join(dtypes)}"
            raise ModelFormatError(name, message)
    return {key: tuple(tensor.get_shape()) for key, tensor in slices.items()}


def _slices(path: Path, name: str) -> dict[str, Any]:
    check_header(path, name)
    try:
        with safe_open(path / name, framework="numpy") as tensors:
            return {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
    except UNREADABLE as error:
        raise not_whole(name, error) from None


def values_by_dtype(path: Path, name: str) -> dict[str, int]:
    """How many values of each dtype a safetensors file has, by its header. Raises: ModelFormatError."""
    counts: dict[str, int] = {}
    for tensor in _slices(path, name).values():
        counts[tensor.get_dtype()] = counts.get(tensor.get_dtype(), 0) + math.prod(tensor.get_shape())
    return counts


def check_files(path: Path) -> None:
    """Refuse a folder whose JSON or safetensors headers cannot be read. `load_folder` checks what they say.

    Raises:
        ModelFormatError: names the file.
    """
    for name in model_files(files_of(path)):
        if name.endswith(".json"):
            read_json(path, name)
        else:
            check_header(path, name)


def check_header(path: Path, name: str) -> None:
    """Refuse a header, and a number of tensors, that would be a burden just to read. Raises: ModelFormatError."""
    with (path / name).open("rb") as file:
        refuse_lfs_pointer(name, file.read(len(LFS_POINTER)))
        file.seek(0)
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            raise not_whole(name, f"a header of {length} bytes; accepted: up to {MAX_HEADER_BYTES}")
        count = file.read(length).count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise ModelFormatError(name, f"it has {count} tensors; accepted: up to {MAX_TENSORS}")


def refuse_lfs_pointer(name: str, content: bytes) -> None:
    """Raises: ModelFormatError, if a file's content is a pointer in its place."""
    if content.startswith(LFS_POINTER):
        message = "a Git LFS pointer, which stands for the file; accepted: the file, as `git lfs pull` fetches it"
        raise ModelFormatError(name, message)


def not_whole(name: str, error: Exception | str) -> ModelFormatError:
    """The error for a file that is not a whole safetensors file, and why."""
    return ModelFormatError(name, f"not a whole safetensors file ({error})")
