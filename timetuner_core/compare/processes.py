"""Tasks in processes of one thread each."""

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch

# Parameters of glibc's mallopt: freed blocks smaller than the first are kept, up to the second in all.
M_MMAP_THRESHOLD, MMAP_THRESHOLD = -3, 2**25
M_TRIM_THRESHOLD, TRIM_THRESHOLD = -1, 2**29

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: sums have the same order wherever a task runs, and processes do not share cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def workers(jobs: int) -> Iterator["InWorkers"]:
    """Processes that are gone when this ends, however it ends; none for one job."""
    if jobs == 1:
        with one_thread():
            yield InWorkers(None)
        return
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)
    try:
        yield InWorkers(pool)
    except BaseException:
        for process in set(multiprocessing.active_children()) - set(others):
            process.terminate()  # Nobody will see the result.
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class InWorkers:
    """Runs tasks in a pool's processes, or here if there is none."""

    pool: ProcessPoolExecutor | None

    def __call__(
        self, work: Callable[..., _Result], tasks: dict[_Task, tuple[Any, ...]], finished: Callable[[_Task], None]
    ) -> dict[_Task, _Result]:
        """`work(*arguments)` by task, begun in the order given."""
        results = {}
        if self.pool is None:
            for task, arguments in tasks.items():
                results[task] = work(*arguments)
                finished(task)
            return results
        futures = {self.pool.submit(work, *arguments): task for task, arguments in tasks.items()}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            finished(futures[future])
        return results


def _start_worker() -> None:
    """One thread; Ctrl-C is for the parent to answer, and without a parent there is nothing to do."""
    torch.set_num_threads(1)
    _keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _keep_freed_memory() -> None:
    """Rather than give activations back, to get them anew page by page at the next step: a fifth of sampling's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # Only glibc has it.
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
