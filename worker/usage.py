"""The use of this worker by jobs: network calls, rows and seconds, until they are stored."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from service.registry.usage import Use


class Meter:
    """The use by a tuning job that is not stored yet. The thread that renews its lease may take it at any time.

    Its clock stands still until it is started, and while it is paused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._use = Use()
        self._since: float | None = None

    def start(self) -> None:
        """Start the clock: from now on the worker's time is the job's."""
        with self._lock:
            self._note_time()
            self._since = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile the worker's time is not the job's."""
        with self._lock:
            was_running = self._since is not None
            self._note_time()
            self._since = None
        try:
            yield
        finally:
            if was_running:
                self.start()

    def count(self, network_rows: int, network_calls: int = 1) -> None:
        """Count calls of the network, and the rows of all of them."""
        with self._lock:
            self._use += Use(network_calls, network_rows)

    def take(self) -> Use:
        """The use since the last time, for who stores it."""
        with self._lock:
            self._note_time()
            taken, self._use = self._use, Use()
            return taken

    def put_back(self, use: Use) -> None:
        """Take back what could not be stored."""
        with self._lock:
            self._use += use

    def _note_time(self) -> None:
        if self._since is not None:
            now = time.monotonic()
            self._use += Use(device_seconds=now - self._since)
            self._since = now


class SharedMeter:
    """The use by the jobs of a cohort. The calls and rows of each step are shared out evenly among its images.

    A device may work behind the thread that asks it, which waits only when images are done. So the seconds are shared
    out then, among all rows of the steps since the last time.
    """

    def __init__(self) -> None:
        self._calls = self._rows = 0
        self._seconds = 0.0
        self._steps: Counter[str] = Counter()  # The rows of each job's steps whose seconds are not shared out yet.
        self._uses: defaultdict[str, Use] = defaultdict(Use)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._uses

    def count(self, network_rows: int, network_calls: int = 1) -> None:
        """Count calls of the network, and the rows of all of them."""
        self._calls += network_calls
        self._rows += network_rows

    @contextmanager
    def step(self, owners: Iterable[str]) -> Iterator[None]:
        """A step of these jobs' images: each job's id comes once for each of its images."""
        with self.waiting():
            try:
                yield
            finally:
                images = Counter(owners)
                for job_id, count in images.items():
                    share = count / images.total()
                    self._uses[job_id] += Use(share * self._calls, share * self._rows)
                self._calls = self._rows = 0
                self._steps += images

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in which the device works for the steps so far."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds += time.monotonic() - began

    def take(self, job_id: str) -> Use:
        """The use by a job that has ended here."""
        total = self._steps.total()
        for each, steps in self._steps.items():
            self._uses[each] += Use(device_seconds=self._seconds * steps / total)
        self._steps.clear()
        self._seconds = 0.0
        return self._uses.pop(job_id, Use())
