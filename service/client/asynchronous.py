"""The client for asyncio."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self, TypeVar, Unpack

import httpx
from httpx_sse import EventSource
from pydantic import BaseModel, PrivateAttr
from tenacity import AsyncRetrying

from service.client import calls
from service.client.calls import Call
from service.client.choices import ExportFormat, JobState, UnreadyState
from service.client.problems import raise_for
from service.client.requests import (
    ModelFilters,
    ModelSource,
    SampleRequest,
    ScheduleFilters,
    ScheduleImport,
    Setting,
    TuningJobRequest,
    UsageFilters,
)
from service.client.results import (
    Alias,
    AuditEntry,
    Event,
    Health,
    Model,
    ModelRegistrationFields,
    Page,
    Readiness,
    Resolution,
    SampleEvent,
    SampleJobFields,
    Samples,
    Schedule,
    ScheduleExport,
    TuningGroup,
    TuningJobFields,
    Usage,
)
from service.client.sending import MAX_ATTEMPTS, http_options, retries, telling_unreachable
from service.client.waiting import MAX_POLL_SECONDS, AsyncRefresh, J, Patience, Progress, showing

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class AsyncTimeTuner:
    """A service, by its URL. Close it, or use it as a context manager.

    Args:
        url: default: TIMETUNER_URL, else http://127.0.0.1:8000. api_key: default: TIMETUNER_API_KEY.
        timeout: seconds that an answer may take; a model's upload may take 20 times as long.
        max_attempts: of each request, while that may help.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        self._http = httpx.AsyncClient(**http_options(url, api_key, timeout))
        self._timeout = timeout
        self._max_attempts = max_attempts
        self.models = AsyncModels(self)
        self.tuning_jobs = AsyncTuningJobs(self)
        self.tuning_groups = AsyncTuningGroups(self)
        self.schedules = AsyncSchedules(self)
        self.aliases = AsyncAliases(self)
        self.samples = AsyncSampleJobs(self)

    @property
    def url(self) -> str:
        return str(self._http.base_url).rstrip("/")

    def audit(self, *, limit: int = 50) -> AsyncIterator[AuditEntry]:
        """The audit log, newest first. It needs a key with the scope admin."""
        return self.pages(calls.list_audit(limit))

    def usage(self, *, limit: int = 50, **filters: Unpack[UsageFilters]) -> AsyncIterator[Usage]:
        """The use of networks and devices by day, key, model and kind, the newest day first; `limit` is a page's.

        Without the scope admin, it is that of the own key.
        """
        return self.pages(calls.list_usage(filters, limit))

    async def health(self) -> Health:
        """Whether the API answers."""
        return await self.send(calls.health())

    async def readiness(self) -> Readiness:
        """Whether requests can be served, and what is wrong if not."""
        return await self.send(calls.readiness())

    async def metrics(self) -> str:
        """The API's metrics, in Prometheus's text format."""
        return await self.send(calls.metrics())

    async def send(self, call: Call[T]) -> T:
        """Raises: ApiError, UnreachableError."""
        result: T = await AsyncRetrying(**retries(call, self._max_attempts))(self._attempt, call)
        return result

    async def pages(self, call: Call[Page[T]]) -> AsyncIterator[T]:
        """All items, page by page as they are wanted."""
        page = await self.send(call)
        for item in page.items:
            yield item
        while page.next_cursor is not None:
            page = await self.send(call.after(page.next_cursor))
            for item in page.items:
                yield item

    async def stream(self, call: Call[Any], event: type[M]) -> AsyncIterator[M]:
        """Server-sent events, as they come."""
        with telling_unreachable(self._http.base_url):
            async with self._http.stream(call.method, call.path, headers={"Accept": "text/event-stream"}) as response:
                if not response.is_success:
                    await response.aread()
                    raise_for(response)
                async for sent in EventSource(response).aiter_sse():
                    yield event.model_validate(calls.sent_event(sent))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _attempt(self, call: Call[T]) -> T:
        with telling_unreachable(self._http.base_url), call.content() as content:
            response = await self._http.request(
                call.method, call.path, timeout=self._timeout * call.slowness, **content
            )
        return call.result(response)


