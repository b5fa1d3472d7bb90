"""The client with a real service: what one does with it, from a model to images."""

import asyncio
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import DDPMScheduler
from PIL import Image

from service.client import (
    AsyncTimeTuner,
    ConflictError,
    ForbiddenError,
    InvalidError,
    JobFailedError,
    NoScheduleError,
    NotFoundError,
    Schedule,
    TimeTuner,
    TuningJob,
    UnauthenticatedError,
    WaitTimeoutError,
)
from service.registry.keys import Scope
from tests.client.conftest import quick
from tests.keys import NewUser
from tests.stack import own_digits8
from timetuner_core.integrations.diffusers import TimeTunerScheduler
from timetuner_core.models.loading import BUNDLED

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
    # The service may have hundreds of jobs of other tests, so pages are fetched until the job is found.
    assert any(job.id == schedule.job for job in service.tuning_jobs.list(state="succeeded", limit=1))
    assert gratings in [model.id for model in service.models.list(limit=1)]


def test_an_imported_schedule_is_the_same_and_can_be_named_and_deleted(service: TimeTuner, schedule: Schedule) -> None:
    copy = service.schedules.import_(**schedule.to_import())
    kept = {"timesteps", "t_ratios", "provenance", "sampler", "num_steps", "guidance_type", "guidance_end", "model"}
    assert copy.model_dump(include=kept) == schedule.model_dump(include=kept)
    assert (copy.status, copy.evaluation) == ("imported", None)
    service.aliases.set(copy.model, "of-clients", copy.id)
    assert {alias.name: alias.schedule for alias in service.aliases.list(copy.model)}["of-clients"] == copy.id
    with pytest.raises(ConflictError, match="accepted: one without any"):
        service.schedules.delete(copy.id)
    service.aliases.delete(copy.model, "of-clients")
    service.schedules.delete(copy.id)
    with pytest.raises(NotFoundError, match=f"404 Not Found: no schedule '{copy.id}'"):
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


def test_samples_that_are_no_images_are_arrays_alone(service: TimeTuner) -> None:
    ring = service.models.create(builtin="mixture-ring").id
    samples = service.samples.create(model=ring, num_steps=2)
    assert samples.schedule is None
    assert samples._repr_png_() is None
    with pytest.raises(ValueError, match="are no images"):
        samples.to_png()


def test_a_folder_is_uploaded_as_an_archive(service: TimeTuner, tmp_path: Path) -> None:
    model = service.models.create(archive=own_digits8(tmp_path), name="my digits")
    assert (model.name, model.spec.num_classes) == ("my digits", 10)
    assert service.models.get(model.id) == model
    (tmp_path / "model.zip").write_bytes(b"no archive")
    with pytest.raises(InvalidError, match="422 Unprocessable") as caught:
        service.models.create(archive=tmp_path / "model.zip")
    assert caught.value.request_id
    service.models.delete(model.id)


def test_a_schedule_becomes_a_scheduler_of_diffusers(service: TimeTuner, schedule: Schedule) -> None:
    folder = BUNDLED / "digits8"
    pipeline = SimpleNamespace(scheduler=DDPMScheduler.from_pretrained(folder, subfolder="scheduler"))
    scheduler = schedule.to_diffusers(pipeline)
    assert isinstance(scheduler, TimeTunerScheduler)
    assert scheduler.config["t_ratios"] == schedule.t_ratios
    with pytest.raises(NoScheduleError, match="no accepted schedule for this setting"):
        service.schedules.resolve(model=schedule.model, num_steps=77).to_diffusers(pipeline)


def test_a_refusal_says_in_one_line_which_field_is_wrong_and_what_is_accepted(
    service: TimeTuner, gratings: str
) -> None:
    with pytest.raises(InvalidError) as caught:
        service.tuning_jobs.create(model=gratings, num_steps=0)
    assert str(caught.value).startswith("422 Unprocessable")
    assert "num_steps: Input should be greater than or equal to 1 (given: 0)" in str(caught.value)
    assert (caught.value.status, caught.value.errors[0].loc) == (422, ["body", "num_steps"])
    with pytest.raises(InvalidError, match="eta is 1; accepted: 0 for the sampler 'euler'"):
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
        with pytest.raises(ForbiddenError, match="tune"):
            client.tuning_jobs.create(model=gratings, num_steps=3)
        with pytest.raises(ForbiddenError, match="admin"):
            next(client.audit())
    with TimeTuner(guarded, api_key="tt_wrong") as client, pytest.raises(UnauthenticatedError, match="a valid API key"):
        client.models.get(gratings)
    admin = new_user(Scope.ADMIN)
    with TimeTuner(guarded, api_key=admin.key) as client:
        assert user.id in [entry.actor for entry in client.audit(limit=1)]


def test_health_readiness_and_metrics_are_read(service: TimeTuner) -> None:
    assert service.health().status == "ok"
    assert service.readiness().ready
    assert "timetuner_" in service.metrics()


def test_all_of_it_awaits_as_well(service: TimeTuner, gratings: str, schedule: Schedule, tmp_path: Path) -> None:
    async def use() -> None:
        async with AsyncTimeTuner(service.url) as client:
            jobs = [await client.tuning_jobs.create(**quick(gratings, steps)) for steps in (2, 4)]
            first, second = await asyncio.gather(*(job.wait() for job in jobs))
            assert [len(first.steps), len(second.steps)] == [2, 4]
            assert [event.type async for event in first.events(follow=True)][-1] == "succeeded"
            listed = [job.id async for job in client.tuning_jobs.list(limit=1)]
            assert listed[:2] == [second.id, first.id]
            assert schedule.id in [each.id async for each in client.schedules.list(model=gratings, limit=1)]
            samples = await client.samples.create(model=gratings, num_steps=3, schedule=schedule.id)
            assert samples.schedule == schedule.id
            job = await client.samples.submit(model=gratings, num_steps=3, schedule=schedule.id)
            assert np.array_equal((await job.wait()).array, samples.array)
            assert [event.type async for event in job.events()][-1] == "end"
            model = await client.models.create(archive=own_digits8(tmp_path), name="by asyncio")
            await client.models.delete(model.id)
            with pytest.raises(NotFoundError):
                await client.models.get(model.id)

    asyncio.run(use())
