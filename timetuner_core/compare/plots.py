"""Pictures of a comparison, as PNG."""

import io
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from timetuner_core.compare import BASELINE, Group, Outcome, Trajectories
from timetuner_core.compare.tables import METRIC_LABELS, metrics_of

DPI = 110
GREY = "#767676"


class Style(NamedTuple):
    """How an entrant's line looks."""

    color: str
    line: Literal["-", "--", "-."]
    marker: str
    width: float = 1.3


# Okabe & Ito's colours differ for colour-blind readers too; markers and dashes differ without any colour.
STYLES = {
    "untuned": Style("#000000", "-", "o", 2.2),
    "uniform": Style(GREY, "--", "s"),
    "quadratic": Style(GREY, "--", "^"),
    "log_snr": Style(GREY, "--", "v"),
    "edm": Style(GREY, "--", "D"),
    "ays": Style("#56B4E9", "-.", "s"),
    "ays_list": Style("#56B4E9", "--", "<"),
    "gits": Style("#CC79A7", "-.", "^"),
    "oss": Style("#CC79A7", "--", ">"),
    "dc_solver": Style("#CC79A7", "-", "d", 1.8),
    "pas": Style("#56B4E9", "-", "H", 1.8),
    "dmn": Style("#0072B2", "-.", "v"),
    "ld3": Style("#0072B2", "-", "D", 1.8),
    "ld3_relaxed": Style("#0072B2", "--", "d", 1.8),
    "timetuner": Style("#E69F00", "-", "o", 1.8),
    "teacher_step": Style("#E69F00", "--", "X", 1.8),
    "end_to_end": Style("#D55E00", "-", "P", 1.8),
    "end_to_end_grid": Style("#009E73", "-", "*", 2.2),
    "bns": Style("#0072B2", "--", "p", 1.8),
    "solver": Style("#0072B2", "-", "h", 2.2),
}


def quality(group: Group, outcomes: list[Outcome]) -> bytes:
    """`metrics_of` a group against the network's evaluations; hollow where not accepted."""
    figure = _figure(10.5, 4.4)
    axes: list[Axes] = list(figure.subplots(1, 2))
    outcomes = [o for o in outcomes if not o.is_duplicate]
    nfes = sorted({outcome.nfe for outcome in outcomes if outcome.nfe is not None})
    for ax, metric in zip(axes, metrics_of(outcomes), strict=True):
        for entrant, style in STYLES.items():
            points = [
                (o.nfe, o.figure(metric), o.is_turned_down)
                for o in outcomes
                if o.entrant == entrant and o.figure(metric) is not None
            ]
            if not points:
                continue
            x, y, turned_down = zip(*sorted(points), strict=True)
            ax.plot(x, y, style.line, color=style.color, linewidth=style.width, zorder=2 + style.width)
            for hollow in (False, True):
                chosen = [i for i, is_turned_down in enumerate(turned_down) if is_turned_down == hollow]
                face = "white" if hollow else style.color
                ax.plot(
                    [x[i] for i in chosen],
                    [y[i] for i in chosen],
                    style.marker,
                    **_marker(style, face),
                    zorder=3 + style.width,
                )
        ax.set(xscale="log", yscale="log", xlabel="network evaluations", title=METRIC_LABELS[metric])
        ax.set_xticks(nfes, [str(nfe) for nfe in nfes])
        ax.title.set_fontsize(10)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    _legend(figure, _entrants(outcomes), "hollow: not accepted")
    figure.suptitle(str(group), x=0.01, ha="left", weight="bold")
    return _png(figure)


