"""The store of model folders and sample arrays: a local folder, or any store that fsspec knows (S3, ...)."""

import hashlib
import io
import math
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ArtifactStore:
    """Files under one URL. A file appears whole, under its final name, or not at all."""

    def __init__(self, url: str) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(url)

    def put(self, key: str, content: bytes) -> None:
        partial = self._path(f"partial/{uuid4().hex}")
        self.fs.makedirs(self._path("partial"), exist_ok=True)
        try:
            self.fs.pipe_file(partial, content)
            self._publish(partial, key)
        except BaseException:
            self._remove(partial)
            raise

    def put_folder(self, key: str, folder: Path) -> None:
        """Store a folder under a new key. The key must not be used by others before this returns."""
        try:
            self.fs.put(f"{folder}/", f"{self._path(key)}/", recursive=True)
        except BaseException:
            self._remove(self._path(key))
            raise

    def get(self, key: str) -> bytes:
        content: bytes = self.fs.cat_file(self._path(key))
        return content

    def put_array(self, key: str, array: "NDArray[Any]") -> None:
        """Keep an array as a `.npy` file."""
        import numpy as np  # Not every process with artifacts has arrays.

        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        self.put(key, buffer.getvalue())

    def get_rows(self, key: str, first: int, count: int) -> "NDArray[Any]":
        """Some rows of an array that `put_array` kept; nothing else of the file is read."""
        import numpy as np

        with self.fs.open(self._path(key), "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            row_bytes = dtype.itemsize * math.prod(shape[1:])
            file.seek(first * row_bytes, io.SEEK_CUR)
            return np.frombuffer(file.read(count * row_bytes), dtype).reshape(count, *shape[1:])

    def local_folder(self, key: str) -> Path:
        """The folder as one on this machine: itself, or a copy fetched from a remote store."""
        if isinstance(self.fs, LocalFileSystem):
            return Path(self._path(key))
        cache = Path(tempfile.gettempdir()) / f"timetuner-{hashlib.sha256(self.root.encode()).hexdigest()[:16]}" / key
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

    def files(self, folder: str) -> list[str]:
        """The keys of all files in a folder, at any depth."""
        self.fs.invalidate_cache()
        paths: list[str] = self.fs.find(self._path(folder))
        return [path.removeprefix(f"{self.root.lstrip('/')}/").removeprefix(f"{self.root}/") for path in paths]

    def remove(self, key: str) -> None:
        self._remove(self._path(key))

    def _publish(self, partial: str, key: str) -> None:
        self.fs.makedirs(self._path(key).rpartition("/")[0], exist_ok=True)
        self.fs.mv(partial, self._path(key), recursive=True)

    def _remove(self, path: str) -> None:
        if self.fs.exists(path):
            self.fs.rm(path, recursive=True)

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"
