"""Tuning two networks that others trained: score networks of galaxies, from the package galaxygrad 0.2.1.

    python -m benchmarks.galaxy [--sizes 32 64] [--num-steps 5] [--seeds 1]

The package states no licence, so nothing of it is kept here: it is installed, with JAX, into an environment of this
run's own in a temporary folder. Its `hsc_ScoreNet32` and `hsc_ScoreNet64` are computed by PyTorch from the weights in
its files, and compared with the package's own network first.

Tuners, sampler, teacher and held-out noises are those of `benchmarks/solver.py`. The figures are mean distances to the
teacher.
"""

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.solver import TUNERS, Bench, Setting
from timetuner_core import NoiseScheduleVP
from timetuner_core.grids import make_timesteps
from timetuner_core.models.diffusion_model import DiffusionModel

PACKAGES = ["jax==0.10.2", "jaxlib==0.10.2", "equinox==0.13.8", "einops==0.8.1", "numpy==2.4.6"]
SIZES = (32, 64)
PATCH_SIZE, HIDDEN_SIZE, NUM_BLOCKS = 4, 64, 4
LATEST_TIME = 10.0  # The networks know times from 0 to 10.
MOST_DIFFERENCE = 1e-4

# It runs in the environment that has the package. `import galaxygrad` fails where file names have cases, as 0.2.1 opens
# eqx_roman_ScoreNet120.eqx but ships eqx_roman_Scorenet120.eqx, so the module of the network is loaded by its path.
THEIR_ANSWERS = """
import importlib.util, sys
import equinox, jax, numpy
folder, size, inputs, answers = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
spec = importlib.util.spec_from_file_location("models_eqx", folder + "/models_eqx.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
network = module.ScoreNet((1, size, size), 4, 64, 512, 512, 4, 10.0, key=jax.random.PRNGKey(0))
network = equinox.tree_deserialise_leaves(f"{folder}/eqx_hsc_ScoreNet{size}.eqx", network)
given = numpy.load(inputs)
numpy.save(answers, numpy.stack([network(jax.numpy.asarray(x), t) for x, t in zip(given["x"], given["t"])]))
"""


class Mixer(nn.Module):
    """A block of the MLP-Mixer: one MLP over the patches of each channel, one over the channels of each patch."""

    def __init__(self, num_patches: int, arrays: list[Tensor]) -> None:
        super().__init__()
        self.patch_mixer = mlp(*arrays[:4])
        self.hidden_mixer = mlp(*arrays[4:8])
        self.patch_norm = norm((HIDDEN_SIZE, num_patches), *arrays[8:10])
        self.hidden_norm = norm((num_patches, HIDDEN_SIZE), *arrays[10:12])

    def forward(self, y: Tensor) -> Tensor:
        y = y + self.patch_mixer(self.patch_norm(y))
        mixed: Tensor = (y.mT + self.hidden_mixer(self.hidden_norm(y.mT))).mT
        return mixed