class AsyncModels:
    """`client.models`"""

    def __init__(self, client: AsyncTimeTuner) -> None:
        self._client = client

    async def create(self, **source: Unpack[ModelSource]) -> Model:
        """Register a model: a `builtin` one, or an `archive`, a diffusers-format folder or a zip, tar or tar.gz of one.

        A whole pipeline may also be at a `path` below the operator's `MODELS_DIR`, or in the workers' Hugging Face
        cache, as `hub` and `revision`. It is served and tuned in its `dtype`; by default, in that of its files.

        It waits until a worker has described the model. Only this client's API key, and admins, see a `private` one.
        Raises: ApiError, if the model is refused.
        """
        made = await self._client.send(calls.register_model(source))
        return made if isinstance(made, Model) else await self._bound(made).wait()

    async def submit(self, **source: Unpack[ModelSource]) -> "AsyncModelRegistration":
        """Hand in a model that is not built in, as `create` does; `wait()` for the model."""
        return self._bound(await self._client.send(calls.submit_model(source)))

    def list(self, *, limit: int = 50, **filters: Unpack[ModelFilters]) -> AsyncIterator[Model]:
        """All models that are ready, match, and that the key may see, newest first or sorted; `limit` is a page's."""
        return self._client.pages(calls.list_models(limit, filters))

    async def registrations(self, *, state: UnreadyState, limit: int = 50) -> "AsyncIterator[AsyncModelRegistration]":
        """The models that were handed in and are in this state, newest first; `limit` is a page's."""
        async for fields in self._client.pages(calls.list_model_registrations(state, limit)):
            yield self._bound(fields)

    async def get(self, model: str) -> Model:
        """A model. Raises: ApiError, if it was refused; NotReadyError, if no worker has described it yet."""
        return (await self.registration(model)).model()

    async def registration(self, model: str) -> "AsyncModelRegistration":
        """A model that was handed in, ready or not."""
        return self._bound(await self._client.send(calls.get_model(model)))

    async def rename(self, model: str, name: str) -> Model:
        """Give a model that is ready another name. Its id stays the same."""
        return await self._client.send(calls.rename_model(model, name))

    async def delete(self, model: str, *, cascade: bool = False) -> None:
        """Delete a model and its files, or one that was refused. Jobs that are over and stored samples remain.

        Raises: ApiError, if jobs use it that are not over, or if it has schedules and `cascade` is not set.
        """
        await self._client.send(calls.delete_model(model, cascade))

    def _bound(self, fields: ModelRegistrationFields) -> "AsyncModelRegistration":
        registration = AsyncModelRegistration.model_construct(**dict(fields))
        registration._models = self
        return registration


class AsyncModelRegistration(ModelRegistrationFields):
    """A model that was handed in, as it was when it was asked for."""

    _models: AsyncModels = PrivateAttr()

    async def refresh(self) -> "AsyncModelRegistration":
        """The registration as it is now."""
        return await self._models.registration(self.id)

    async def wait(self, *, timeout: float | None = None) -> Model:
        """The model once it is ready.

        Raises:
            ApiError: it was refused. WaitTimeoutError: neither ready nor refused after `timeout` seconds.
        """
        patience, registration = Patience(timeout), self
        while not registration.is_over:
            await asyncio.sleep(patience.next_pause(registration))
            registration = await registration.refresh()
        return registration.model()


