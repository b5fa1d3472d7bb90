"""Installing packages that add samplers, as pip would."""

from pathlib import Path

# A midpoint rule of its own: DPM-Solver-2 by another name.
MIDPOINT = """
from timetuner_core.samplers import Sampler

def midpoint(step):
    x0, eps = step.predict(step.x_t, step.t)
    middle = step.time_between(1 / 2)

    def move(s, eps):
        level = step.noise_level(s)
        growth = (level.lambda_ - step.lambda_t).expm1()
        return level.alpha / step.alpha_t * step.x_t - level.sigma * growth * eps

    return move(step.s, step.predict(move(middle, eps), middle).eps), x0

SAMPLER = Sampler("own_midpoint", midpoint, order=2, calls_per_step=2)
"""

# It answers no step.
BROKEN = """
from timetuner_core.samplers import Sampler

def update(step):
    raise ArithmeticError("this sampler never works")

SAMPLER = Sampler("own_broken", update, order=1)
"""

# Its steps work where all samples are at one time, as a teacher's, and not where steps are tuned together.
UNTUNABLE = """
from timetuner_core.samplers import Sampler

def update(step):
    if step.t.ndim > 0:
        raise ArithmeticError("this sampler cannot be tuned")
    prediction = step.predict(step.x_t, step.t)
    return step.first_order(prediction), prediction.x0

SAMPLER = Sampler("own_untunable", update, order=1)
"""


def install(folder: Path, module: str, source: str) -> None:
    """A package as pip leaves it: a module, and the metadata that names its entry points."""
    (folder / f"{module}.py").write_text(source)
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[timetuner.samplers]\n{module} = {module}:SAMPLER\n")