class ScoreNet(nn.Module):
    """The score of x `(B, 1, size, size)` at times t `(B,)` from 0 to 10, with the weights of a `.eqx` file."""

    def __init__(self, size: int, file: Path) -> None:
        super().__init__()
        num_patches = (size // PATCH_SIZE) ** 2
        arrays = arrays_of(file)
        *weights, latest = (torch.from_numpy(array.astype(np.float32)) for array in arrays)
        if float(latest) != LATEST_TIME or len(weights) != 4 + 12 * NUM_BLOCKS + 2:
            raise ValueError(f"{file.name} has {len(weights)} weights and the latest time {latest}")
        self.conv_in = nn.Conv2d(2, HIDDEN_SIZE, PATCH_SIZE, PATCH_SIZE)
        self.conv_out = nn.ConvTranspose2d(HIDDEN_SIZE, 1, PATCH_SIZE, PATCH_SIZE)
        # Equinox has one output channel first, and does not turn the kernel.
        turned = weights[2].transpose(0, 1).flip(2, 3)
        fill(self.conv_in, weights[0], weights[1].flatten())
        fill(self.conv_out, turned, weights[3].flatten())
        blocks = [weights[4 + 12 * i : 16 + 12 * i] for i in range(NUM_BLOCKS)]
        self.blocks = nn.ModuleList(Mixer(num_patches, arrays) for arrays in blocks)
        self.norm = norm((HIDDEN_SIZE, num_patches), *weights[-2:])
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told = (t / LATEST_TIME).to(x).reshape(-1, 1, 1, 1).expand(x.shape)
        y = self.conv_in(torch.cat([x, told], dim=1))
        patches = y.flatten(2)
        for block in self.blocks:
            patches = block(patches)
        score: Tensor = self.conv_out(self.norm(patches).reshape(y.shape))
        return score


def arrays_of(file: Path) -> list[np.ndarray]:
    """The arrays of a `.eqx` file, which are `.npy` files one after the other."""
    arrays = []
    with file.open("rb") as stream:
        while stream.peek(1):
            arrays.append(np.load(stream))
    return arrays


def mlp(weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor) -> nn.Sequential:
    """One hidden layer."""
    layers = [nn.Linear(weight.shape[1], weight.shape[0]) for weight in (weight_in, weight_out)]
    fill(layers[0], weight_in, bias_in)
    fill(layers[1], weight_out, bias_out)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def norm(shape: tuple[int, ...], weight: Tensor, bias: Tensor) -> nn.LayerNorm:
    layer = nn.LayerNorm(shape)
    fill(layer, weight, bias)
    return layer


def fill(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    layer.load_state_dict({"weight": weight, "bias": bias})


def install(folder: Path) -> tuple[Path, Path]:
    """An environment with the package in a folder: its Python, and the package's own folder."""
    python = folder / "venv" / "bin" / "python"
    if uv := shutil.which("uv"):
        subprocess.run([uv, "venv", "--quiet", "--python", ">=3.11", folder / "venv"], check=True)
        command: list[str | Path] = [uv, "pip", "install", "--quiet", "--python", python]
    else:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        command = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*command, *PACKAGES], check=True)
    subprocess.run([*command, "--no-deps", "galaxygrad==0.2.1"], check=True)
    (package,) = (folder / "venv" / "lib").glob("python3.*/site-packages/galaxygrad")
    return python, package


def difference(network: ScoreNet, size: int, python: Path, package: Path, folder: Path) -> float:
    """The greatest difference between PyTorch's answers and the package's own, on a few inputs."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(6, 1, size, size, generator=generator), torch.tensor([0.01, 0.1, 1.0, 3.0, 7.0, 10.0])
    inputs, answers = folder / "inputs.npz", folder / "answers.npy"
    np.savez(inputs, x=x.numpy(), t=t.numpy())
    subprocess.run([python, "-c", THEIR_ANSWERS, package, str(size), inputs, answers], check=True)
    return float((network(x, t) - torch.from_numpy(np.load(answers))).abs().max())


def model_of(network: ScoreNet, size: int) -> DiffusionModel:
    """The network with its linear noise schedule, whose time from 0 to 1 it knows as 0 to 10."""
    shape = (1, size, size)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return DiffusionModel(
        network=lambda x, t_input, _condition=None: network(x, LATEST_TIME * t_input),
        classifier=None,
        noise_schedule=NoiseScheduleVP("linear", continuous_beta_0=LATEST_TIME, continuous_beta_1=LATEST_TIME),
        model_type="score",
        sample_shape=shape,
        num_classes=0,
        null_class_label=None,
        num_parameters=num_parameters,
        num_bytes=4 * num_parameters,
        draw_data=None,
        reference=None,
        image_shape=shape,
    )


def distances(model: DiffusionModel, num_steps: int, seed: int) -> dict[str, float]:
    """The mean distance to the teacher on held-out noise, by what was tuned."""
    bench, setting = Bench(model, "uncond", seed), Setting("galaxy", "uncond", num_steps, seed)
    ends = {"untuned": bench.distance(make_timesteps(bench.schedule, num_steps))}
    ends["best named grid"] = bench.untuned(setting).distances[-1]
    return ends | {name: bench.tune(name, setting).distances[-1] for name in TUNERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=[32])
    parser.add_argument("--num-steps", nargs="+", type=int, default=[5])
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python, package = install(folder)
        for size in options.sizes:
            network = ScoreNet(size, package / f"eqx_hsc_ScoreNet{size}.eqx")
            most = difference(network, size, python, package, folder)
            print(f"hsc_ScoreNet{size}: PyTorch is within {most:.1e} of the package's own network", flush=True)
            if most > MOST_DIFFERENCE:
                raise SystemExit("the network is not the package's")
            for num_steps, seed in itertools.product(options.num_steps, range(options.seeds)):
                begun = time.process_time()
                figures = ", ".join(
                    f"{key} {value:.4f}" for key, value in distances(model_of(network, size), num_steps, seed).items()
                )
                seconds = time.process_time() - begun
                print(f"hsc_ScoreNet{size}, {num_steps} calls, seed {seed}: {figures} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
