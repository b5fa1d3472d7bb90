"""`timetuner jobs`: tuning jobs, and sampling jobs by their ids."""

import json
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.connection import Url, connected
from service.cli.options import model_names, whole_id
from service.cli.output import AsJson, Limit, print_facts, print_json, print_table, rounded
from service.client.choices import JobState

if TYPE_CHECKING:
    from service.client import SampleJob, TimeTuner, TuningJob

jobs = typer.Typer(no_args_is_help=True, help="Follow and cancel jobs.")

JobId = Annotated[str, typer.Argument(metavar="ID", help="A job's id, whole or short.")]


@jobs.command(name="list")
def list_(
    state: Annotated[JobState | None, typer.Option(help="Only those in this state.")] = None,
    samples: Annotated[bool, typer.Option("--samples", help="List sampling jobs in place of tuning jobs.")] = False,
    limit: Limit = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List tuning jobs, or sampling jobs, newest first."""
    with connected(url) as client:
        listed: Iterable[Any] = (client.samples if samples else client.tuning_jobs).list(state=state)
        found = list(islice(listed, limit))
        names = {} if as_json else model_names(client)
    if as_json:
        print_json(found)
        return
    what = "images" if samples else "tuner"
    columns = ("id", "model", "steps", what, "state", "schedule", "created")
    rows = (
        (
            job.id,
            names.get(job.model, job.model),
            job.request["num_steps"],
            job.request["num_images"] if samples else job.request["tuner"]["objective"],
            f"{job.state} {job.progress:.0%}" if job.state == "running" else job.state,
            job.schedule,
            job.created_at,
        )
        for job in found
    )
    print_table(columns, rows)


@jobs.command()
def show(job_id: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Show one job, and the state of each step."""
    with connected(url) as client:
        job = _jobs(client, job_id).get(whole_id(client, job_id))
    _show(job, as_json)


@jobs.command()
def cancel(job_id: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Cancel a job. A queued job ends at once, a running one as soon as its worker notices."""
    with connected(url) as client:
        job = _jobs(client, job_id).cancel(whole_id(client, job_id))
    _show(job, as_json)


@jobs.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the job until it is over.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Print the events of a tuning job. With --json, each line is an event."""
    with connected(url) as client:
        for event in client.tuning_jobs.events(whole_id(client, job_id), follow=follow):
            if as_json:
                typer.echo(event.model_dump_json())
            else:
                facts = " ".join(f"{name}={json.dumps(rounded(value))}" for name, value in event.data.items())
                typer.echo(f"{event.created_at:%Y-%m-%dT%H:%M:%SZ} {event.type} {facts}".rstrip())


def _jobs(client: "TimeTuner", job_id: str) -> Any:
    return client.samples if job_id.startswith("smp_") else client.tuning_jobs


def _show(job: "TuningJob | SampleJob", as_json: bool) -> None:
    from service.client import TuningJob

    if as_json:
        print_json(job)
        return
    facts = job.model_dump(exclude={"request", "timesteps", "steps", "phases"})
    if isinstance(job, TuningJob):
        facts["phases"] = ", ".join(f"{phase.name} {phase.done}/{phase.total}" for phase in job.phases) or None
    print_facts(facts | {"request": job.request})
    if isinstance(job, TuningJob) and job.steps:
        columns = ("step", "t_ratio", "iterations", "loss at first", "loss")
        print_table(columns, ((s.step_index, s.t_ratio, s.iterations, s.initial_loss, s.loss) for s in job.steps))
