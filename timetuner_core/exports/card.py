"""The model card of a schedule: Markdown with a YAML header, as model hubs show it. Nothing here needs PyTorch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]

PAPER = (
    "https://openaccess.thecvf.com/content/CVPR2024/papers/"
    "Xia_Towards_More_Accurate_Diffusion_Model_Acceleration_with_A_Timestep_Tuner_CVPR_2024_paper.pdf"
)
UNKNOWN_LICENCE = "unknown: ask the base model's authors"


def model_card(schedule: Json, model: Json, not_carried: Sequence[str] = ()) -> str:
    """The card of a schedule.

    Args:
        schedule: as the service's API gives it, with its `evaluation` and `provenance`.
        model: `name`, `content_hash`, `spec` and `source` of its model.
        not_carried: what the export beside the card cannot carry, one sentence for each.
    """
    parts = [
        _header(model),
        f"# {schedule['num_steps']} tuned steps for {_code(model['name'])}",
        f"A [TimeTuner]({PAPER}) schedule: a time grid, a ratio of the told time for each step "
        "and, where one was learned, a solver. The base model's weights are unchanged and are not part of it.",
        _facts(schedule, model),
        "## Evaluation",
        _evaluation(schedule),
        "## How it was tuned",
        _tuning(schedule["provenance"]),
        "## Usage",
        _usage(schedule),
        "## What it does not carry",
        _bullets([*guidance_notes(schedule), *not_carried]),
    ]
    return "\n\n".join(parts) + "\n"


def guidance_notes(schedule: Json) -> list[str]:
    """A sentence on what the caller has to do about guidance, which no export carries."""
    notes = []
    scale = schedule.get("guidance_scale")
    if schedule.get("guidance_type", "uncond") != "uncond":
        how = f"{schedule['guidance_type']} guidance of scale {_scales(schedule)}"
        notes.append(f"Guidance is the caller's: it was tuned with {how}.")
    elif scale is not None and _scales(schedule) != "1":
        notes.append(f"Guidance is the caller's: it was tuned with guidance_scale={_scales(schedule)}.")
    if schedule.get("guidance_rescale"):
        notes.append(f"guidance_rescale={schedule['guidance_rescale']:g} is the caller's.")
    start, end = schedule.get("guidance_start"), schedule.get("guidance_end")
    if schedule.get("guidance_type", "uncond") != "uncond" and start is not None and end is not None:
        times = schedule["timesteps"][:-1]
        if any(not start <= t <= end for t in times):
            notes.append(f"Guidance at times {start:g} to {end:g} only is the caller's.")
    return notes


def _header(model: Json) -> str:
    # A JSON text is a YAML scalar, whatever characters the names have.
    source = model.get("source", {})
    base = source.get("hub") or model["name"]
    licence = _licence(model)
    lines = [
        f"license: {json.dumps(licence or 'unknown')}",
        f"base_model: {json.dumps(base)}",
        "library_name: diffusers",
        "tags: [timetuner, few-step]",
    ]
    return "\n".join(["---", *lines, "---"])


def _licence(model: Json) -> str | None:
    licence = model["spec"].get("licence") or {}
    name: str | None = licence.get("name")
    return name


def _facts(schedule: Json, model: Json) -> str:
    licence = _licence(model)
    source = model.get("source", {})
    rows = {
        "base model": _code(source.get("hub") or model["name"]),
        "revision": _code(source["revision"]) if source.get("revision") else None,
        "content hash": _code(model["content_hash"]),
        "licence of the base model": UNKNOWN_LICENCE if licence is None else _code(licence),
        "steps": f"{schedule['num_steps']}",
        "sampler": _code(schedule["sampler"]) + (", its coefficients learned" if schedule.get("solver_table") else ""),
        "guidance": _guidance(schedule),
        "arguments of the call": _code(json.dumps(schedule["call"], sort_keys=True)) if schedule.get("call") else None,
        "schedule": f"{_code(schedule['id'])}, version {schedule['version']}, {schedule['status']}",
    }
    return _table(("", ""), [(name, value) for name, value in rows.items() if value is not None])


def _guidance(schedule: Json) -> str:
    if schedule["guidance_type"] == "uncond" and _scales(schedule) == "1":
        return "none"
    return f"{schedule['guidance_type']}, scale {_scales(schedule)}"


def _scales(schedule: Json) -> str:
    """The guidance scale, or the interval of scales that the schedule serves."""
    scales = schedule.get("guidance_scales") or [schedule["guidance_scale"]]
    return " to ".join(f"{scale:g}" for scale in scales)


def _evaluation(schedule: Json) -> str:
    evaluation = schedule.get("evaluation")
    if evaluation is None:
        return "None: the schedule was imported."
    verdict, reason = evaluation.get("verdict") or schedule["status"], evaluation.get("reason") or "no reason stored"
    at = "" if evaluation.get("guidance_scale") is None else f" The table is of scale {evaluation['guidance_scale']:g}."
    text = (
        f"Verdict: **{verdict}** ({reason}), on {evaluation['num_samples']} held-out noises, "
        f"against a teacher of {evaluation['teacher_num_steps']} steps, "
        f"seed {evaluation['seed']}. Lower is better; the interval of the change is of 95 %.{at}"
    )
    rows = [
        (name, *(_number(metric.get(field)) for field in ("before", "after", "low", "high")))
        for name, metric in evaluation["metrics"].items()
    ]
    return f"{text}\n\n" + _table(("metric", "before", "after", "change from", "to"), rows)


def _tuning(provenance: Json) -> str:
    # An imported schedule's provenance is text of whoever imported it.
    values = {name: _prompts(value) if name == "prompts" else _json(value) for name, value in provenance.items()}
    rows = [(_code(name), _code(value)) for name, value in values.items()]
    return _table(("", ""), rows) if rows else "Unknown."


def _prompts(prompts: Any) -> str:
    """How many prompts there were, and a digest of them: they may be private, and long."""
    if not isinstance(prompts, list):
        return _json(prompts)
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return f"{len(prompts)} prompts, sha256 {digest}"


def _usage(schedule: Json) -> str:
    lines = [
        "import timetuner_core  # pip install timetuner[diffusers]",
        "from timetuner_core.integrations.diffusers import TimeTunerScheduler",
        'pipeline.scheduler = TimeTunerScheduler.from_pretrained("this-folder", subfolder="scheduler")',
        f"images = pipeline(..., num_inference_steps={schedule['num_steps']}).images",
    ]
    return "\n".join(["With the diffusers export, for a `pipeline` of the base model:", "", "```python", *lines, "```"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences) if sentences else "Nothing is left out."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _code(text: str) -> str:
    """A text of others as code, which can hold no markup and does not end a table's cell."""
    plain = " ".join(text.replace("`", "'").replace("|", "/").split())
    return f"`{plain}`"
