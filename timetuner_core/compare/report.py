"""A comparison as files: `results.csv`, `results.md`, pictures, and `report.html`, which needs no other file."""

import base64
import dataclasses
import platform
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from timetuner_core.compare import Comparison, Group, PlanError, plots
from timetuner_core.compare.tables import Table, by_group, group_table, summary_table, to_csv, to_markdown

TEMPLATES = Path(__file__).parent / "templates"
OURS = re.compile(r"results\.(csv|md)|report\.html|(quality|ratios|trajectories)-.*\.png")


def check_folder(folder: Path) -> None:
    """Raises PlanError: `write` would not put a report there."""
    others = [path.name for path in folder.iterdir() if not OURS.fullmatch(path.name)] if folder.is_dir() else []
    if others or (folder.exists() and not folder.is_dir()):
        accepted = "a folder that is new, empty, or holds an earlier comparison and nothing else"
        raise PlanError("out", str(folder), accepted)


def write(comparison: Comparison, folder: Path, command: str) -> None:
    """All files at once, in place of an earlier report's: a reader finds the one or the other, whole.

    Args:
        command: that made it, to be shown.

    Raises:
        PlanError: see `check_folder`.
    """
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        for name, content in files(comparison, command).items():
            (new / name).write_bytes(content)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


def files(comparison: Comparison, command: str) -> dict[str, bytes]:
    """Content by name."""
    tables = {group: group_table(comparison, group, outcomes) for group, outcomes in by_group(comparison).items()}
    summary, facts = summary_table(comparison), _facts(comparison, command)
    pictures = _pictures(comparison)
    texts = {
        "results.csv": to_csv(comparison.outcomes),
        "results.md": _markdown(facts, summary, list(tables.values())),
        "report.html": _html(facts, summary, tables, pictures),
    }
    return {name: text.encode() for name, text in texts.items()} | {
        name: png for of_group in pictures.values() for name, png in of_group.items()
    }


def _pictures(comparison: Comparison) -> dict[Group, dict[str, bytes]]:
    """The pictures by group and file name."""
    pictures: dict[Group, dict[str, bytes]] = {}
    for number, (group, outcomes) in enumerate(by_group(comparison).items(), start=1):
        if all(outcome.evaluation is None for outcome in outcomes):
            continue
        name = f"{number:02}-{_slug(str(group))}.png"
        pictures[group] = {
            f"quality-{name}": plots.quality(group, outcomes),
            f"ratios-{name}": plots.ratios(group, outcomes),
        }
        if group in comparison.trajectories:
            pictures[group][f"trajectories-{name}"] = plots.trajectories(group, comparison.trajectories[group])
    return pictures


def _facts(comparison: Comparison, command: str) -> dict[str, str]:
    plan = comparison.plan
    effort = ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(plan.effort).items())
    packages = ", ".join(f"{name} {version(name)}" for name in ("timetuner", "torch", "numpy", "scipy"))
    return {
        "command": command,
        "seed": str(plan.seed),
        "held-out samples": str(plan.num_samples),
        "effort": effort,
        "versions": f"{packages}, Python {platform.python_version()}",
        "took": f"{comparison.seconds / 60:.1f} minutes in {comparison.jobs} processes",
    }


def _markdown(facts: dict[str, str], summary: Table, tables: list[Table]) -> str:
    lines = [f"- {name}: {f'`{text}`' if name == 'command' else text}" for name, text in facts.items()]
    parts = ["# Schedules compared\n", "\n".join(lines) + "\n", *map(to_markdown, [summary, *tables])]
    return "\n".join(parts)


def _html(
    facts: dict[str, str], summary: Table, tables: dict[Group, Table], pictures: dict[Group, dict[str, bytes]]
) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    sections: list[dict[str, Any]] = []
    for group, table in tables.items():
        images = {
            name.partition("-")[0]: base64.b64encode(png).decode() for name, png in pictures.get(group, {}).items()
        }
        sections.append({"id": _slug(str(group)), "table": table, "images": images})
    return environment.get_template("report.html.j2").render(facts=facts, summary=summary, sections=sections)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