class AsyncSchedules:
    """`client.schedules`"""

    def __init__(self, client: AsyncTimeTuner) -> None:
        self._client = client

    def list(self, *, limit: int = 50, **filters: Unpack[ScheduleFilters]) -> AsyncIterator[Schedule]:
        """All schedules that match, newest first or sorted; `limit` is a page's."""
        return self._client.pages(calls.list_schedules(filters, limit))

    async def get(self, schedule: str) -> Schedule:
        return await self._client.send(calls.get_schedule(schedule))

    async def resolve(self, **setting: Unpack[Setting]) -> Resolution:
        """The schedule that `schedule="auto"` samples with, and why."""
        return await self._client.send(calls.resolve_schedule(setting))

    async def import_(self, **schedule: Unpack[ScheduleImport]) -> Schedule:
        """Store a schedule made elsewhere."""
        return await self._client.send(calls.import_schedule(schedule))

    async def export(self, schedule: str, format: ExportFormat = "json", *, lossy: bool = False) -> ScheduleExport:
        """A schedule as a file for another program.

        Args:
            lossy: export the time grid although the format has no place for ratios or a learned solver.
        """
        return await self._client.send(calls.export_schedule(schedule, format, lossy))

    async def delete(self, schedule: str) -> None:
        """Delete a schedule that no alias and no sampling job names."""
        await self._client.send(calls.delete_schedule(schedule))


class AsyncAliases:
    """`client.aliases`: names of a model's schedules."""

    def __init__(self, client: AsyncTimeTuner) -> None:
        self._client = client

    async def list(self, model: str) -> list[Alias]:
        page = await self._client.send(calls.list_aliases(model))
        return page.items

    async def set(self, model: str, name: str, schedule: str) -> Alias:
        """Give one of the model's schedules a name, or move the name to it."""
        return await self._client.send(calls.set_alias(model, name, schedule))

    async def delete(self, model: str, name: str) -> None:
        await self._client.send(calls.delete_alias(model, name))


class AsyncTuningJobs:
    """`client.tuning_jobs`"""

    def __init__(self, client: AsyncTimeTuner) -> None:
        self._client = client

    async def create(self, **request: Unpack[TuningJobRequest]) -> "AsyncTuningJob":
        """Queue a tuning job; `wait()` for it."""
        return self._bound(await self._client.send(calls.submit_tuning_job(request)))

    async def list(self, *, state: JobState | None = None, limit: int = 50) -> "AsyncIterator[AsyncTuningJob]":
        """The caller's jobs, newest first; `limit` is a page's."""
        async for fields in self._client.pages(calls.list_tuning_jobs(state, limit)):
            yield self._bound(fields)

    async def get(self, job: str) -> "AsyncTuningJob":
        """The job, with the state of each step."""
        return self._bound(await self._client.send(calls.get_tuning_job(job)))

    async def cancel(self, job: str) -> "AsyncTuningJob":
        return self._bound(await self._client.send(calls.cancel_tuning_job(job)))

    async def events(self, job: str, *, after: int = 0, follow: bool = False) -> AsyncIterator[Event]:
        """The events of a job after the event of that id. With `follow`, until the job is over."""
        while True:
            # The job is asked for first, as it may end between the two requests.
            now = await self.get(job) if follow else None
            page = await self._client.send(calls.list_tuning_job_events(job, after))
            for event in page.items:
                yield event
            if page.items:
                after = page.items[-1].id
            elif now is None or now.is_over:
                return
            else:
                await asyncio.sleep(MAX_POLL_SECONDS)

    def _bound(self, fields: TuningJobFields) -> "AsyncTuningJob":
        job = AsyncTuningJob.model_construct(**dict(fields))
        job._jobs = self
        return job


class AsyncTuningJob(TuningJobFields):
    """A tuning job as it was when it was asked for."""

    _jobs: AsyncTuningJobs = PrivateAttr()

    async def refresh(self) -> "AsyncTuningJob":
        """The job as it is now."""
        return await self._jobs.get(self.id)

    async def wait(
        self, *, progress: "Progress[AsyncTuningJob]" = False, timeout: float | None = None
    ) -> "AsyncTuningJob":
        """The job once it has succeeded.

        Args:
            progress: True shows a bar; a function is called with the job at each look.

        Raises:
            JobFailedError: it failed or was cancelled. WaitTimeoutError: not over after `timeout` seconds.
        """
        return await _wait(self, self.refresh, progress, timeout)

    async def cancel(self) -> "AsyncTuningJob":
        return await self._jobs.cancel(self.id)

    def events(self, *, follow: bool = False) -> AsyncIterator[Event]:
        """The events of the job. With `follow`, until the job is over."""
        return self._jobs.events(self.id, follow=follow)


