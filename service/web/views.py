"""Views of the registry's rows for pages: costs, charts, lines of code."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, joinedload

from service.access.callers import Caller
from service.access.visibility import is_seen_job, is_visible
from service.registry.tables import (
    EvaluationRow,
    JobState,
    Model,
    SampleJob,
    Schedule,
    ScheduleAlias,
    ScheduleStatus,
    TuningJob,
    TuningJobEvent,
    UsageKind,
)
from service.registry.usage import Use
from service.schedules.logic import listed as listed_schedules
from service.schedules.schemas import ScheduleOut, ScheduleQuery
from service.shared.job_requests import ALWAYS, OWN_CLIPPING, TuningJobRequest
from service.shared.pipeline_calls import SIZES, is_pipeline
from service.shared.sampler_facts import SamplersUnknownError, sampler_facts
from service.web.charts import Chart, Series, make_chart
from timetuner_core.catalog import SamplerFacts
from timetuner_core.tuners import TUNERS

MAX_COUNTED = 1000
MAX_EVENTS = 1000
MAX_RIVALS = 200
MAX_TUNED = 200
MAX_PICTURES = 3
MAX_PICTURED = 16  # Images of one request that are shown as one picture.
MAX_LOOKED_AT = 100
MAX_WORDS = 40  # Letters of a call's argument that are shown.
SMOOTHING = 5
USUAL_NUM_STEPS = 5
START_MODEL = "digits8"  # An empty home offers to tune it.
AUTO = "auto"
FORM_SETTING = ("num_steps", "sampler", "guidance_type", "guidance_scale")
METRICS = {
    "teacher_l2": "distance to the teacher",
    "teacher_l2_native": "distance to the teacher, against the pipeline's own scheduler",
    "teacher_l2_untuned": "distance to the teacher, against the untuned sampler",
    "sliced_wasserstein": "sliced Wasserstein distance",
    "frechet": "Fréchet distance",
    "frechet_to_data": "Fréchet distance to the data (decides nothing)",
    "frechet_features": "Fréchet distance of features",
    "wasserstein": "Wasserstein distance",
    "kl": "KL divergence",
}
PIPELINE = "pipeline"
OBJECTIVES = {name: tuner.label for name, tuner in TUNERS.items() if name not in ("grid", PIPELINE)}
DEFAULT_OBJECTIVE = {"": "the default: solver where it applies, else end to end"}
OBJECTIVE_OF_IMPORTED = "imported"


@dataclass(frozen=True)
class ComparisonGroup:
    """Schedules with one sampler, guidance and call are compared with each other. The first two are in people's words.

    Attributes:
        call_key: of the arguments of a pipeline's call, its size among them; empty where they are the defaults.
    """

    sampler: str
    guidance: str
    call_key: str

    @property
    def value(self) -> str:
        return f"{self.sampler} {self.guidance} {self.call_key}".rstrip()


def group_of(schedule: Schedule) -> ComparisonGroup:
    sampler = schedule.sampler + ("" if schedule.eta == 0 else f" η={schedule.eta:g}")
    sampler += "" if schedule.clipping == OWN_CLIPPING else f" {schedule.clipping}"
    return ComparisonGroup(sampler, guidance_of(schedule), schedule.call_key or "")


def guidance_of(schedule: Schedule) -> str:
    """The guidance in a word or two, and for a pipeline the arguments of its call that were given, its size first."""
    scales = " to ".join(f"{scale:g}" for scale in schedule.guidance_scales or [schedule.guidance_scale])
    call = _call_in_words(schedule.call or {})
    if schedule.guidance_type == "uncond":  # A pipeline guides by itself, by a scale of its call.
        return ", ".join(["unguided" if scales == "1" else f"guidance ×{scales}", *call])
    parts = [f"{schedule.guidance_type} ×{scales}"]
    if schedule.guidance_rescale:
        parts.append(f"rescale {schedule.guidance_rescale:g}")
    if schedule.guidance_start > 0 or schedule.guidance_end < 1000:
        parts.append(f"at {schedule.guidance_start:g} to {schedule.guidance_end:g}")
    return ", ".join([*parts, *call])


def _call_in_words(call: dict[str, Any]) -> list[str]:
    """Each argument of a pipeline's call with its value, sizes first. An interval has its ends; a long value is cut."""

    def words(value: Any) -> str:
        return " to ".join(map(str, value)) if isinstance(value, list) else str(value)

    names = [*(name for name in SIZES if name in call), *(name for name in call if name not in SIZES)]
    return [f"{name.replace('_', ' ')} {words(call[name])[:MAX_WORDS]}" for name in names]


