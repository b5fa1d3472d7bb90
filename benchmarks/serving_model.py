"""The model itself, by the one call that the worker, the bare loop and the rivals make; and the bare loop.

Run as a process of its own by `serving.py`, so that its threads are set before PyTorch is loaded and its time is not
that of whoever asks: a method's name and arguments come in as a line of JSON, what it returns goes out as one.
"""

import io
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from service.shared.settings import Settings
from timetuner_core.grids import make_timesteps
from timetuner_core.models.loading import BUILTINS, load_builtin, load_folder
from timetuner_core.sampling.batch_size import largest_useful_size
from timetuner_core.sampling.generate import Guidance, generate
from timetuner_core.sampling.same_bits import sizes_without_padding, steady_sizes
from worker.runtime import pick_device

MODEL = "digits8"
NUM_STEPS = 10
Image = dict[str, int]  # Rivals are asked for these: "seed", "class_labels" and "num_steps".
GUIDANCES = {"uncond": Guidance("uncond", 1.0), "cfg": Guidance("classifier-free", 2.0)}


class Sampler:
    """A built-in model, or a diffusers-format folder's, 10 steps of DDIM, on the device that a worker takes."""

    def __init__(self, guidance: str, model: str = MODEL) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # whatever a rival has set meanwhile
        settings = Settings()
        self.device = pick_device(settings.device)
        options = {"channels_last": settings.channels_last, "compile": settings.compile}
        load = load_builtin if model in BUILTINS else load_folder
        self.model = load(model if model in BUILTINS else Path(model), self.device, **options)
        self.guidance = GUIDANCES[guidance]

    def __call__(
        self,
        seeds: list[int],
        labels: list[int],
        batch_sizes: Sequence[int] | None = None,
        num_steps: int = NUM_STEPS,
    ) -> Tensor:
        """One image per seed, `(B, C, H, W)`; in one batch, unless `batch_sizes` says otherwise."""
        timesteps = make_timesteps(self.model.noise_schedule, num_steps)
        condition = None if self.guidance.type == "uncond" else torch.tensor(labels)
        sizes = batch_sizes or [len(seeds)]
        given = (self.model, self.guidance, seeds, condition, timesteps)
        return generate(*given, batch_sizes=sizes, device=self.device).cpu()

    def npy(self, images: list[Image]) -> list[bytes]:
        """Sample those of equal steps in one batch, each as the service answers: a `.npy` file of `(1, C, H, W)`."""
        files: dict[int, bytes] = {}
        for num_steps in {image["num_steps"] for image in images}:
            chosen = [k for k, image in enumerate(images) if image["num_steps"] == num_steps]
            seeds, labels = ([images[k][name] for k in chosen] for name in ("seed", "class_labels"))
            files |= zip(chosen, map(_npy, self(seeds, labels, num_steps=num_steps).numpy()[:, None]), strict=True)
        return [files[k] for k in range(len(images))]

    def rate(self, batch_size: int, seconds: float) -> float:
        """Images per second of a loop that does nothing else."""
        batches = itertools.count()
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            first = next(batches) * batch_size
            self(list(range(first, first + batch_size)), [k % 10 for k in range(batch_size)])
        return next(batches) * batch_size / elapsed

    def times(self, calls: int, batch_sizes: Sequence[int] | None) -> list[float]:
        """Milliseconds of each of so many calls for one image."""
        times = []
        for k in range(calls):
            began = time.perf_counter()
            self([k], [k % 10], batch_sizes)
            times.append(1000 * (time.perf_counter() - began))
        return times

    def worker_sizes(self) -> tuple[int, ...]:
        """The batch sizes that a worker of these settings uses, and pads to."""
        guidance, settings = self.guidance, Settings()
        if settings.same_bits:
            return steady_sizes(self.model, guidance.type, settings.part_size, self.device, guided=guidance.guides)
        most = settings.sample_batch_size
        if most == "auto":
            seconds = settings.batch_step_seconds
            most = largest_useful_size(self.model, guidance.type, self.device, seconds, guided=guidance.guides)
        return sizes_without_padding(most, torch.device(self.device))


def _npy(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image, allow_pickle=False)
    return buffer.getvalue()


def main() -> None:
    sampler = Sampler(*sys.argv[1:])
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(sampler, method)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
