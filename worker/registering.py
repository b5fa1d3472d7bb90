"""The job of registering a model that was handed in: loading it checks it, and then it is kept or refused."""

from sqlalchemy.exc import IntegrityError

from service.registry.jobs import finish
from service.registry.models import keep_described
from service.registry.tables import JobState, ModelRegistration
from timetuner_core.models.describing import describe
from timetuner_core.models.loading import ModelFormatError, load_folder
from timetuner_core.sampling.starting_time import find_starting_time
from worker.lease import JobRefusedError, Lease
from worker.runtime import Runtime


def register(runtime: Runtime, lease: Lease) -> None:
    """Load and describe a model that was handed in, and make it a registered model.

    Raises:
        JobRefusedError: the model cannot be used; its registration says which field is at fault.
    """
    with runtime.registry.read() as session:
        artifact = session.get_one(ModelRegistration, lease.claim.job_id).artifact
    try:
        model = load_folder(runtime.artifacts.local_folder(artifact))
        start = find_starting_time(model)
        spec = describe(model.starting_at(start.t), start.x0_error)
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


def _note_refusal(lease: Lease, field: str) -> None:
    with lease.write() as (_, registration):
        assert isinstance(registration, ModelRegistration)
        registration.refused_field = field[:255]


def _keep(lease: Lease, spec: dict[str, object]) -> None:
    with lease.write() as (session, registration):
        assert isinstance(registration, ModelRegistration)
        keep_described(session, registration, spec)
        finish(session, registration, JobState.SUCCEEDED)
