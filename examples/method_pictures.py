"""Draw the pictures of docs/method.md, from the two-dimensional mixture whose exact eps is known.

    python examples/method_pictures.py --out docs/images

Seeded; a minute on one CPU core.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from timetuner_core import TimeTuner, model_wrapper
from timetuner_core.models.mixtures import ring_mixture

MIXTURE = ring_mixture()
TUNER = TimeTuner(model_wrapper(MIXTURE, MIXTURE.noise_schedule), MIXTURE.noise_schedule)
NUM_STEPS, TEACHER_NUM_STEPS = 5, 100
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"


def draw_errors(path: Path, x_T: Tensor) -> None:
    """How far each step ends from where many steps lead, against what the network is told."""
    grid = TUNER.get_timesteps(NUM_STEPS)
    figure, axes = plt.subplots(1, NUM_STEPS, figsize=(11, 2.6), sharex=True, layout="constrained")
    x = x_T
    for axis, t, s in zip(axes, grid[:-1], grid[1:], strict=True):
        ratios = torch.linspace(0.4, min(1.5, 1 / float(t)), 45)  # the network knows no time above 1
        target = TUNER.ddim_sample(x, timesteps=torch.linspace(float(t), float(s), 41))
        moved = [TUNER.ddim_step_fn(x, t, s, t_ratio=ratio)[0] for ratio in ratios]
        errors = torch.stack([(x_s - target).norm(dim=1).mean() for x_s in moved])
        axis.plot(ratios, errors, color=BLUE)
        axis.axvline(1, color=GREY, linestyle="--", linewidth=1)
        axis.plot(ratios[errors.argmin()], errors.min(), "o", color=ORANGE)
        axis.set(title=f"t = {t:.2f} to {s:.2f}", xlabel="t_ratio", ylim=(0, None))
        axis.title.set_fontsize(10)
        x = target
    axes[0].set_ylabel("distance after the step")
    figure.savefig(path, dpi=90, bbox_inches="tight")


def draw_trajectories(path: Path, x_T: Tensor, t_ratios: Tensor) -> None:
    """The ends of few steps, untuned and tuned, beside those of many."""
    data, _ = MIXTURE.sample(1500, torch.Generator().manual_seed(1))
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharex=True, sharey=True, layout="constrained")
    _, many = TUNER.ddim_sample(x_T, num_steps=TEACHER_NUM_STEPS, return_intermediates=True)
    for axis, name, ratios, color in zip(axes, ("untuned", "tuned"), (None, t_ratios), (BLUE, ORANGE), strict=True):
        _, few = TUNER.ddim_sample(x_T, num_steps=NUM_STEPS, t_ratios=ratios, return_intermediates=True)
        axis.plot(*data.T, ".", color=GREY, alpha=0.15, markersize=3)
        axis.plot(*torch.stack(many["x_t"]).permute(2, 0, 1), color="black", linewidth=1)
        axis.plot(*torch.stack(few["x_t"]).permute(2, 0, 1), "o-", color=color, markersize=3, linewidth=1)
        distance = (few["x_t"][-1] - many["x_t"][-1]).norm(dim=1).mean()
        axis.set(title=f"{NUM_STEPS} steps, {name}: {distance:.2f} from {TEACHER_NUM_STEPS} steps", aspect="equal")
    figure.savefig(path, dpi=90, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    out = parser.parse_args().out
    noise = torch.randn(320, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held_out, population = noise[:256], noise[256:]
    t_ratios = TUNER.optimize_end_to_end(population, TUNER.ddim_step_fn, NUM_STEPS, total_iters=100)
    print("t_ratios:", ", ".join(f"{ratio:.3f}" for ratio in t_ratios))
    draw_errors(out / "method-errors.png", held_out)
    draw_trajectories(out / "method-trajectories.png", held_out[:12], t_ratios)


if __name__ == "__main__":
    main()