class AsyncTuningGroups:
    """`client.tuning_groups`"""

    def __init__(self, client: AsyncTimeTuner) -> None:
        self._client = client

    async def create(self, jobs: Sequence[TuningJobRequest], *, dry_run: bool = False) -> TuningGroup:
        """Queue several tuning jobs, or none of them. With `dry_run`, only check and price them."""
        return await self._client.send(calls.submit_tuning_group(jobs, dry_run))

    async def get(self, group: str) -> TuningGroup:
        """The jobs of a group as they are now."""
        return await self._client.send(calls.get_tuning_group(group))


class AsyncSampleJobs:
    """`client.samples`"""

    def __init__(self, client: AsyncTimeTuner) -> None:
        self._client = client

    async def create(
        self,
        *,
        progress: "Progress[AsyncSampleJob]" = False,
        timeout: float | None = None,
        **request: Unpack[SampleRequest],
    ) -> Samples:
        """Sample, and wait for it, `timeout` seconds at most if it takes long. Raises: as `AsyncSampleJob.wait`."""
        made = await self._client.send(calls.sample(request))
        if isinstance(made, Samples):
            return made
        return await self._bound(made).wait(progress=progress, timeout=timeout)

    async def submit(self, **request: Unpack[SampleRequest]) -> "AsyncSampleJob":
        """Queue a sampling job; `wait()` for it. Those who wait in `create` are served first."""
        return self._bound(await self._client.send(calls.submit_samples(request)))

    async def list(
        self,
        *,
        state: JobState | None = None,
        model: str | None = None,
        schedule: str | None = None,
        limit: int = 50,
    ) -> "AsyncIterator[AsyncSampleJob]":
        """The caller's jobs, newest first; `model` and `schedule` are ids, and `limit` is a page's."""
        async for fields in self._client.pages(calls.list_sample_jobs(state, model, schedule, limit)):
            yield self._bound(fields)

    async def get(self, job: str) -> "AsyncSampleJob":
        return self._bound(await self._client.send(calls.get_sample_job(job)))

    async def cancel(self, job: str) -> "AsyncSampleJob":
        return self._bound(await self._client.send(calls.cancel_sample_job(job)))

    async def content(self, job: str) -> Samples:
        """The samples of a job that is over. They can be read repeatedly."""
        return await self._client.send(calls.get_sample_content(job))

    def events(self, job: str) -> AsyncIterator[SampleEvent]:
        """The job as it is, its steps as they are done, and its end."""
        return self._client.stream(calls.follow_sample_job(job), SampleEvent)

    def _bound(self, fields: SampleJobFields) -> "AsyncSampleJob":
        job = AsyncSampleJob.model_construct(**dict(fields))
        job._jobs = self
        return job


class AsyncSampleJob(SampleJobFields):
    """A sampling job as it was when it was asked for."""

    _jobs: AsyncSampleJobs = PrivateAttr()

    async def refresh(self) -> "AsyncSampleJob":
        """The job as it is now."""
        return await self._jobs.get(self.id)

    async def wait(self, *, progress: "Progress[AsyncSampleJob]" = False, timeout: float | None = None) -> Samples:
        """The samples. Raises: the errors of `AsyncTuningJob.wait`."""
        job = await _wait(self, self.refresh, progress, timeout)
        return await self._jobs.content(job.id)

    async def cancel(self) -> "AsyncSampleJob":
        return await self._jobs.cancel(self.id)

    def events(self) -> AsyncIterator[SampleEvent]:
        """The job as it is, its steps as they are done, and its end."""
        return self._jobs.events(self.id)


async def _wait(job: J, refresh: AsyncRefresh[J], progress: "Progress[J]", timeout: float | None) -> J:
    patience = Patience(timeout)
    with showing(progress, job) as show:
        show(job)
        while not job.is_over:
            await asyncio.sleep(patience.next_pause(job))
            job = await refresh()
            show(job)
    job.check()
    return job
