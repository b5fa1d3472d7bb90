"""The file of a node for ComfyUI, which carries ratios and learned solvers."""

import json
from pathlib import Path
from typing import Any

import torch

from timetuner_core.exports.formats import Exported, ExportError
from timetuner_core.exports.levels import Levels, check_losses
from timetuner_core.samplers import get_sampler
from timetuner_core.samplers.solver_table import SolverTable

TEMPLATE = Path(__file__).with_name("comfyui_node.py")
PLACEHOLDER = 'r"""{}"""'

NOTES = [
    "Image-to-image is not carried: the node takes all of its steps, from noise.",
    "Untried in ComfyUI itself; tested against a stand-in that follows its interface.",
]


def comfyui_node(levels: Levels, lossy: bool) -> Exported:
    """One file of Python with a node whose sampler takes the schedule's steps and tells the network its times.

    ComfyUI's variable is x / alpha_t, or x itself for flow models, and the solver's table is rewritten for it.

    Raises:
        ExportError: a sampler that is no table, a noise schedule that ComfyUI lacks, or clipping, unless `lossy`.
    """
    scheduler = levels.scheduler
    losses = ["clipping is not carried: x0 is not clipped"] if levels.clips else []
    check_losses(losses, lossy)
    if levels.schedule.get("eta"):
        raise ExportError(f"eta is {levels.schedule['eta']:g}; accepted for ComfyUI: 0, a schedule without added noise")
    if levels.kind == "vp" and levels.noise_schedule.starts_without_signal:
        raise ExportError("rescale_betas_zero_snr is True; accepted for ComfyUI: False")
    table = levels.schedule.get("solver_table")
    sampler = get_sampler(levels.schedule["sampler"])
    try:
        calls = (
            SolverTable.of_sampler(sampler, levels.noise_schedule, levels.timesteps)
            if table is None
            else SolverTable.from_dict(table)
        )
    except ValueError as error:
        raise ExportError(f"{error}") from None
    grid, t_ratios = calls.sampler(sampler.name).in_calls(levels.timesteps, levels.t_ratios)
    told = grid[:-1] * t_ratios
    largest = levels.at(torch.tensor([levels.noise_schedule.T], dtype=torch.float64))
    a, b = _in_its_variable(levels, calls, grid)
    content: dict[str, Any] = {
        "id": levels.schedule.get("id", ""),
        "title": f"TimeTuner: {levels.num_steps} steps",
        "kind": levels.kind,
        "sigma_max": float(largest),
        "sigmas": levels.at(grid).tolist(),
        "told_sigmas": levels.at(told).tolist(),
        "told_timesteps": scheduler.timesteps.double().tolist(),
        "a": a.tolist(),
        "b": [row[: i + 1] for i, row in enumerate(b.tolist())],
        "not_carried": [*losses, *NOTES, *levels.notes],
    }
    code = TEMPLATE.read_text(encoding="utf-8")
    if code.count(PLACEHOLDER) != 1:
        raise AssertionError("the node's file has no place for the schedule")
    return Exported(
        code.replace(PLACEHOLDER, f'r"""{json.dumps(content, indent=1)}"""')
        .replace("# An export replaces this by the schedule.\n", "")
        .encode(),
        content["not_carried"],
    )


def _in_its_variable(levels: Levels, table: SolverTable, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The table's `a` and `b` in ComfyUI's variable, so that the result of the last step is the library's x.

    Args:
        grid: the times of the calls and of the end, `(num_calls + 1,)`.
    """
    schedule = levels.noise_schedule
    table = table.where_eps_follows(schedule.marginal_alpha(grid[:-1]), schedule.marginal_std(grid[:-1]))
    alphas = levels.alphas_at(grid)
    before, after = alphas[:-1], alphas[1:].clone()
    after[-1] = 1.0
    if levels.is_flow:  # ComfyUI divides what flow models end with by 1 - sigma.
        after[-1] = 1 / (1 - levels.sigmas[-1])
    return table.a * before / after, table.b / after[:, None]
