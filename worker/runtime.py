"""The state of a worker process: settings, registry, artifacts, device, and the loaded models."""

import gc
import logging
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from celery import Celery
from sqlalchemy.orm import Session

from service.registry.database import Registry, is_away
from service.registry.jobs import Claim, LeaseLostError, claim, finish, hand_back, next_tuning_jobs, unpublish
from service.registry.samples import models_sampled_last
from service.registry.tables import Job, JobState, Model, TuningJob
from service.shared.artifacts import ArtifactStore
from service.shared.garbage import no_collections
from service.shared.job_requests import SampleRequest
from service.shared.logs import about
from service.shared.pipeline_calls import is_pipeline
from service.shared.settings import Settings
from service.shared.signals import Bus
from timetuner_core.models.folder_files import ModelFormatError, folder_hash
from timetuner_core.models.loading import DiffusionModel, load_builtin, load_folder
from timetuner_core.models.out_of_memory import is_out_of_memory
from timetuner_core.pipelines.files import fingerprint, pipeline_hash
from timetuner_core.sampling.batch_size import call_at_sizes, largest_useful_size
from timetuner_core.sampling.cuda_graphs import CudaGraphs
from timetuner_core.sampling.generate import Guidance
from timetuner_core.sampling.same_bits import all_sizes, sizes_without_padding, steady_sizes
from timetuner_core.tuning.problem import TuningProblem
from worker import metrics
from worker.conversion import guidance_of
from worker.lease import JobCancelledError, JobRefusedError, Lease, StepWatch, WorkerStoppingError
from worker.pipeline_folders import PipelineFolders
from worker.pipeline_loading import load_quietly, placement_of
from worker.pipeline_sampling import ServedPipeline
from worker.traces import tuning_ended, tuning_span

logger = logging.getLogger(__name__)


# A model, and the precision that its network runs in. The latter has no bearing on pipelines, which have their own.
ModelKey = tuple[str, torch.dtype]
# A model, a kind of guidance, whether the scale guides (None: only at some times), and the length of conditions.
SizesKey = tuple[ModelKey, str, bool | None, int | None]


class ChangedModelError(Exception):
    """A model's files are not those that were registered."""


class DeletedModelError(Exception):
    """A model was deleted while a job on it was submitted, or before damaged samples of it were to be made again."""