def network_calls(schedule: Schedule) -> int | None:
    """Network calls per image, or None if the sampler's package is not installed any more, or not loaded yet."""
    return _calls(schedule, schedule.timesteps)


def untuned_calls(schedule: Schedule, num_steps: int) -> int | None:
    """Network calls per image of a schedule's setting with so many steps, untuned; None where they are not known."""
    return _calls(schedule, [*[1.0] * num_steps, schedule.timesteps[-1]])  # Only the last time decides.


def _calls(schedule: Schedule, timesteps: Sequence[float]) -> int | None:
    facts = _facts(schedule.sampler)
    guides = schedule.guidance_scale != 1 or schedule.guidance_scales is not None
    guided = schedule.guidance_type == "classifier-free" and guides
    return None if facts is None else facts.network_calls(timesteps) * (2 if guided else 1)


def verdict_of(schedule: Schedule) -> str:
    """The verdict of a schedule: accepted, rejected or undecided; or that it was imported."""
    verdict = schedule.evaluation.verdict if schedule.evaluation else None
    return verdict or str(schedule.status)


def playground_query(schedule: Schedule) -> dict[str, Any]:
    """The query that opens the playground with a schedule and its setting."""
    return {"model": schedule.model_id, "schedule": schedule.id, **setting_of(schedule)["fields"]}


def tuner_of(schedule: Schedule) -> str:
    tuner = schedule.provenance.get("tuner")
    objective = tuner.get("objective") if isinstance(tuner, dict) else None
    return objective if isinstance(objective, str) else OBJECTIVE_OF_IMPORTED


def aliases_of(session: Session, schedules: Iterable[Schedule]) -> dict[str, list[str]]:
    """The aliases of schedules, by the schedule's id."""
    ids = [schedule.id for schedule in schedules]
    found: dict[str, list[str]] = {id: [] for id in ids}
    query = select(ScheduleAlias).where(ScheduleAlias.schedule_id.in_(ids)).order_by(ScheduleAlias.name)
    for alias in session.scalars(query):
        found[alias.schedule_id].append(alias.name)
    return found


def count_schedules(session: Session, caller: Caller, model_id: str) -> str:
    """The number of a model's schedules that the caller sees, as text, counted up to `MAX_COUNTED`."""
    seen = select(Schedule.id).where(Schedule.model_id == model_id, is_visible(caller, Schedule))
    some = seen.limit(MAX_COUNTED + 1).subquery()
    count = session.scalar(select(func.count()).select_from(some)) or 0
    return f"{count}" if count <= MAX_COUNTED else f"more than {MAX_COUNTED}"


def stored_pictures(
    session: Session, caller: Caller, model: Model, schedules: Sequence[Schedule]
) -> list[tuple[Schedule, SampleJob]]:
    """The newest stored samples of some schedules that the caller sees, up to `MAX_PICTURES`. Nothing is sampled."""
    if len(model.spec["image_shape"]) != 3:
        return []
    stored = select(SampleJob).where(SampleJob.schedule_id.in_([schedule.id for schedule in schedules]))
    stored = stored.where(SampleJob.state == JobState.SUCCEEDED, SampleJob.parent_id.is_(None))
    seen = stored.where(is_seen_job(caller, SampleJob), SampleJob.num_images <= MAX_PICTURED)
    newest: dict[str | None, SampleJob] = {}
    for job in session.scalars(seen.order_by(SampleJob.id.desc()).limit(MAX_LOOKED_AT)):
        newest.setdefault(job.schedule_id, job)
    return [(schedule, newest[schedule.id]) for schedule in schedules if schedule.id in newest][:MAX_PICTURES]


def request_of(job: TuningJob) -> dict[str, Any]:
    """What a tuning job asks for. Fields that its row lacks, as another version stored it, have their defaults."""
    defaults = TuningJobRequest(model=job.model_id, num_steps=job.request["num_steps"])
    return defaults.model_dump(mode="json") | job.request


def objectives_of(model: Model) -> dict[str, str]:
    """The tuners that fit a model, with a line for people to choose them by."""
    return {"": TUNERS[PIPELINE].label} if is_pipeline(model.spec) else DEFAULT_OBJECTIVE | OBJECTIVES


