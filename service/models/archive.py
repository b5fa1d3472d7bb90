"""Unpacking of uploaded models. Only the files of a model are written, and all names are checked before.

Few formats and compressions are accepted: with bzip2 and LZMA, a few bytes can demand gigabytes of memory.
"""

import gzip
import io
import math
import shutil
import tarfile
import unicodedata
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple, TypeAlias, cast

from service.http.errors import InvalidError, TooLargeError
from timetuner_core.models.folder_files import (
    MAX_JSON_BYTES,
    MODEL_INDEX,
    READ_FOLDERS,
    TRANSFORMER_CONFIG,
    UNET_CONFIG,
    ModelFormatError,
    model_files,
    parse_json,
)
from timetuner_core.pipelines.files import PICKLE_SUFFIXES, PipelineIndex, is_pipeline, pipeline_files

MAX_FILES = 1000
MAX_NAME = 1000
MAX_ZIP_DIRECTORY_BYTES = 2**20
MAX_TAR_HEADER_BYTES = 2**18  # Each member of a tar has this limit.
MAX_PAX_HEADERS = 100
MAX_NAMED = 100  # Of the files that are left out, no more are named.
GZIP_MAGIC = b"\x1f\x8b"
ENCRYPTED = 0x1
LOC = ("body", "archive")

Kind: TypeAlias = Literal["auto", "network", "pipeline"]


class Unpacked(NamedTuple):
    """The files that were extracted.

    Attributes:
        is_pipeline: whether it is a whole pipeline.
        ignored_files: the names of the files that nothing reads and that were left out, the first `MAX_NAMED` of them.
    """

    is_pipeline: bool
    ignored_files: list[str]


def unpack(file: IO[bytes], destination: Path, max_bytes: int, kind: Kind = "auto") -> Unpacked:
    """Extract the files of a model from a zip or tar archive, whether at its root or in one folder.

    Args:
        kind: what it is read as; `auto` is a pipeline if all components are there, a text encoder among them.

    Raises:
        InvalidError: not an archive, unsafe names, links, pickles beside weights, or no model inside.
        TooLargeError: more than `max_bytes` unpacked, or more than `MAX_FILES` files.
    """
    try:
        if zipfile.is_zipfile(file):
            metered = _Metered(file, MAX_ZIP_DIRECTORY_BYTES)
            with zipfile.ZipFile(cast(IO[bytes], metered)) as archive:
                metered.allowance = math.inf
                return _extract(list(_zip_members(archive)), destination, max_bytes, kind)
        else:
            file.seek(0)
            compressed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            file.seek(0)
            content = cast(IO[bytes], gzip.GzipFile(fileobj=file, mode="rb")) if compressed else file
            metered = _Metered(content, MAX_TAR_HEADER_BYTES)
            with tarfile.open(fileobj=cast(IO[bytes], metered), mode="r:") as archive:
                members = list(_tar_members(archive, metered, max_bytes))
                metered.allowance = MAX_TAR_HEADER_BYTES
                while metered.read(MAX_TAR_HEADER_BYTES):
                    pass  # The padding is read to its end, where gzip has its checksum.
                metered.allowance = math.inf
                return _extract(members, destination, max_bytes, kind)
    except (InvalidError, TooLargeError):
        raise
    except Exception as error:  # The formats and their compressions have errors of many types.
        message = f"the archive cannot be read ({str(error)[:200]}); accepted: a whole zip, tar or tar.gz"
        raise InvalidError(message, LOC) from None


class _Metered(io.RawIOBase):
    """A file of which at most an allowance can be read, because archives claim the sizes of directories and names."""

    def __init__(self, file: IO[bytes], allowance: float) -> None:
        self._file = file
        self.allowance = allowance
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        most = min(math.inf if size < 0 else size, self.allowance + 1)
        content = self._file.read(-1 if most == math.inf else int(most))
        self.allowance -= len(content)
        if self.allowance < 0:
            raise TooLargeError(f"the archive's headers are too large; accepted: up to {MAX_FILES} files", LOC)
        return content


Member: TypeAlias = tuple[str, int, Any]  # (name, size, function that opens it)