class Runtime:
    """The state of a worker process. The first task makes it."""

    def __init__(self, settings: Settings, celery: Celery, stopping: threading.Event | None = None) -> None:
        """Make the runtime. Once `stopping` is set, jobs are handed back and none is taken."""
        self.settings = settings
        self.celery = celery
        self.registry = Registry(settings.database_url)
        self.artifacts = ArtifactStore(settings.artifacts_url)
        self.device = pick_device(settings.device)
        self.tried_dtype = pick_dtype(settings.dtype, self.device)  # What is tried of tuned schedules, beside float32.
        self.owner = f"{socket.gethostname()}:{os.getpid()}"
        self.bus = Bus(celery, settings.broker_url)
        # The model used last is the last.
        self._models: OrderedDict[ModelKey, DiffusionModel | ServedPipeline] = OrderedDict()
        self.pipeline_folders = PipelineFolders(settings, self.artifacts)
        self._fingerprints: dict[str, str] = {}  # The state of a pipeline's files whose content was checked, by model.
        self._sizes: dict[SizesKey, tuple[int, ...]] = {}
        self._graphs: dict[ModelKey, CudaGraphs] = {}  # Loaded models have them.
        self.most_rows = settings.part_size  # How many rows are sampled at once of what was sampled last.
        self.give_way: Callable[[], None] = lambda: None  # Tuning calls it to let urgent work go first.
        self._problem: tuple[str, TuningProblem] | None = None
        self.stopping = stopping or threading.Event()  # Once it is set, jobs are handed back.
        gc.freeze()  # Objects loaded by now stay, so collections need not go through them.

    def load(self, model_id: str, dtype: torch.dtype = torch.float32) -> DiffusionModel | ServedPipeline:
        """The model on this worker's device. The models used last stay loaded, up to `max_model_bytes` together.

        A network that is used in two precisions is two models here, of which either may be left out.
        """
        key = (model_id, dtype)
        if key not in self._models:
            self._problem = None  # It holds a reference to its model, which could not be freed.
            self._make_room(self._expected_bytes(model_id, dtype))
            with metrics.LOAD.time(), no_collections():  # A first load imports diffusers.
                model = self._load(*key)
            self._make_room(model.num_bytes)
            self._models[key] = model
            metrics.hold(self._models.values())
        self._models.move_to_end(key)
        return self._models[key]

    def _expected_bytes(self, model_id: str, dtype: torch.dtype) -> int:
        """The size of a model by its registration, which counts networks in float32."""
        with self.registry.read() as session:
            row = session.get(Model, model_id)
        if row is None:
            return 0
        num_bytes = int(row.spec.get("num_bytes") or 0)
        return num_bytes if is_pipeline(row.spec) else num_bytes * dtype.itemsize // torch.float32.itemsize

    def _make_room(self, num_bytes: int) -> None:
        """Drop the models that were used the longest ago, until one more of this size fits."""
        kept, count = sum(model.num_bytes for model in self._models.values()), len(self._models)
        while self._models and kept + num_bytes > self.settings.max_model_bytes:
            dropped_key, dropped = self._models.popitem(last=False)
            if self._graphs.pop(dropped_key, None) is not None:  # They are recorded again where sizes are found.
                self._sizes = {key: sizes for key, sizes in self._sizes.items() if key[0] != dropped_key}
            kept -= dropped.num_bytes
            del dropped
        if len(self._models) < count:
            gc.collect()  # Pipelines have references in cycles.
            metrics.hold(self._models.values())

    def load_model(self, model_id: str, dtype: torch.dtype = torch.float32) -> DiffusionModel:
        """As `load`, for a network. Raises: TypeError, for a pipeline."""
        model = self.load(model_id, dtype)
        if not isinstance(model, DiffusionModel):
            raise TypeError(f"model {model_id} is a pipeline; accepted: a network")
        return model

    def models_held(self) -> list[str]:
        """The ids of the models that are loaded."""
        return list(dict.fromkeys(model_id for model_id, _ in self._models))

    def warm_up(self) -> None:
        """Load the models that were sampled last, as far as there is room, and find their batch sizes.

        Nothing that goes wrong here ends the worker. A model that ended a process while it was loaded is left out: its
        mark is still there.
        """
        try:
            with self.registry.read() as session:
                recent = models_sampled_last(session, self.settings.warm_models)
        except Exception:  # The database is away, or older than this process.
            logger.exception("no model is loaded before its first request")
            return
        for job in reversed(recent):
            model_id, dtype = job.model_id, dtype_of(job.dtype)
            place = f"{socket.gethostname()}:{self.device}:{model_id}"
            if not self.bus.mark_warming(place):
                logger.warning("model %s is left out: a worker ended while it loaded it, or is loading it", model_id)
                continue
            try:
                if isinstance(self.load(model_id, dtype), DiffusionModel):
                    self.batch_sizes(model_id, guidance_of(SampleRequest.stored(job.request)), None, dtype)
            except Exception:  # A request for the model fails with the same error.
                logger.exception("model %s could not be loaded", model_id)
            self.bus.unmark_warming(place)

    def batch_sizes(
        self,
        model_id: str,
        guidance: Guidance,
        condition_shape: tuple[int, ...] | None,
        dtype: torch.dtype = torch.float32,
    ) -> Sequence[int]:
        """The batch sizes at which this worker runs such requests. With `same_bits`, those at which bits agree.

        `most_rows` becomes the most rows that suit them.
        """
        key = _sizes_key((model_id, dtype), guidance, condition_shape)
        if key not in self._sizes:
            find = self._steady_sizes if self.settings.same_bits else self._find_sizes
            self._sizes[key] = find(key, guidance)
        sizes = self._sizes[key]
        is_found = self.settings.sample_batch_size == "auto" and not self.settings.same_bits
        self.most_rows = sizes[-1] if is_found else self.settings.part_size
        return sizes

    @property
    def _records_graphs(self) -> bool:
        """Whether networks have CUDA graphs. Those that are compiled have their compiler's."""
        settings = self.settings
        return self.device.type == "cuda" and settings.cuda_graphs and not settings.compile and not settings.same_bits

    def replaying(self, model_id: str, dtype: torch.dtype) -> AbstractContextManager[None]:
        """A context in which the model's network repeats its CUDA graphs, if it has any: tuning calls the network."""
        graphs = self._graphs.get((model_id, dtype))
        return nullcontext() if graphs is None else graphs.replaying()

    def _find_sizes(self, key: SizesKey, guidance: Guidance) -> tuple[int, ...]:
        """The batch sizes at which such requests run, whatever their bits. Their CUDA graphs are recorded."""
        model_key, *_, guided, length = key
        model, graphs = self.load_model(*model_key), self._graphs.get(model_key)
        with nullcontext() if graphs is None else graphs.recording():
            if self.settings.sample_batch_size == "auto":
                return sizes_without_padding(self._useful_size(key, guidance), self.device)
            sizes = sizes_without_padding(self.settings.sample_batch_size, self.device)
            if graphs is not None:
                options: Any = {"guided": guided, "condition_length": length}
                call_at_sizes(model, guidance.type, self.device, sizes[::-1], **options)
            return sizes

    def keep_batch_sizes(
        self,
        model_id: str,
        guidance: Guidance,
        condition_shape: tuple[int, ...] | None,
        dtype: torch.dtype,
        sizes: Sequence[int],
    ) -> None:
        """Use only these batch sizes for such requests from now on: memory does not hold the larger ones."""
        self._sizes[_sizes_key((model_id, dtype), guidance, condition_shape)] = tuple(sizes)

    def _steady_sizes(self, key: SizesKey, guidance: Guidance) -> tuple[int, ...]:
        """Try batches up to the largest that memory holds. Raises: the errors of the network."""
        model_key, *_, guided, length = key
        model, (model_id, _) = self.load_model(*model_key), model_key
        limit = self.settings.part_size
        for most in all_sizes(limit)[::-1]:
            try:
                sizes = steady_sizes(model, guidance.type, most, self.device, guided=guided, condition_length=length)
            except Exception as error:
                if most == 1 or not is_out_of_memory(error):
                    raise
                logger.warning("memory does not hold a batch of %d of model %s", most, model_id)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            found = {"model": model_id, "guidance": guidance.type, "batch_sizes": sizes}
            if sizes[-1] == limit:
                logger.info("batch sizes with the same bits", extra=found)
            else:
                advice = (
                    "no larger batches have the same bits: steps of %d rows take several calls, but for SAME_BITS=false"
                )
                logger.warning(advice, limit, extra=found)
            return sizes
        raise AssertionError("the size 1 is always tried")

    def _useful_size(self, key: SizesKey, guidance: Guidance) -> int:
        """The largest batch that pays, within `batch_step_seconds`. Raises: the errors of the network."""
        model_key, *_, guided, length = key
        model, (model_id, _) = self.load_model(*model_key), model_key
        seconds = self.settings.batch_step_seconds
        most = largest_useful_size(model, guidance.type, self.device, seconds, guided=guided, condition_length=length)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.info("batches have up to %d rows", most, extra={"model": model_id, "guidance": guidance.type})
        return most

    def problem(self, tuning_job_id: str, make: Callable[[], TuningProblem]) -> TuningProblem:
        """The problem of a tuning job. That of the last job is kept for its next task."""
        if self._problem is None or self._problem[0] != tuning_job_id:
            self._problem = None  # The old problem is freed before the new one takes memory.
            self._problem = (tuning_job_id, make())
        return self._problem[1]

    def run(self, job_class: type[Job], job_id: str, work: Callable[["Runtime", Lease], None]) -> bool:
        """Claim a job and work on it. Its end is stored in the registry, however it ends.

        Instead of a tuning job another one is claimed if it is that one's turn: each has a message of its own.

        `work` stores a success itself. If it fails because the database is away, the lease expires, and another worker
        continues the job.

        Returns:
            False if the job is over, another worker has it, this worker is stopping, or the database went away.
        """
        with self.registry.write() as session:
            claimed = self._claim(session, job_class, job_id)
        if claimed is None:
            return False
        job_id = claimed.job_id
        ids = about(job_id=job_id, request_id=claimed.request_id)
        with ids, self._lease(claimed) as lease, tuning_span(claimed):
            try:
                work(self, lease)
                _note_end(job_class, JobState.SUCCEEDED)
            except LeaseLostError:
                logger.warning("%s is no longer ours", job_id)
            except JobCancelledError:
                _finish(lease, JobState.CANCELLED)
            except WorkerStoppingError:
                _hand_back(lease)
            except JobRefusedError as refusal:
                _finish(lease, JobState.FAILED, str(refusal))
            except Exception as error:
                logger.exception("%s failed", job_id)
                if is_away(error):
                    return False
                _finish(lease, JobState.FAILED, f"{type(error).__name__}: {error}")
        return True

    def _claim(self, session: Session, job_class: type[Job], job_id: str) -> Claim | None:
        """Claim the job, or the tuning job whose turn it is. A worker that is stopping has it published again."""
        candidates = [*next_tuning_jobs(session), job_id] if job_class is TuningJob else [job_id]
        if self.stopping.is_set():
            unpublish(session, job_class, candidates[0])
            return None
        for candidate in candidates:
            if claimed := claim(session, job_class, candidate, self.owner, self.settings.lease_seconds):
                return claimed
        return None

    def _lease(self, claimed: Claim) -> Lease:
        return Lease(self.registry, claimed, self.settings.lease_seconds, self.stopping, self.step_watch())

    def step_watch(self) -> StepWatch:
        """A watch over the steps of jobs that begin now."""
        return StepWatch(self.settings.step_seconds, self.settings.max_step_seconds)

    def _load(self, model_id: str, dtype: torch.dtype) -> DiffusionModel | ServedPipeline:
        with self.registry.read() as session:
            row = session.get_one(Model, model_id)
        if row.deleted_at is not None:
            raise DeletedModelError(f"model {row.name!r} ({row.id}) was deleted; accepted: a job on another model")
        settings, source = self.settings, row.source
        if is_pipeline(row.spec):
            precision = dtype_of(row.spec["dtype"])
            placement = placement_of(settings, self.device, row.spec.get("num_bytes") or 0)
            pipeline = load_quietly(self.pipeline_folder(row), self.device, precision, placement)
            return ServedPipeline.of(pipeline, row.spec, settings)
        options: Any = {"dtype": dtype, "channels_last": settings.channels_last, "compile": settings.compile}
        if "builtin" in source:
            model = load_builtin(source["builtin"], self.device, **options)
        else:
            model = load_folder(self._checked_folder(row), self.device, **options)
        if self._records_graphs:
            self._graphs[model_id, dtype] = graphs = CudaGraphs(model.network)
            model = replace(model, network=graphs)  # The network's calls are watched outside of it.
        t_start: float | None = row.spec.get("t_start")
        starting = model if t_start is None else model.starting_at(t_start)
        return starting.watched(metrics.NETWORK_EVALUATIONS.labels(model_id).inc)

    def pipeline_folder(self, model: Model) -> Path:
        """The folder of a registered pipeline, whose content is what was registered.

        Files that are not ours are hashed again only if a name, size or time changed since they were hashed.

        Raises:
            ChangedModelError: the content is another, or the files are gone.
        """
        if "artifact" in model.source:
            return self._checked_folder(model)
        try:
            folder = self.pipeline_folders.find(model.source)
            state = fingerprint(folder)
            if state != self._fingerprints.get(model.id, model.source["fingerprint"]):
                _check_hash(model, pipeline_hash(folder, model.source["dtype"]), str(folder))
        except ModelFormatError as error:
            message = f"the files of model {model.name!r} ({model.id}) cannot be read as they were registered: {error}"
            raise ChangedModelError(message) from None
        self._fingerprints[model.id] = state
        return folder

    def _checked_folder(self, model: Model) -> Path:
        """The folder of an uploaded model's files. Raises: ChangedModelError, if they are not those that came."""
        key: str = model.source["artifact"]

        def content_hash() -> str:
            folder, is_pipeline = self.artifacts.local_folder(key), model.source.get("kind") == "pipeline"
            return pipeline_hash(folder, model.source["dtype"]) if is_pipeline else folder_hash(folder)

        found = content_hash()
        if found != model.content_hash and self.artifacts.drop_copy(key):
            found = content_hash()
        _check_hash(model, found, f"{key} of the artifact store")
        return self.artifacts.local_folder(key)


