"""What a worker process holds: settings, registry, artifacts, device, and the models it has loaded."""

import logging
import os
import socket
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from celery import Celery

from service.artifacts import ArtifactStore
from service.registry.database import Registry
from service.registry.jobs import LeaseLostError, claim, finish
from service.registry.tables import Job, JobState, Model
from service.settings import Settings
from timetuner_core.loading import DiffusionModel, load_builtin, load_folder
from timetuner_core.tuning import TuningProblem
from worker.lease import JobCancelledError, Lease

logger = logging.getLogger(__name__)

MODELS_KEPT = 2


class Runtime:
    """Made once per worker process, when its first task needs it."""

    def __init__(self, settings: Settings, celery: Celery) -> None:
        self.settings = settings
        self.celery = celery
        self.registry = Registry(settings.database_url)
        self.artifacts = ArtifactStore(settings.artifacts_url)
        self.device = pick_device(settings.device)
        self.owner = f"{socket.gethostname()}:{os.getpid()}"
        self._load = lru_cache(maxsize=MODELS_KEPT)(self._load_uncached)
        self._problem: tuple[str, TuningProblem] | None = None

    def load_model(self, model_id: str) -> DiffusionModel:
        """The model on this worker's device; the last few stay loaded."""
        return self._load(model_id)

    def problem(self, tuning_job_id: str, make: Callable[[], TuningProblem]) -> TuningProblem:
        """What a tuning job tunes on; the last job's stays, for its next task."""
        if self._problem is None or self._problem[0] != tuning_job_id:
            self._problem = None  # before the next one is there
            self._problem = (tuning_job_id, make())
        return self._problem[1]

    def run(self, job_class: type[Job], job_id: str, work: Callable[["Runtime", Lease], None]) -> bool:
        """Claim a job and work on it; whatever happens, the registry says what became of it.

        A job someone else has, or that is over, is left alone: then False. `work` finishes the job itself when all
        went well.
        """
        with self.registry.write() as session:
            claimed = claim(session, job_class, job_id, self.owner, self.settings.lease_seconds)
        if claimed is None:
            return False
        with Lease(self.registry, claimed, self.settings.lease_seconds) as lease:
            try:
                work(self, lease)
            except LeaseLostError:
                logger.warning("%s is no longer ours", job_id)
            except JobCancelledError:
                _finish(lease, JobState.CANCELLED)
            except Exception as error:
                logger.exception("%s failed", job_id)
                _finish(lease, JobState.FAILED, f"{type(error).__name__}: {error}")
        return True

    def _load_uncached(self, model_id: str) -> DiffusionModel:
        self._problem = None  # it would hold on to its model, beside those kept on purpose
        with self.registry.read() as session:
            source: dict[str, Any] = session.get_one(Model, model_id).source
        settings = self.settings
        dtype: torch.dtype = getattr(torch, settings.dtype)
        options: Any = {"dtype": dtype, "channels_last": settings.channels_last, "compile": settings.compile}
        if "builtin" in source:
            return load_builtin(source["builtin"], self.device, **options)
        return load_folder(self.artifacts.local_folder(source["artifact"]), self.device, **options)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _finish(lease: Lease, state: JobState, error: str | None = None) -> None:
    try:
        with lease.write() as (session, job):
            finish(session, job, state, error)
    except LeaseLostError:
        logger.warning("%s is no longer ours", lease.claim.job_id)
