"""The old client with today's service: what one does with it, from a model to images."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.registry.keys import Scope
from tests.compatibility.client import (
    ConflictError,
    ForbiddenError,
    InvalidError,
    JobFailedError,
    NotFoundError,
    Schedule,
    TimeTuner,
    TuningJob,
    UnauthenticatedError,
    WaitTimeoutError,
)
from tests.compatibility.conftest import quick
from tests.keys import NewUser
from tests.stack import own_digits8

pytestmark = pytest.mark.parametrize("stack", ["sqlite"], indirect=True, scope="session")


def test_a_job_is_waited_for_and_shown_as_it_goes_on(
    service: TimeTuner, gratings: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[TuningJob] = []
    job = service.tuning_jobs.create(**quick(gratings, 2))
    done = job.wait(progress=seen.append)
    assert (done.state, done.progress, len(done.steps)) == ("succeeded", 1.0, 2)
    assert (seen[0].id, seen[0].state, seen[-1]) == (job.id, "queued", done)
    assert [event.type for event in job.events()][-1] == "succeeded"
    assert [event.id for event in job.events(follow=True)] == [event.id for event in job.events()]
    schedule = service.schedules.get(str(done.schedule))
    assert (schedule.job, len(schedule.t_ratios)) == (job.id, 2)
    job.wait(progress=True)
    told = capsys.readouterr()
    assert (f"{job.id} succeeded: 100 %" in told.err, told.out) == (True, "")


def test_a_job_that_does_not_succeed_is_an_error(service: TimeTuner, gratings: str) -> None:
    job = service.tuning_jobs.create(model=gratings, num_steps=3, tuner={"total_iters": 10_000})
    with pytest.raises(WaitTimeoutError, match=f"job {job.id} is (queued|running) after 0.5 s"):
        job.wait(timeout=0.5)
    job.cancel()
    with pytest.raises(JobFailedError, match=f"job {job.id} was cancelled"):
        job.wait()
    assert job.refresh().state == "cancelled"


def test_lists_go_on_over_all_pages(service: TimeTuner, gratings: str, schedule: Schedule) -> None:
    filters = {"model": gratings, "num_steps": schedule.num_steps, "status": "imported"}
    expected = [each.id for each in service.schedules.list(**filters)]  # type: ignore[arg-type]
    for _ in range(5):
        expected.insert(0, service.schedules.import_(**schedule.to_import()).id)
    assert [each.id for each in service.schedules.list(**filters, limit=2)] == expected  # type: ignore[arg-type]
    assert [each.id for each in service.schedules.list(**filters)] == expected  # type: ignore[arg-type]
    jobs = [job.id for job in service.tuning_jobs.list(state="succeeded", limit=1)]
    assert schedule.job in jobs
    assert gratings in [model.id for model in service.models.list(limit=1)]


def test_an_imported_schedule_is_the_same_and_can_be_named_and_deleted(service: TimeTuner, schedule: Schedule) -> None:
    copy = service.schedules.import_(**schedule.to_import())
    kept = {"timesteps", "t_ratios", "provenance", "sampler", "num_steps", "guidance_type", "guidance_end", "model"}
    assert copy.model_dump(include=kept) == schedule.model_dump(include=kept)
    assert (copy.status, copy.evaluation) == ("imported", None)
    service.aliases.set(copy.model, "of-clients", copy.id)
    assert {alias.name: alias.schedule for alias in service.aliases.list(copy.model)}["of-clients"] == copy.id
    with pytest.raises(ConflictError):
        service.schedules.delete(copy.id)
    service.aliases.delete(copy.model, "of-clients")
    service.schedules.delete(copy.id)
    with pytest.raises(NotFoundError):
        service.schedules.get(copy.id)


def test_samples_are_arrays_and_images_and_the_same_however_asked_for(
    service: TimeTuner, gratings: str, schedule: Schedule
) -> None:
    request = {"model": gratings, "num_steps": 3, "schedule": schedule.id, "num_images": 3, "seed": 1}
    samples = service.samples.create(**request)  # type: ignore[arg-type]
    assert (samples.array.shape, samples.array.dtype, samples.schedule) == ((3, 1, 8, 8), np.float32, schedule.id)
    assert [image.size for image in samples.images] == [(8, 8)] * 3
    white = np.asarray(samples.images[1])
    assert np.abs(white / 127.5 - 1 - samples.array[1, 0].clip(-1, 1)).max() < 1 / 127
    assert Image.open(io.BytesIO(samples._repr_png_() or b"")).width > 3 * 8
    job = service.samples.submit(**request)  # type: ignore[arg-type]
    assert np.array_equal(job.wait().array, samples.array)
    assert np.array_equal(service.samples.content(job.id).array, samples.array)
    events = list(job.events())
    assert (events[0].type, events[-1].type) == ("state", "end")
    assert events[-1].job is not None
    assert events[-1].job.content == f"/v1/samples/{job.id}/content"


def test_a_folder_is_uploaded_as_an_archive(service: TimeTuner, tmp_path: Path) -> None:
    model = service.models.create(archive=own_digits8(tmp_path), name="my digits")
    assert (model.name, model.spec.num_classes) == ("my digits", 10)
    assert service.models.get(model.id) == model
    (tmp_path / "model.zip").write_bytes(b"no archive")
    with pytest.raises(InvalidError) as caught:
        service.models.create(archive=tmp_path / "model.zip")
    assert caught.value.request_id
    service.models.delete(model.id)


def test_a_refusal_says_which_field_is_wrong(service: TimeTuner, gratings: str) -> None:
    with pytest.raises(InvalidError) as caught:
        service.tuning_jobs.create(model=gratings, num_steps=0)
    assert (caught.value.status, caught.value.errors[0].loc) == (422, ["body", "num_steps"])
    with pytest.raises(InvalidError):
        service.schedules.resolve(model=gratings, num_steps=3, sampler="euler", eta=1)


def test_a_key_is_presented_and_what_it_lacks_is_said(
    service: TimeTuner,
    gratings: str,
    new_user: NewUser,
    guarded: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user = new_user(Scope.SAMPLE)
    monkeypatch.setenv("TIMETUNER_API_KEY", user.key)
    with TimeTuner(guarded) as client:
        assert client.models.get(gratings).id == gratings
        with pytest.raises(ForbiddenError):
            client.tuning_jobs.create(model=gratings, num_steps=3)
        with pytest.raises(ForbiddenError):
            next(client.audit())
    with TimeTuner(guarded, api_key="tt_wrong") as client, pytest.raises(UnauthenticatedError):
        client.models.get(gratings)
    admin = new_user(Scope.ADMIN)
    with TimeTuner(guarded, api_key=admin.key) as client:
        assert user.id in [entry.actor for entry in client.audit(limit=1)]


def test_health_readiness_and_metrics_are_read(service: TimeTuner) -> None:
    assert service.health().status == "ok"
    assert service.readiness().ready
    assert "timetuner_" in service.metrics()
