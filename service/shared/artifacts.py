"""The store of model folders and sample arrays: a local folder, or any store that fsspec knows (S3, ...)."""

import hashlib
import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# A file of samples is a `.npy` file, and behind the array the digests of its header and of each row, and a mark.
DIGEST_BYTES = 16
DIGESTS_END_HERE = b"TTSUMS1\n"
MAX_HEADER_BYTES = 256
HEADER_START_BYTES = 10  # The mark and the version of a `.npy` file, and the length of the rest of its header.


class DamagedArtifactError(Exception):
    """A file is missing or cut off, or its content is not what was stored."""


def bytes_of_rows(num_rows: int, row_bytes: int) -> int:
    """How large a file of samples is at most."""
    return num_rows * row_bytes + (1 + num_rows) * DIGEST_BYTES + len(DIGESTS_END_HERE) + MAX_HEADER_BYTES


class ArtifactStore:
    """Files under one URL. A file appears whole, under its final name, or not at all.

    On a local disk, it is there after a power cut, too, once it was stored. Other stores promise that themselves.
    """

    def __init__(self, url: str) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(url)
        self._is_local = isinstance(self.fs, LocalFileSystem)
        self._listed: set[str] = set()  # Local folders that are on the disk themselves, as this process saw to that.

    def put(self, key: str, content: Iterable[bytes | memoryview]) -> None:
        """Store a file, whose content is given in pieces."""
        name = f"partial/{uuid4().hex}"
        partial = self._path(name)
        try:
            with self._new_file(name) as file:
                for piece in content:
                    file.write(piece)
                if self._is_local:
                    file.flush()
                    os.fsync(file.fileno())
            self._publish(partial, key)
        except BaseException:
            self._remove(partial)
            raise

    def put_folder(self, key: str, folder: Path) -> None:
        """Store a folder under a new key. The key must not be used by others before this returns."""
        try:
            self.fs.put(f"{folder}/", f"{self._path(key)}/", recursive=True)
            if self._is_local:
                stored = Path(self._path(key))
                for path in (*stored.rglob("*"), stored, stored.parent, stored.parent.parent):
                    _flush_to_disk(path)
        except BaseException:
            self._remove(self._path(key))
            raise

    def put_array(self, key: str, array: "NDArray[Any]") -> None:
        """Keep an array as a `.npy` file, with a digest of each row."""
        self.put_arrays(key, len(array), [array])

    def put_arrays(self, key: str, num_rows: int, arrays: "Iterable[NDArray[Any]]") -> None:
        """Keep arrays as one, of `num_rows` rows together. Only one of them is in memory at a time."""
        self.put(key, _pieces(num_rows, arrays))

    def read(self, key: str) -> bytes:
        """The content of a small file. Raises: DamagedArtifactError, if it is missing."""
        try:
            content: bytes = self.fs.cat_file(self._path(key))
        except FileNotFoundError:
            raise DamagedArtifactError(f"{key} is missing") from None
        return content

    def get_rows(self, key: str, first: int, count: int) -> "NDArray[Any]":
        """Some rows of an array that `put_array` kept; little else of the file is read.

        Raises:
            DamagedArtifactError: the file is missing, or the rows are not those that were stored.
        """
        try:
            with self.fs.open(self._path(key), "rb") as file:
                return _read_rows(file, first, count)
        except FileNotFoundError:
            raise DamagedArtifactError(f"{key} is missing") from None
        except ValueError as error:
            raise DamagedArtifactError(f"{key} is damaged: {error}") from error

    def local_folder(self, key: str) -> Path:
        """The folder as one on this machine: itself, or a copy fetched from a remote store."""
        if self._is_local:
            return Path(self._path(key))
        cache = self._copy_of(key)
        if not cache.exists():
            partial = cache.with_name(f"{cache.name}.{uuid4().hex}")
            self.fs.get(f"{self._path(key)}/", f"{partial}/", recursive=True)
            try:
                partial.replace(cache)
            except OSError:  # Another worker may have made the same copy first.
                shutil.rmtree(partial)
                if not cache.exists():
                    raise
        return cache

    def drop_copy(self, key: str) -> bool:
        """Delete this machine's copy of a remote folder, to be fetched again. False if the store is local."""
        if self._is_local:
            return False
        shutil.rmtree(self._copy_of(key), ignore_errors=True)
        return True

    def files(self, folder: str) -> list[str]:
        """The keys of all files in a folder, at any depth."""
        self.fs.invalidate_cache()
        paths: list[str] = self.fs.find(self._path(folder))
        return [path.removeprefix(f"{self.root.lstrip('/')}/").removeprefix(f"{self.root}/") for path in paths]

    def partial_files(self, before: datetime) -> list[str]:
        """The keys of files that began to be stored before a time, and were never published."""
        if not self.fs.exists(self._path("partial")):
            return []
        return [key for key in self.files("partial") if self.fs.modified(self._path(key)) < before]

    def size(self, key: str = "") -> int:
        """The bytes of a file, of all files of a folder, or, without a key, of all. 0 of what is not there."""
        self.fs.invalidate_cache()
        path = self._path(key).rstrip("/")
        if not self._is_local:
            return int(self.fs.du(path)) if self.fs.exists(path) else 0
        return sum(file_sizes(path))

    def remove(self, key: str) -> None:
        self._remove(self._path(key))

    def _copy_of(self, key: str) -> Path:
        store = hashlib.sha256(self.root.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"timetuner-{store}" / key

    def _new_file(self, key: str) -> IO[bytes]:
        """A new file to write, in a folder that may be missing."""
        path = self._path(key)
        if not self._is_local:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            return self.fs.open(path, "wb")  # type: ignore[no-any-return]
        try:
            return open(path, "wb")
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return open(path, "wb")

    def _publish(self, partial: str, key: str) -> None:
        """Give a whole file its final name.

        A worker does so every few steps, beside the thread that samples: each call of the system gives the interpreter
        away, and has to wait to get it back. So a local disk is asked for what is needed, and not by way of fsspec.
        """
        final, folder = self._path(key), self._path(key).rpartition("/")[0]
        if not self._is_local:
            self.fs.makedirs(folder, exist_ok=True)
            self.fs.mv(partial, final, recursive=True)
            return
        try:
            shutil.move(partial, final)
        except FileNotFoundError:
            self._listed.discard(folder)
            os.makedirs(folder, exist_ok=True)
            shutil.move(partial, final)
        _flush_to_disk(Path(folder))
        if folder not in self._listed:  # Another process may have made the folder a moment ago.
            _flush_to_disk(Path(self.root))
            self._listed.add(folder)

    def _remove(self, path: str) -> None:
        if self.fs.exists(path):
            self.fs.rm(path, recursive=True)

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"


def file_sizes(path: str | Path) -> Iterator[int]:
    """The size of each file of a folder, at any depth, or of the one file. Files that go meanwhile are left out."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from file_sizes(entry.path)
                else:
                    with suppress(FileNotFoundError):
                        yield entry.stat(follow_symlinks=False).st_size
    except NotADirectoryError:
        yield os.stat(path).st_size
    except FileNotFoundError:
        return


def _flush_to_disk(path: Path) -> None:
    """Have the system write a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _pieces(num_rows: int, arrays: "Iterable[NDArray[Any]]") -> Iterator[bytes | memoryview]:
    """A file of samples: the header of `.npy`, the rows, and the digests of both. Raises: ValueError."""
    import numpy as np  # Not every process with artifacts has arrays.

    digests: list[bytes] = []
    for array in arrays:
        rows = np.ascontiguousarray(array)
        if not digests:
            header = io.BytesIO()
            described = {"descr": rows.dtype.str, "fortran_order": False, "shape": (num_rows, *rows.shape[1:])}
            np.lib.format.write_array_header_1_0(header, described)
            digests.append(_digest(header.getvalue()))
            yield header.getvalue()
        digests += [_digest(row.data.cast("B")) for row in rows]
        yield rows.data.cast("B")
    if len(digests) != 1 + num_rows:
        raise ValueError(f"{len(digests) - 1} rows were given; accepted: {num_rows}")
    yield b"".join(digests) + DIGESTS_END_HERE


def _read_rows(file: IO[bytes], first: int, count: int) -> "NDArray[Any]":
    """Rows of a file of samples. Files of releases before there were digests end with the array.

    Raises:
        ValueError: the file is not what was stored.
    """
    import numpy as np

    start = file.read(HEADER_START_BYTES)
    header = start + file.read(int.from_bytes(start[-2:], "little"))
    shape, dtype = _array_of(header)
    begin, size = len(header), file.seek(0, io.SEEK_END)
    row_bytes = dtype.itemsize * math.prod(shape[1:])
    end = begin + shape[0] * row_bytes
    with_digests = end + DIGEST_BYTES * (1 + shape[0]) + len(DIGESTS_END_HERE)
    if size not in (end, with_digests) or first + count > shape[0]:
        raise ValueError(f"it has {size} bytes and {shape[0]} rows")
    file.seek(begin + first * row_bytes)
    content = file.read(count * row_bytes)
    if size == with_digests:
        rows = (memoryview(content)[k * row_bytes : (k + 1) * row_bytes] for k in range(count))
        found = b"".join(_digest(row) for row in rows)
        file.seek(end + DIGEST_BYTES * (1 + first))
        if file.read(DIGEST_BYTES * count) != found:
            raise ValueError("the rows have changed since they were stored")
        file.seek(end)
        if file.read(DIGEST_BYTES) != _digest(header):
            raise ValueError("the header has changed since it was stored")
    return np.frombuffer(content, dtype).reshape(count, *shape[1:])


@lru_cache(maxsize=256)
def _array_of(header: bytes) -> "tuple[tuple[int, ...], np.dtype[Any]]":
    """The shape and the type that the header of a `.npy` file tells. Raises: ValueError."""
    import numpy as np

    try:
        file = io.BytesIO(header)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # Python's tokenizer reads the header, and has errors of its own.
        raise ValueError(f"its header cannot be read: {error}") from error
    return shape, dtype