def usual_setting(model: Model) -> dict[str, Any]:
    """The setting that the forms for tuning and for sampling begin with, where nothing was tuned."""
    default = model.spec.get("call", {}).get("guidance_scale", {}).get("default")
    return {
        "num_steps": USUAL_NUM_STEPS,
        "sampler": "dpmpp_2m" if is_pipeline(model.spec) else "ddim",
        "guidance_type": "uncond",
        "guidance_scale": "1" if default is None else f"{float(default):g}",
    }


def setting_of(schedule: Schedule) -> dict[str, dict[str, Any]]:
    """A schedule's setting: the fields that forms have, and `more`, the others that are not at their defaults.

    A form has one size, and one guidance scale. Of a schedule for an interval, it is the smallest.
    """
    fields = {name: getattr(schedule, name) for name in FORM_SETTING}
    fields["guidance_scale"] = f"{float(schedule.guidance_scale):.10g}"
    sizes = {name: size for name, size in (schedule.call or {}).items() if name in SIZES}
    fields |= {name: size[0] if isinstance(size, list) else size for name, size in sizes.items()}
    defaults = {"eta": 0, **{name: value for name, value in ALWAYS.items() if name != "guidance_scale"}}
    more = {name: float(getattr(schedule, name)) for name in defaults if getattr(schedule, name) != defaults[name]}
    clipping = {} if schedule.clipping == OWN_CLIPPING else {"clipping": schedule.clipping}
    return {"fields": fields, "more": more | clipping}


def tuned_settings(session: Session, caller: Caller, model_id: str) -> list[Schedule]:
    """The best of the newest accepted schedules for each setting of a model, newest first."""
    query = ScheduleQuery(model=model_id, status=ScheduleStatus.ACCEPTED, limit=MAX_TUNED)
    best: dict[tuple[Any, ...], Schedule] = {}
    for schedule in listed_schedules(session, caller, query)[0]:
        key = tuple(getattr(schedule, name) for name in Schedule.KEY)
        if key not in best or (schedule.score or 0.0) < (best[key].score or 0.0):
            best[key] = schedule
    return list(best.values())


def form_fields(model: Model, tuned: Sequence[Schedule], given: dict[str, Any]) -> dict[str, Any]:
    """The values that a form begins with, and the `schedule` that they are of: its id, or `auto`.

    They are what the query gave, and else those of the first tuned schedule, or the usual ones. A query that gives part
    of a setting, and no schedule, means another than the tuned ones.
    """
    begins_tuned = given.get("schedule", AUTO) != AUTO or (tuned and not given.keys() & {*FORM_SETTING, "schedule"})
    fields = usual_setting(model)
    if begins_tuned:
        fields |= setting_of(tuned[0])["fields"]
    few = 1 if is_pipeline(model.spec) else 9 if len(model.spec["image_shape"]) == 3 else 128
    others = dict.fromkeys(("class_labels", "prompt", "negative_prompt", "height", "width"))
    return {"num_images": few, **others, **fields, **given, "schedule": tuned[0].id if begins_tuned else AUTO}


def calls_per_step(sampler: str) -> int | None:
    """Network calls of a step, or None if the sampler's package cannot be loaded, or is not loaded yet."""
    facts = _facts(sampler)
    return None if facts is None else facts.calls_per_step


def _facts(sampler: str) -> SamplerFacts | None:
    try:
        return sampler_facts(sampler)
    except (ValueError, SamplersUnknownError):
        return None


def labels_of(model: Model) -> list[int]:
    """The class labels that a request may name."""
    return [label for label in range(model.spec["num_classes"]) if label != model.spec["null_class_label"]]


def sample_request(schedule: Schedule, model: Model) -> dict[str, Any] | None:
    """The request for a few samples that show a schedule, of all classes in turn; None for pipelines: they cost more,
    and need a prompt."""
    if is_pipeline(model.spec):
        return None
    is_image = len(model.spec["image_shape"]) == 3
    count, labels = 9 if is_image else 128, labels_of(model)
    guided = schedule.guidance_type != "uncond"
    return {
        "model": model.id,
        "sampler": schedule.sampler,
        "num_steps": schedule.num_steps,
        "clipping": None if schedule.clipping == OWN_CLIPPING else schedule.clipping,
        "guidance_type": schedule.guidance_type,
        **{name: float(getattr(schedule, name)) for name in ("eta", *ALWAYS)},
        "class_labels": [labels[k % len(labels)] for k in range(count)] if guided and labels else None,
        "num_images": count,
        "seed": 0,
    }


