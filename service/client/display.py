"""Results as notebooks show them: HTML tables, and pictures by matplotlib."""

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from service.client.results import Evaluation, Job, Metric, Model, Resolution, Schedule

DPI = 100


def model_html(model: "Model") -> str:
    """The facts of a model that its users need."""
    spec = model.spec
    facts = {
        "model": f"{model.name} ({model.id})",
        "is": f"a pipeline, {spec.pipeline}"
        if spec.kind == "pipeline"
        else f"a network that predicts {spec.model_type}",
        "images": _sizes(spec.image_shape) if spec.kind == "network" else spec.output or "images",
    }
    if spec.sample_shape != spec.image_shape:
        facts["latents"] = _sizes(spec.sample_shape)
    if spec.num_classes:
        facts["classes"] = str(spec.num_classes)
    if spec.kind == "network":
        facts["guidance"] = ", ".join(spec.guidance_types)
    if spec.num_parameters:
        facts["parameters"] = f"{spec.num_parameters:,}"
    if spec.licence is not None and spec.licence.name is not None:
        facts["licence"] = spec.licence.name
    facts["registered"] = f"{model.created_at:%Y-%m-%d %H:%M %Z}".strip() + (", private" if model.private else "")
    return f"<div>{_table(facts)}</div>"


def job_html(job: "Job") -> str:
    """How far a job is, and what became of it."""
    facts = {"job": job.id, "for": _setting(job.request, job.model), "state": job.state}
    phase, elapsed, remaining = (getattr(job, name, None) for name in ("phase", "elapsed_seconds", "remaining_seconds"))
    if phase and not job.is_over:
        facts["phase"] = str(phase)
    if elapsed is not None:
        facts["time"] = f"{elapsed:.0f} s" + (f", {remaining:.0f} s left" if remaining and not job.is_over else "")
    if job.schedule:
        facts["schedule"] = job.schedule
    if job.error:
        facts["error"] = job.error
    bar = "" if job.is_over else f'<progress max="1" value="{job.progress:.3f}">{job.progress:.0%}</progress>'
    return f"<div>{_table(facts)}{bar}</div>"


def schedule_html(schedule: "Schedule") -> str:
    """A schedule as HTML: its setting, its evaluation and its plot."""
    facts = {
        "schedule": schedule.id,
        "for": _setting(vars(schedule), schedule.model),
        "status": f"{schedule.status}, version {schedule.version}",
        "score": _number(schedule.score),
    }
    picture = base64.b64encode(schedule_png(schedule)).decode()
    evaluation = evaluation_html(schedule.evaluation) if schedule.evaluation else ""
    shown = f'<img alt="ratios and grid against the step" src="data:image/png;base64,{picture}">'
    return f"<div>{_table(facts)}{shown}{evaluation}</div>"


def evaluation_html(evaluation: "Evaluation") -> str:
    """A row for each metric."""
    head = ("metric", "untuned", "tuned", "change", "95 % interval")
    rows = [
        (name, _number(metric.before), _number(metric.after), _number(metric.change), _interval(metric))
        for name, metric in evaluation.metrics.items()
    ]
    caption = (
        f"{evaluation.num_samples} held-out noises, teacher of {evaluation.teacher_num_steps} steps; "
        f"lower is better. {evaluation.summary or evaluation.reason or ''}"
    )
    body = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><tr>{_cells(head, 'th')}</tr>{body}</table>"


def resolution_html(resolution: "Resolution") -> str:
    schedule = schedule_html(resolution.schedule) if resolution.schedule else ""
    return f"<div><p>{escape(resolution.reason)}</p>{schedule}</div>"


def schedule_png(schedule: "Schedule") -> bytes:
    """Above, each step's ratio; below, the time it begins at and the time the network is told."""
    figure = _figure(5, 3.6)
    ratios, grid = figure.subplots(2, 1, sharex=True)
    steps = range(schedule.num_steps)
    marker = "o" if schedule.num_steps <= 50 else ""
    ratios.axhline(1, color="0.8")
    ratios.plot(steps, schedule.t_ratios, marker=marker)
    ratios.set_ylabel("t_ratio")
    told = [t * t_ratio for t, t_ratio in zip(schedule.timesteps, schedule.t_ratios, strict=False)]
    grid.plot(range(schedule.num_steps + 1), schedule.timesteps, marker=marker, label="t")
    grid.plot(steps, told, marker=marker, linestyle="--", label="t × t_ratio")
    grid.set_ylabel("time")
    grid.set_xlabel("step")
    grid.legend(frameon=False)
    return _png(figure)


def evaluation_png(evaluation: "Evaluation") -> bytes:
    """The relative change of each metric with its interval; left of 0 is better."""
    shares = {name: share for name, metric in evaluation.metrics.items() if (share := _relative(metric)) is not None}
    figure = _figure(5, 1 + 0.35 * len(shares))
    axes = figure.subplots()
    axes.axvline(0, color="0.8")
    for row, (change, low, high) in enumerate(shares.values()):
        axes.errorbar(change, row, xerr=[[max(0.0, change - low)], [max(0.0, high - change)]], fmt="o", color="C0")
    axes.set_yticks(range(len(shares)), list(shares))
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.set_xlabel("change by tuning, % (95 % interval)")
    return _png(figure)


def _setting(setting: Mapping[str, Any], model: str) -> str:
    """The setting that a schedule or a job's request is for, on one line; fields that it leaves out are not named."""
    guidance = setting.get("guidance_type") or "uncond"
    if guidance != "uncond":
        scales = setting.get("guidance_scales") or [setting.get("guidance_scale", 1)]
        guidance += " ×" + " to ".join(f"{scale:g}" for scale in scales)
    steps = f"{setting['num_steps']} steps" if setting.get("num_steps") else None
    return ", ".join(part for part in (setting.get("sampler"), steps, guidance, f"model {model}") if part)


def _sizes(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape))


def _relative(metric: "Metric") -> tuple[float, float, float] | None:
    """Change, low and high in percent of the untuned value; None if any is unknown."""
    values = (metric.change, metric.low, metric.high)
    if not metric.before or any(value is None for value in values):
        return None
    change, low, high = (100 * value / abs(metric.before) for value in values if value is not None)
    return change, low, high


def can_draw() -> bool:
    """Whether matplotlib is installed, which comes with `timetuner[diffusers]`."""
    return find_spec("matplotlib") is not None


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # Importing pyplot would choose a backend for the whole process.

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _table(facts: Mapping[str, str]) -> str:
    return (
        "<table>" + "".join(f"<tr><th>{escape(k)}</th>{_cells([v], 'td')}</tr>" for k, v in facts.items()) + "</table>"
    )


def _cells(values: Iterable[Any], tag: str) -> str:
    return "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _interval(metric: "Metric") -> str:
    return "–" if metric.low is None or metric.high is None else f"{metric.low:+.4g} to {metric.high:+.4g}"
