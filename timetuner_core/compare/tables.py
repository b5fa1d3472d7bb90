"""A comparison's figures as tables."""

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from timetuner_core.compare import BASELINE, METRICS, Comparison, Group, Outcome

COLUMNS = (
    *("model", "guidance", "sampler", "num_steps", "nfe", "entrant", "verdict", "reason"),
    *(f"{metric}{part}" for metric in METRICS for part in ("", "_change_low", "_change_high")),
    *("tuning_calls", "tuning_seconds", "timesteps", "t_ratios", "solver_table"),
)


METRIC_LABELS = {
    "teacher_l2": "Distance to the teacher",
    "sliced_wasserstein": "Sliced Wasserstein distance to the data",
    "frechet": "Fréchet distance to the data, in pixels",
    "frechet_features": "Fréchet distance to the data, in a classifier's features",
}


@dataclass(frozen=True)
class Figure:
    """A number in a table's cell, as text; is_best: the lowest of its column."""

    text: str
    is_best: bool = False


@dataclass(frozen=True)
class Cell:
    """An entrant's entry in one place of a table; one that is not accepted is marked."""

    figures: tuple[Figure, ...]
    is_turned_down: bool = False


@dataclass(frozen=True)
class Table:
    """Rows by entrant. notes: of entrants that do not apply, and why."""

    title: str
    caption: str
    header: tuple[str, ...]
    rows: dict[str, list[Cell]]
    notes: tuple[str, ...] = ()


def metrics_of(outcomes: list[Outcome]) -> tuple[str, str]:
    """The two metrics to show of a group: the distance to the teacher, or, where noise is added on the way so that no
    sample is meant to be the teacher's, sliced Wasserstein; and the Fréchet distance, of features if there are any."""
    evaluations = [outcome.evaluation for outcome in outcomes if outcome.evaluation is not None]
    has_features = any("frechet_features" in evaluation.metrics for evaluation in evaluations)
    adds_noise = any(evaluation.adds_noise for evaluation in evaluations)
    frechet = "frechet_features" if has_features else "frechet"
    return "sliced_wasserstein" if adds_noise else "teacher_l2", frechet


def by_group(comparison: Comparison) -> dict[Group, list[Outcome]]:
    groups: dict[Group, list[Outcome]] = {group: [] for group in comparison.plan.groups}
    for outcome in comparison.outcomes:
        groups[outcome.setting.group].append(outcome)
    return groups


def group_table(comparison: Comparison, group: Group, outcomes: list[Outcome]) -> Table:
    """Entrants against numbers of steps, by `metrics_of` the group."""
    metrics = metrics_of(outcomes)
    cells = {(outcome.entrant, outcome.setting.num_steps): outcome for outcome in outcomes}
    best = {
        (num_steps, metric): _lowest(o.figure(metric) for o in outcomes if o.setting.num_steps == num_steps)
        for num_steps in comparison.plan.num_steps
        for metric in metrics
    }

    def cell(outcome: Outcome) -> Cell:
        if outcome.evaluation is None or outcome.is_duplicate:
            return Cell((Figure("n/a" if outcome.evaluation is None else "= untuned"),))
        figures = [(outcome.figure(metric), best[outcome.setting.num_steps, metric]) for metric in metrics]
        shown = tuple(Figure(_number(value), value is not None and value == lowest) for value, lowest in figures)
        return Cell(shown, outcome.is_turned_down)

    rows = {
        entrant: [cell(cells[entrant, num_steps]) for num_steps in comparison.plan.num_steps]
        for entrant in comparison.plan.entrants
    }
    caption = f"{' / '.join(METRIC_LABELS[metric] for metric in metrics)}; the lower, the better."
    header = ("", *(f"{num_steps} steps" for num_steps in comparison.plan.num_steps))
    return Table(str(group), caption, header, rows, tuple(_notes(outcomes)))