def ratios(group: Group, outcomes: list[Outcome]) -> bytes:
    """The learned ratios against the steps, and every entrant's grid, for each number of steps."""
    numbers = sorted({outcome.setting.num_steps for outcome in outcomes if outcome.evaluation is not None})
    entrants = _entrants([o for o in outcomes if not o.is_duplicate])
    figure = _figure(2.2 + 2.3 * len(numbers), 2.6 + 0.2 * len(entrants))
    axes = figure.subplots(2, len(numbers), squeeze=False, sharey="row", height_ratios=[2.2, 0.2 * len(entrants)])
    for column, num_steps in enumerate(numbers):
        above, below = axes[:, column]
        here = [o for o in outcomes if o.setting.num_steps == num_steps and o.evaluation and o.entrant in entrants]
        for outcome in here:
            style, steps = STYLES[outcome.entrant], np.arange(1, num_steps + 1)
            if any(ratio != 1 for ratio in outcome.t_ratios):
                above.plot(steps, outcome.t_ratios, style.line, color=style.color, linewidth=style.width)
                above.plot(steps, outcome.t_ratios, style.marker, **_marker(style, style.color))
            row = [entrants.index(outcome.entrant)] * (num_steps + 1)
            below.plot(outcome.timesteps, row, "-", color="#cccccc", linewidth=0.8, zorder=1)
            below.plot(outcome.timesteps, row, "o", color=style.color, markersize=3.5)
        above.axhline(1, color="#000000", linewidth=0.8, zorder=1)
        above.set(title=f"{num_steps} steps", xlabel="step")
        above.set_xticks(sorted({1, num_steps} | ({num_steps // 2} if num_steps > 4 else set())))
        above.grid(axis="y", color="#dddddd", linewidth=0.6)
        _time_axis(below)
    axes[0, 0].set_ylabel("t_ratio")
    axes[1, 0].set_yticks(range(len(entrants)), entrants)
    axes[1, 0].invert_yaxis()
    learned = [o.entrant for o in outcomes if any(ratio != 1 for ratio in o.t_ratios)]
    if learned:
        _legend(figure, learned)
    figure.suptitle(f"{group}: what the network is told (above), and when (below)", x=0.01, ha="left", weight="bold")
    return _png(figure)


def trajectories(group: Group, drawn: Trajectories) -> bytes:
    """The way of a few samples from noise to data, by the teacher and by each few-step sampler."""
    others = [name for name in drawn.paths if name != "teacher"]
    figure = _figure(4.6 * len(others), 4.6)
    axes = figure.subplots(1, len(others), squeeze=False, sharex=True, sharey=True)[0]
    points = np.concatenate([path.reshape(-1, 2) for path in drawn.paths.values()])
    middle, half = (points.max(axis=0) + points.min(axis=0)) / 2, 0.55 * np.ptp(points, axis=0).max()
    for ax, name in zip(axes, others, strict=True):
        if drawn.data is not None:
            ax.plot(*drawn.data.T, ".", color="#bbbbbb", markersize=2.5, zorder=1, label="data")
        for k, (teacher, path) in enumerate(zip(drawn.paths["teacher"], drawn.paths[name], strict=True)):
            first = {"label": "teacher"} if k == 0 else {}
            ax.plot(*teacher.T, "-", color="#0072B2", linewidth=1.2, zorder=2, **first)
            ax.plot(*teacher[-1:].T, "o", color="#0072B2", markersize=7, markerfacecolor="white", zorder=3)
            first = {"label": name} if k == 0 else {}
            color = "#D55E00"
            ax.plot(*path.T, ".-", color=color, linewidth=1.2, markersize=5, zorder=4, **first)
            ax.plot(*path[-1:].T, "o", color=color, markersize=4.5, zorder=5)
        ax.set_title("untuned" if name == BASELINE else f"{name}, the closest to the teacher", fontsize=10)
        ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half), aspect="equal")
        ax.legend(loc="upper right", fontsize=8, framealpha=0.9)
    plane = "x_t" if drawn.share == 1 else f"x_t in the teacher's two principal components ({drawn.share:.0%})"
    figure.supxlabel(plane, fontsize=9)
    figure.suptitle(f"{group}, {drawn.num_steps} steps", x=0.01, ha="left", weight="bold")
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    figure = Figure((width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _entrants(outcomes: list[Outcome]) -> list[str]:
    return list(dict.fromkeys(o.entrant for o in outcomes if o.evaluation is not None))


def _marker(style: Style, face: str) -> dict[str, Any]:
    size = 9 if style.marker == "*" else 5.5
    return {"color": style.color, "markerfacecolor": face, "markersize": size, "markeredgewidth": 1.1}


def _legend(figure: Figure, entrants: list[str], note: str = "") -> None:
    lines = [
        Line2D([], [], linestyle=style.line, marker=style.marker, label=name, **_marker(style, style.color))
        for name, style in STYLES.items()
        if name in entrants
    ]
    figure.legend(handles=lines, loc="outside right center", frameon=False, fontsize=9, title=note or None)


def _time_axis(ax: Axes) -> None:
    """Times by their roots, which spreads the small ones."""
    forward: Callable[[Any], Any] = lambda t: np.sqrt(np.maximum(t, 0))  # noqa: E731
    ax.set_xscale("function", functions=(forward, np.square))
    ax.set(xlabel="t")
    high = ax.get_xlim()[1]
    ticks = [tick for tick in (0, 0.1, 0.5, 1, 5, 20, 80) if tick <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.invert_xaxis()


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