def schedule_charts(schedule: Schedule) -> list[Chart | None]:
    """Ratios and time grid by step."""
    ratios, times = schedule.t_ratios, schedule.timesteps
    return [ratio_chart(list(enumerate(ratios))), _grid_chart(times, ratios)]


def summary(schedule: Schedule) -> str | None:
    """The gain of a schedule, in a sentence or two, without the verdict's name; None for an imported one."""
    evaluation = ScheduleOut.model_validate(schedule).evaluation
    if evaluation is None:
        return None
    if schedule.status == ScheduleStatus.REJECTED:
        reason = evaluation.reason or "not better than untuned beyond chance, or worse in some respect"
        return f"{reason[0].upper()}{reason[1:]}."
    return evaluation.summary


def rivals_of(session: Session, caller: Caller, schedule: Schedule) -> list[Schedule]:
    """Other schedules of the same setting, with any number of steps, that were measured on the same noises."""
    key = [name for name in Schedule.KEY if name != "num_steps"]
    same = [getattr(Schedule, name) == getattr(schedule, name) for name in key]
    query = select(Schedule).where(*same, is_visible(caller, Schedule), Schedule.id != schedule.id)
    rows = session.scalars(
        query.options(joinedload(Schedule.evaluation)).order_by(Schedule.id.desc()).limit(MAX_RIVALS)
    )
    own = _noises(schedule)
    return [row for row in rows if own is not None and _noises(row) == own]


def _noises(schedule: Schedule) -> tuple[int, int, int] | None:
    """The numbers that decide the noises and the teacher of a schedule's evaluation; None without one."""
    evaluation = schedule.evaluation
    if evaluation is None or evaluation.worth is None:
        return None
    return evaluation.seed, evaluation.teacher_num_steps, evaluation.worth["num_samples"]


def worth_chart(schedule: Schedule, rivals: Sequence[Schedule] = ()) -> Chart | None:
    """The distance to the teacher by network calls: untuned, by the schedule, and by the best other of each tuner."""
    worth, calls = schedule.evaluation.worth if schedule.evaluation else None, network_calls(schedule)
    if worth is None or calls is None:
        return None
    points = [(untuned_calls(schedule, each["num_steps"]), each["teacher_l2"]) for each in worth["untuned"]]
    series = [Series("untuned", [(count, value) for count, value in points if count is not None])]
    series.append(Series("this schedule", [(calls, worth["teacher_l2"])]))
    best: dict[str, dict[int, float]] = {}
    for rival in rivals:
        of_tuner, value = best.setdefault(tuner_of(rival), {}), rival.evaluation.worth["teacher_l2"]  # type: ignore[index, union-attr]
        if (rival_calls := network_calls(rival)) is not None:
            of_tuner[rival_calls] = min(value, of_tuner.get(rival_calls, value))
    series += [Series(f"other by {name}", sorted(of_tuner.items())) for name, of_tuner in sorted(best.items())]
    description = (
        f"Distance to the teacher by network calls per image, of {worth['num_samples']} noises; lower is better."
    )
    return make_chart("Quality against cost", description, "network calls per image", "distance", series, log_y=True)


def ratio_chart(ratios: Sequence[tuple[int, float]]) -> Chart | None:
    untuned = Series("untuned", [(step, 1.0) for step, _ in ratios])
    description = "The ratio that each step's time is multiplied by before the network is told it; 1 is untuned."
    return make_chart("Ratio of each step", description, "step", "ratio", [Series("tuned", ratios), untuned])


def _grid_chart(times: Sequence[float], ratios: Sequence[float]) -> Chart | None:
    told = [(step, time * ratio) for step, (time, ratio) in enumerate(zip(times, ratios, strict=False))]
    series = [Series("time of the sample", list(enumerate(times))), Series("time the network is told", told)]
    description = "Where the sampler is at each step, and the time that the network is told there."
    return make_chart("Time grid", description, "step", "time", series)


def newest_events(session: Session, job: TuningJob) -> list[TuningJobEvent]:
    """The newest `MAX_EVENTS` events of a job, in their order."""
    query = select(TuningJobEvent).where(TuningJobEvent.job_id == job.id).order_by(TuningJobEvent.id.desc())
    return [*session.scalars(query.limit(MAX_EVENTS))][::-1]


