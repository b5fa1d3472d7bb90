"""Unpacking an uploaded model: only the files a model consists of, checked before a byte is written."""

import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeAlias

from service.errors import InvalidError, TooLargeError
from timetuner_core.loading import MODEL_FILES, TRANSFORMER_CONFIG, UNET_CONFIG

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
MAX_FILES = 1000
LOC = ("body", "archive")


def unpack(file: IO[bytes], destination: Path, max_bytes: int) -> None:
    """Extract the `MODEL_FILES` of a zip or tar archive, whether at its root or in one folder.

    Raises:
        InvalidError: not an archive, unsafe names, links, pickles, or no model inside.
        TooLargeError: more than `max_bytes` unpacked, or more than `MAX_FILES` files.
    """
    try:
        if zipfile.is_zipfile(file):
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                _extract(list(_zip_members(archive)), destination, max_bytes)
        else:
            file.seek(0)
            with tarfile.open(fileobj=file) as archive:
                _extract(list(_tar_members(archive, max_bytes)), destination, max_bytes)
    except (InvalidError, TooLargeError):
        raise
    except Exception as error:  # whatever the formats and their compressions raise
        raise InvalidError(f"the archive cannot be read ({error}); accepted: a whole zip, tar or tar.gz", LOC) from None


Member: TypeAlias = tuple[str, int, Any]  # name, size, and a function that opens it


def _zip_members(archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        if (info.external_attr >> 16) & 0o170000 == 0o120000:
            raise InvalidError(f"{info.filename!r} is a link; accepted: plain files and folders", LOC)
        if not info.is_dir():
            yield info.filename, info.file_size, lambda info=info: archive.open(info)


def _tar_members(archive: tarfile.TarFile, max_bytes: int) -> Iterator[Member]:
    total = 0
    for count, info in enumerate(archive):
        total += info.size  # reading on inflates what is skipped, too
        if total > 2 * max_bytes:
            raise TooLargeError(f"the archive unpacks to over {2 * max_bytes} bytes", LOC)
        if count > 2 * MAX_FILES:
            raise TooLargeError(f"the archive has over {MAX_FILES} files", LOC)
        if not (info.isfile() or info.isdir()):
            raise InvalidError(f"{info.name!r} is a link or device; accepted: plain files and folders", LOC)
        if info.isfile():
            yield info.name, info.size, lambda info=info: archive.extractfile(info)


def _extract(members: list[Member], destination: Path, max_bytes: int) -> None:
    if len(members) > MAX_FILES:
        raise TooLargeError(f"the archive has {len(members)} files; accepted: up to {MAX_FILES}", LOC)
    paths = [_safe_path(name) for name, _, _ in members]
    root = _model_root(paths)
    wanted: dict[str, Member] = {}
    for path, member in zip(paths, members, strict=True):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
        if name in MODEL_FILES:
            if name in wanted:
                raise InvalidError(f"{name!r} is in the archive twice", LOC)
            wanted[name] = member
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


def _safe_path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise InvalidError(f"{name!r} leads out of the archive; accepted: relative names without '..'", LOC)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InvalidError(f"{name!r} may be a pickle; accepted: weights as .safetensors only", LOC)
    return path


def _model_root(paths: list[PurePosixPath]) -> PurePosixPath:
    """The folder that holds `unet/` or `transformer/`: the archive's root, or one at its top."""
    networks = [PurePosixPath(name).parts for name in (UNET_CONFIG, TRANSFORMER_CONFIG)]
    roots = {path.parent.parent for path in paths if path.parts[-2:] in networks}
    roots = {root for root in roots if len(root.parts) <= 1}
    if len(roots) != 1:
        raise InvalidError(f"the archive has {len(roots)} models; accepted: one, with a {UNET_CONFIG}", LOC)
    return roots.pop()