def _zip_members(archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        if (info.external_attr >> 16) & 0o170000 not in (0, 0o100000, 0o040000):
            raise InvalidError(f"{info.filename!r} is a link or device; accepted: plain files and folders", LOC)
        if info.flag_bits & ENCRYPTED:
            raise InvalidError(f"{info.filename!r} is encrypted; accepted: files that are not", LOC)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InvalidError(f"{info.filename!r} is compressed by another method; accepted: stored, deflated", LOC)
        if info.is_dir():
            _safe_path(info.filename)
        else:
            yield info.filename, info.file_size, lambda info=info: archive.open(info)


def _tar_members(archive: tarfile.TarFile, metered: _Metered, max_bytes: int) -> Iterator[Member]:
    total = 0
    for count, info in enumerate(archive):
        metered.allowance = MAX_TAR_HEADER_BYTES
        total += info.size  # Files that are skipped count, too, because reading past them inflates them.
        if total > 2 * max_bytes:
            raise TooLargeError(f"the archive unpacks to over {2 * max_bytes} bytes", LOC)
        if count > 2 * MAX_FILES:
            raise TooLargeError(f"the archive has over {MAX_FILES} files", LOC)
        if info.size < 0 or len(info.pax_headers) > MAX_PAX_HEADERS:
            raise InvalidError(f"{info.name[:200]!r} has headers that make no sense", LOC)
        if not (info.isfile() or info.isdir()) or info.issparse():
            raise InvalidError(f"{info.name!r} is a link, device or sparse; accepted: plain files and folders", LOC)
        if info.isdir():
            _safe_path(info.name)
        else:
            yield info.name, info.size, lambda info=info: archive.extractfile(info)


def _extract(members: list[Member], destination: Path, max_bytes: int, kind: Kind) -> Unpacked:
    """Write what the model consists of."""
    if len(members) > MAX_FILES:
        raise TooLargeError(f"the archive has {len(members)} files; accepted: up to {MAX_FILES}", LOC)
    paths = [_safe_path(name) for name, _, _ in members]
    _check_unique(paths)
    index_root = None if kind == "network" else _index_root(paths)
    pickles = [path for path in paths if path.suffix.lower() in PICKLE_SUFFIXES]
    try:
        if index_root is None and kind == "pipeline":
            raise ModelFormatError(MODEL_INDEX, "the file is missing; accepted: a pipeline as diffusers saves it")
        index = None if index_root is None else _read_index(_inside(index_root, paths, members), kind)
        root = _model_root(paths) if index is None or index_root is None else index_root
        inside = _inside(root, paths, members)
        _check_pickles(pickles, root, READ_FOLDERS if index is None else index.components)
        chosen = model_files(inside) if index is None else pipeline_files(inside, index)
    except ModelFormatError as error:
        raise InvalidError(str(error), (*LOC, error.field)) from None
    wanted = {name: inside[name] for name in (*chosen, MODEL_INDEX) if name in inside}
    total = sum(size for _, size, _ in wanted.values())
    if total > max_bytes:
        raise TooLargeError(f"the model unpacks to {total} bytes; accepted: up to {max_bytes}", LOC)
    for name, (_, size, open_member) in wanted.items():
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_member() as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
        if target.stat().st_size != size:
            raise InvalidError(f"{name!r} is truncated", LOC)
    ignored = sorted({path.as_posix() for path in paths} - {(root / name).as_posix() for name in wanted})[:MAX_NAMED]
    return Unpacked(index is not None, ignored)


def _inside(root: PurePosixPath, paths: list[PurePosixPath], members: list[Member]) -> dict[str, Member]:
    """The members below a folder, by their names in it."""
    pairs = zip(paths, members, strict=True)
    return {path.relative_to(root).as_posix(): member for path, member in pairs if path.is_relative_to(root)}


def _index_root(paths: list[PurePosixPath]) -> PurePosixPath | None:
    """The folder of the one `model_index.json` that is at the archive's root, or in a folder at its top."""
    roots = [path.parent for path in paths if path.name == MODEL_INDEX and len(path.parts) <= 2]
    return min(roots, key=lambda root: len(root.parts)) if roots else None


def _read_index(inside: Mapping[str, Member], kind: Kind) -> PipelineIndex | None:
    """The pipeline's index; None if the archive is to be read as a network. Raises: ModelFormatError."""
    _, size, open_member = inside[MODEL_INDEX]
    if size > MAX_JSON_BYTES:
        raise ModelFormatError(MODEL_INDEX, f"the file is too large; accepted: up to {MAX_JSON_BYTES} bytes")
    with open_member() as file:
        content = file.read(MAX_JSON_BYTES + 1)
    try:
        index = PipelineIndex.of(parse_json(MODEL_INDEX, content))
    except ModelFormatError:
        if kind == "pipeline":
            raise
        return None  # A worker looks at the index of a network.
    return index if kind == "pipeline" or is_pipeline(inside, index) else None


def _check_pickles(pickles: list[PurePosixPath], root: PurePosixPath, folders: Collection[str]) -> None:
    """Refuse pickles where the model is: they may be its weights. Nothing reads those of other components."""
    for path in pickles:
        beside = path.relative_to(root).parts if path.is_relative_to(root) else ()
        if len(beside) == 1 or (beside and beside[0] in folders):
            raise InvalidError(f"{path.as_posix()!r} may be a pickle; accepted: weights as .safetensors only", LOC)


def _safe_path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or (path.parts and ":" in path.parts[0]):
        raise InvalidError(f"{name[:200]!r} leads out of the archive; accepted: relative names without '..'", LOC)
    if len(name) > MAX_NAME or any(unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in name):
        accepted = f"up to {MAX_NAME} printable characters"
        raise InvalidError(f"{name[:200]!r} is no name of a file; accepted: {accepted}", LOC)
    return path


def _check_unique(paths: list[PurePosixPath]) -> None:
    """Refuse names that are equal on file systems which ignore case, because it is ambiguous which file is meant."""
    seen = set()
    for path in paths:
        key = unicodedata.normalize("NFC", path.as_posix()).casefold()
        if key in seen:
            raise InvalidError(f"{path.as_posix()!r} is in the archive twice; accepted: once, in whatever case", LOC)
        seen.add(key)


def _model_root(paths: list[PurePosixPath]) -> PurePosixPath:
    """The folder that holds `unet/` or `transformer/`: the archive's root, or one at its top."""
    networks = [PurePosixPath(name).parts for name in (UNET_CONFIG, TRANSFORMER_CONFIG)]
    roots = {path.parent.parent for path in paths if path.parts[-2:] in networks}
    roots = {root for root in roots if len(root.parts) <= 1}
    if len(roots) != 1:
        raise InvalidError(f"the archive has {len(roots)} models; accepted: one, with a {UNET_CONFIG}", LOC)
    return roots.pop()
