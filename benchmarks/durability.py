"""What it costs that nothing accepted is lost by a power cut: SQLite's commits, and files of samples.

    python benchmarks/durability.py      # on the disk of the current folder, some seconds

SQLite with `synchronous=NORMAL` writes its log without waiting for the disk; with FULL, each commit waits.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sqlalchemy import event, text

from service.registry.database import Registry
from service.shared.artifacts import ArtifactStore

REPEATS = 200


def milliseconds(function: Callable[[], object]) -> float:
    """The median time of a call."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def commit_milliseconds(folder: Path, synchronous: str) -> float:
    """The time of a transaction that changes one row."""
    registry = Registry(f"sqlite:///{folder / synchronous}.sqlite")

    @event.listens_for(registry.engine, "connect")
    def configure(connection: object, _record: object) -> None:
        connection.execute(f"PRAGMA synchronous={synchronous}")  # type: ignore[attr-defined]

    registry.upgrade()

    def commit() -> None:
        with registry.write() as session:
            session.execute(text("UPDATE registry_changes SET number = number + 1"))

    taken = milliseconds(commit)
    registry.close()
    return taken


def main() -> None:
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).absolute()
        for synchronous in ("NORMAL", "FULL"):
            print(f"commit, synchronous={synchronous}: {commit_milliseconds(folder, synchronous):.2f} ms")
        artifacts, images = ArtifactStore(f"file://{folder}"), np.zeros((24, 3, 64, 64), np.float32)
        print(
            f"file of {images.nbytes >> 10} KiB: {milliseconds(lambda: artifacts.put_array('a/b.npy', images)):.2f} ms"
        )
        print(f"read and checked: {milliseconds(lambda: artifacts.get_rows('a/b.npy', 0, 24)):.2f} ms")
        fsync, os.fsync = os.fsync, lambda _: None
        try:
            print(f"file, not flushed: {milliseconds(lambda: artifacts.put_array('a/b.npy', images)):.2f} ms")
        finally:
            os.fsync = fsync


if __name__ == "__main__":
    main()
