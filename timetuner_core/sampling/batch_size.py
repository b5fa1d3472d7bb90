"""How many rows a step should have at most: more rows share the cost of a step, and everybody waits for its end."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from timetuner_core.catalog import GuidanceType
from timetuner_core.models.diffusion_model import DiffusionModel
from timetuner_core.models.out_of_memory import is_out_of_memory
from timetuner_core.sampling.same_bits import BATCH_SIZES, SAMPLES, probe_networks

MIN_GAIN = 1.04  # A larger size has to make so many times as many rows per second as the best before.
MAX_FRUITLESS_SIZES = 2  # The search ends after so many sizes without that gain, as one alone may have been disturbed.
REPEATS = 3  # The fastest of so many calls counts, as other processes can only slow a call down.


@torch.no_grad()
def largest_useful_size(
    model: DiffusionModel,
    guidance_type: GuidanceType,
    device: torch.device | str,
    max_seconds: float,
    *,
    guided: bool | None = None,
    condition_length: int | None = None,
) -> int:
    """The batch size up to which a step of more rows pays, found by timing the guided prediction on this device.

    Args:
        max_seconds: a step with more than one row takes at most this long.
        guided, condition_length: as `steady_sizes` takes them.

    Raises:
        ValueError: guidance that the model has no condition for.
    """
    generator = torch.Generator().manual_seed(0)
    networks = probe_networks(model, guidance_type, guided, device, condition_length, generator)
    predict = networks[0]  # Guidance takes more calls this way.

    def call(size: int) -> None:
        (*_, last) = predict(torch.arange(size, device=device) % SAMPLES)
        last.flatten()[0].item()  # A GPU is done only when a number has arrived.

    return useful_size(partial(_fastest, call), max_seconds)


@torch.no_grad()
def call_at_sizes(
    model: DiffusionModel,
    guidance_type: GuidanceType,
    device: torch.device | str,
    sizes: Sequence[int],
    *,
    guided: bool | None = None,
    condition_length: int | None = None,
) -> None:
    """Make the guided prediction once at each batch size, in each way that it will be called.

    Args:
        guided, condition_length: as `steady_sizes` takes them.

    Raises:
        ValueError: guidance that the model has no condition for.
    """
    generator = torch.Generator().manual_seed(0)
    *predictions, _ = probe_networks(model, guidance_type, guided, device, condition_length, generator)
    for predict in predictions:
        for size in sizes:
            predict(torch.arange(size, device=device) % SAMPLES)


def useful_size(seconds_of: Callable[[int], float], max_seconds: float) -> int:
    """The last of `BATCH_SIZES` that gained `MIN_GAIN` in rows per second.

    Sizes that take over `max_seconds`, or do not fit into memory, end the search.

    Args:
        seconds_of: how long a batch of so many rows takes. It may raise an error that says that memory ran out.
    """
    best, rate, fruitless = BATCH_SIZES[0], 0.0, 0
    for size in BATCH_SIZES:
        try:
            seconds = seconds_of(size)
        except Exception as error:
            if size == BATCH_SIZES[0] or not is_out_of_memory(error):
                raise
            break
        if size > BATCH_SIZES[0] and seconds > max_seconds:
            break
        if size / seconds >= MIN_GAIN * rate:
            best, rate, fruitless = size, size / seconds, 0
        else:
            fruitless += 1
        if fruitless == MAX_FRUITLESS_SIZES:
            break
    return best


def _fastest(call: Callable[[int], None], size: int) -> float:
    call(size)  # The first call of a size may choose and compile kernels.
    fastest = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        call(size)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