def summary_table(comparison: Comparison) -> Table:
    """How each entrant did over all settings."""
    settings: dict[object, list[Outcome]] = {}
    for outcome in comparison.outcomes:
        if outcome.evaluation is not None and not outcome.is_duplicate:
            settings.setdefault(outcome.setting, []).append(outcome)
    ranks: dict[tuple[str, str], list[float]] = {}
    wins: dict[tuple[str, str], int] = {}
    for outcomes in settings.values():
        for kind, metric in zip(("distance", "Fréchet"), metrics_of(outcomes), strict=True):
            values = {o.entrant: value for o in outcomes if (value := o.figure(metric)) is not None}
            for entrant, value in values.items():
                rank = 1 + sum(v < value for v in values.values()) + (sum(v == value for v in values.values()) - 1) / 2
                ranks.setdefault((entrant, kind), []).append(rank)
                wins[entrant, kind] = wins.get((entrant, kind), 0) + (value == min(values.values()))
    rows: dict[str, list[Cell]] = {}
    for entrant in comparison.plan.entrants:
        own = [o for outcomes in settings.values() for o in outcomes if o.entrant == entrant]
        accepted = sum(o.verdict == "accepted" for o in own)
        texts = []
        for kind in ("distance", "Fréchet"):
            texts += [_mean(ranks.get((entrant, kind), []), ".1f"), str(wins.get((entrant, kind), 0))]
        texts.append(f"{accepted} of {len(own)}" if own and entrant != BASELINE else "–")
        texts.append(_mean([o.tuning_calls for o in own], ",.0f"))
        texts.append(_mean([o.tuning_seconds for o in own], ".1f"))
        rows[entrant] = [Cell((Figure(text),)) for text in texts]
    header = ("", "rank by distance", "wins", "rank by Fréchet", "wins", "accepted", "tuning calls", "tuning seconds")
    caption = (
        f"Over {len(settings)} settings: mean rank among those that apply, and number of settings won, by distance (to "
        "the teacher; of noisy samplers, sliced Wasserstein to the data) and by Fréchet distance to the data; how many "
        "were accepted; what tuning took on average: samples put through the network, and seconds of one core."
    )
    return Table("Summary", caption, header, _with_best(rows, (0, 2)))


def to_markdown(table: Table) -> str:
    lines = [f"### {table.title}", "", table.caption, ""]
    lines += [_row(table.header), _row(["---", *["---:"] * (len(table.header) - 1)])]
    lines += [_row([entrant, *map(_markdown_cell, cells)]) for entrant, cells in table.rows.items()]
    if any(cell.is_turned_down for cells in table.rows.values() for cell in cells):
        lines += ["", "† not accepted: not better than untuned beyond chance, or perhaps worse in some figure."]
    lines += [f"\n{note}" for note in table.notes]
    return "\n".join(lines) + "\n"


def to_csv(outcomes: list[Outcome]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_record, outcomes))
    return text.getvalue()


def _record(outcome: Outcome) -> dict[str, object]:
    group = outcome.setting.group
    record: dict[str, object] = {
        "model": group.model,
        "guidance": group.guidance,
        "sampler": group.sampler,
        "num_steps": outcome.setting.num_steps,
        "nfe": outcome.nfe,
        "entrant": outcome.entrant,
        "verdict": outcome.verdict,
        "reason": outcome.reason,
    }
    if outcome.evaluation is None:
        return record
    for name, metric in outcome.evaluation.metrics.items():
        record[name] = metric.after
        record[f"{name}_change_low"], record[f"{name}_change_high"] = metric.change.low, metric.change.high
    return record | {
        "tuning_calls": outcome.tuning_calls,
        "tuning_seconds": f"{outcome.tuning_seconds:.3f}",
        "timesteps": json.dumps(outcome.timesteps),
        "t_ratios": json.dumps(outcome.t_ratios),
        "solver_table": json.dumps(outcome.solver_table.to_dict()) if outcome.solver_table else None,
    }


def _notes(outcomes: list[Outcome]) -> list[str]:
    """Each reason once, with the entrants it is for."""
    entrants: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.evaluation is None and outcome.entrant not in entrants.setdefault(outcome.reason, []):
            entrants[outcome.reason].append(outcome.entrant)
    return [f"n/a: {', '.join(names)}: {reason}." for reason, names in entrants.items()]


def _with_best(rows: dict[str, list[Cell]], columns: tuple[int, ...]) -> dict[str, list[Cell]]:
    """The rows, with the lowest number of some columns marked."""
    for column in columns:
        numbers = {entrant: cells[column].figures[0].text for entrant, cells in rows.items()}
        lowest = _lowest(float(text) for text in numbers.values() if text != "–")
        for entrant, text in numbers.items():
            if text != "–" and float(text) == lowest:
                rows[entrant][column] = Cell((Figure(text, True),))
    return rows


def _lowest(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None and math.isfinite(value)), default=None)


def _mean(values: list[float] | list[int], format_spec: str) -> str:
    return format(sum(values) / len(values), format_spec) if values else "–"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:#.3g}".rstrip(".") if math.isfinite(value) and 1e-3 <= abs(value) < 1e4 else f"{value:.2g}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(cell: Cell) -> str:
    figures = [f"**{figure.text}**" if figure.is_best else figure.text for figure in cell.figures]
    return " / ".join(figures) + (" †" if cell.is_turned_down else "")
