"""The job of registering a model that was handed in: it is loaded and tried, and then kept or refused."""

from pathlib import Path
from typing import Any

from sqlalchemy.exc import IntegrityError

from service.registry.jobs import finish
from service.registry.models import find_model, keep_described
from service.registry.tables import JobState, ModelRegistration
from timetuner_core.models.describing import describe
from timetuner_core.models.loading import ModelFormatError, load_folder
from timetuner_core.models.trial_call import try_calls
from timetuner_core.sampling.starting_time import find_starting_time
from worker.lease import JobRefusedError, Lease
from worker.registering_pipelines import FoundPipeline
from worker.runtime import Runtime


def register(runtime: Runtime, lease: Lease) -> None:
    """Load, try and describe a model that was handed in, and make it a registered model.

    Raises:
        JobRefusedError: the model cannot be used; its registration says which field is at fault.
    """
    with runtime.registry.read() as session:
        source = session.get_one(ModelRegistration, lease.claim.job_id).whole_source
    try:
        if source.get("kind") == "pipeline":
            spec = _describe_pipeline(runtime, lease, source)
        else:
            spec = find_out(runtime.artifacts.local_folder(source["artifact"]))
    except ModelFormatError as error:
        field = error.field
        lease.persist(lambda: _note_refusal(lease, field))
        raise JobRefusedError(str(error)) from None
    for again in (True, False):
        try:
            lease.persist(lambda: _keep(lease, spec))
            break
        except IntegrityError:  # The same content was registered at the same time, and is found now.
            if not again:
                raise


def _describe_pipeline(runtime: Runtime, lease: Lease, source: dict[str, Any]) -> dict[str, Any]:
    """The `spec` of a pipeline, whose content hash and pinned source are noted; that of its content, if it has one.

    Raises:
        ModelFormatError, MemoryError.
    """
    with lease.watch.paused():  # Many gigabytes take long to download and to hash. A stalled download ends itself.
        pipeline = FoundPipeline.at(runtime.pipeline_folders, source)
    lease.persist(lambda: _note_content(lease, pipeline))
    with runtime.registry.read() as session:
        registration = session.get_one(ModelRegistration, lease.claim.job_id)
        if model := find_model(session, registration.content_hash, registration.private_to):
            return model.spec
    with lease.watch.slow():
        return pipeline.describe(runtime.device, runtime.settings)


def _note_content(lease: Lease, pipeline: FoundPipeline) -> None:
    with lease.write() as (_, registration):
        assert isinstance(registration, ModelRegistration)
        registration.content_hash = pipeline.content_hash
        registration.source = {
            name: value for name, value in pipeline.source.items() if name not in ("artifact", "ignored_files")
        }


def find_out(folder: Path) -> dict[str, object]:
    """All that a worker finds out about a model, as JSON. It is stored as the model's `spec`: more goes in here.

    The model is loaded in float32 on the CPU, whatever the worker samples with, so that every worker finds the same.

    Raises:
        ModelFormatError: the model cannot be used.
        MemoryError: this machine is too small for it.
    """
    model = load_folder(folder)
    try_calls(model, folder)
    start = find_starting_time(model)
    return describe(model.starting_at(start.t), start.x0_error)


def _note_refusal(lease: Lease, field: str) -> None:
    with lease.write() as (_, registration):
        assert isinstance(registration, ModelRegistration)
        registration.refused_field = field[:255]


def _keep(lease: Lease, spec: dict[str, object]) -> None:
    with lease.write() as (session, registration):
        assert isinstance(registration, ModelRegistration)
        keep_described(session, registration, spec)
        finish(session, registration, JobState.SUCCEEDED)