def _check_hash(model: Model, found: str, place: str) -> None:
    """Raises: ChangedModelError, if a model's files have another hash than when it was registered."""
    if found != model.content_hash:
        hashes = f"their hash is {found}, and was {model.content_hash}"
        message = f"the files of model {model.name!r} ({model.id}) have changed since it was registered: {hashes}"
        raise ChangedModelError(f"{message}; accepted: the files as they were, in {place}")


def _sizes_key(model: ModelKey, guidance: Guidance, condition_shape: tuple[int, ...] | None) -> SizesKey:
    """The facts of a request that its batch sizes depend on."""
    guided = None if guidance.interval else guidance.guides
    return model, guidance.type, guided, condition_shape[0] if condition_shape else None


def pick_device(name: str) -> torch.device:
    """The device of a setting. `auto` is CUDA if available, otherwise the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision that the setting has tried. `auto` is bfloat16 on a CUDA device that has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return dtype_of(name)


def dtype_of(name: str | None) -> torch.dtype:
    """A precision by its name. Sampling jobs of older versions, and of pipelines, name none: it is float32."""
    dtype: torch.dtype = getattr(torch, name or "float32")
    return dtype


def _note_end(job_class: type[Job], state: JobState, error: str | None = None) -> None:
    metrics.job_ended(job_class, state)
    tuning_ended(state, error)
    logger.info("job ended", extra={"state": state.value})


def _finish(lease: Lease, state: JobState, error: str | None = None) -> None:
    try:
        with lease.write() as (session, job):
            finish(session, job, state, error)
        _note_end(lease.claim.job_class, state, error)
    except LeaseLostError:
        logger.warning("%s is no longer ours", lease.claim.job_id)


def _hand_back(lease: Lease) -> None:
    try:
        with lease.write() as (session, job):
            hand_back(session, job)
        logger.info("handed back")
    except LeaseLostError:
        logger.warning("%s is no longer ours", lease.claim.job_id)