def job_charts(job: TuningJob, events: Sequence[TuningJobEvent]) -> list[Chart | None]:
    """The loss by the time since the first of these events, and the current ratios."""
    progress = [event for event in events if event.type == "progress" and event.data.get("loss") is not None]
    seconds = [(event.created_at - events[0].created_at).total_seconds() for event in progress]
    first = next((event.data["loss"] for event in progress if event.data["loss"] > 0), 1.0)
    losses = [event.data["loss"] / first for event in progress]
    measured = Series("as measured", list(zip(seconds, losses, strict=True)), is_faint=True)
    smoothed = Series("smoothed", list(zip(seconds, _smoothed(losses), strict=True)))
    description = "The sum of all steps' losses over time, as a share of the first one measured; lower is better."
    title, label = "Loss", "share of the first loss"
    loss = make_chart(title, description, "seconds", label, [smoothed, measured], log_y=True)
    return [loss, ratio_chart([(step.step_index, step.t_ratio) for step in job.steps])]


def _smoothed(values: Sequence[float]) -> list[float]:
    """A moving average whose weights halve every `SMOOTHING` values."""
    weight, total, averages = 0.0, 0.0, []
    for value in values:
        weight, total = 0.5 ** (1 / SMOOTHING) * weight + 1, 0.5 ** (1 / SMOOTHING) * total + value
        averages.append(total / weight)
    return averages


@dataclass(frozen=True)
class LogEntry:
    """A line of a job's log."""

    time: datetime
    what: str


def job_log(events: Sequence[TuningJobEvent]) -> list[LogEntry]:
    """A job's events as sentences for people; of its progress, only the beginning of each phase."""
    entries, phase = [], None
    for event in events:
        data = event.data
        if event.type == "progress":
            if data.get("phase") not in (None, phase):
                phase = data["phase"]
                entries.append(LogEntry(event.created_at, f"{phase} began"))
            continue
        what = event.type.replace("_", " ")
        if event.type == "started":
            phase = None
            what = f"started by {data.get('worker', 'a worker')}, attempt {data.get('attempt', 1)}"
        entries.append(LogEntry(event.created_at, f"{what}: {data['error']}" if data.get("error") else what))
    return entries


def worker_of(events: Sequence[TuningJobEvent]) -> str | None:
    """The worker that runs or ran the latest attempt."""
    workers = [event.data.get("worker") for event in events if event.type == "started"]
    return workers[-1] if workers else None


def verdicts_of(session: Session, jobs: Iterable[TuningJob]) -> dict[str, str]:
    """The verdicts of the schedules that jobs made, by the job's id."""
    query = (
        select(Schedule.job_id, Schedule.status, EvaluationRow.verdict)
        .outerjoin(EvaluationRow)
        .where(Schedule.job_id.in_([job.id for job in jobs]))
    )
    return {str(job_id): verdict or str(status) for job_id, status, verdict in session.execute(query)}


def usage_chart(days: Mapping[tuple[date, str], Use], today: date) -> Chart | None:
    """Device seconds of each day and kind of job."""
    series = [
        Series(kind, [((day - today).days, use.device_seconds) for (day, of), use in days.items() if of == kind])
        for kind in UsageKind
    ]
    description = "The device seconds of jobs that ended on each day, by kind of job; 0 is today."
    return make_chart("Device time", description, "days from today", "seconds", series)


def figure(schedule: Schedule, metric: str, when: str = "after") -> float | None:
    """One value of a schedule's evaluation, or None if it was not measured."""
    measured = schedule.evaluation.metrics.get(metric) if schedule.evaluation else None
    value = measured and measured.get(when)
    return float(value) if value is not None else None


def comparison_chart(schedules: Sequence[Schedule], metric: str) -> Chart | None:
    """A chart of quality against network calls: the best of each tuner at each cost, and the untuned sampler."""
    best: dict[str, dict[int, float]] = {}
    points: list[tuple[str, int | None, float | None]] = []
    for schedule in schedules:
        calls = network_calls(schedule)
        points.append((tuner_of(schedule), calls, figure(schedule, metric)))
        points.append(("untuned", calls, figure(schedule, metric, "before")))
    for name, calls, value in points:
        if calls is not None and value is not None:
            of_tuner = best.setdefault(name, {})
            of_tuner[calls] = min(value, of_tuner.get(calls, value))
    series = [Series(name, sorted(of_tuner.items())) for name, of_tuner in sorted(best.items())]
    label = METRICS[metric]
    description = f"The lowest {label} of each tuner by network calls per image; lower is better."
    return make_chart("Quality against cost", description, "network calls per image", label, series, log_y=True)
