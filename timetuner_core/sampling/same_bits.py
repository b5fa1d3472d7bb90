"""Batch sizes among which a sample's bits do not depend on the batch it is in.

PyTorch and its libraries choose other kernels for other batch sizes, and these round differently: the same row comes
out with other last bits. Sizes fall into classes within which all agree, by the network, the device and the number of
threads; there is no rule for them, so they are found by trying.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from timetuner_core.catalog import GuidanceType
from timetuner_core.guided_model import GuidedModel
from timetuner_core.models.loading import DiffusionModel
from timetuner_core.samplers import initial_noise
from timetuner_core.sampling.generate import UNGUIDED_SCALES

BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Each probe batch is filled with three distinct samples, rotated so that each one is tested at every position.
SAMPLES = 3

# The network is probed this often, each time with other samples and another time.
PROBES = 2

# Tensor conditions have CLIP's length where the model leaves it open.
DEFAULT_CONDITION_LENGTH = 77

# A function of the indices `(B,)` of samples: the network's outputs for them, each `(B, ...)`.
Network = Callable[[Tensor], tuple[Tensor, ...]]


def all_sizes(max_size: int) -> tuple[int, ...]:
    """Those of `BATCH_SIZES` below `max_size`, and `max_size`, whatever they do to a sample's bits."""
    return (*(size for size in BATCH_SIZES if size < max_size), max_size)


def sizes_without_padding(max_size: int, device: torch.device) -> tuple[int, ...]:
    """Every size on a processor, where each further row takes time, and `all_sizes` elsewhere.

    A GPU starts the same kernels for a few rows more, and keeps memory and choices of kernels for each size.
    """
    return tuple(range(1, max_size + 1)) if device.type == "cpu" else all_sizes(max_size)


@torch.no_grad()
def steady_sizes(
    model: DiffusionModel,
    guidance_type: GuidanceType,
    max_size: int,
    device: torch.device | str = "cpu",
    *,
    guided: bool | None = None,
    condition_length: int | None = None,
) -> tuple[int, ...]:
    """Those of `BATCH_SIZES`, and of `max_size`, at which a sample's bits are those that it has in the largest.

    The largest is `max_size`, unless a sample's bits depend on its position there: then the greatest size below at
    which they do not. At size 1 they cannot, so there is always one.

    What is tried is the guided prediction and the model's `decode`, on `device` and with the number of threads set
    now. The same on equal machines: nothing is timed, and all draws are fixed.

    Args:
        guided: True for scales that guide, False for the one that does not, which calls the network otherwise;
            None for both, as an interval of guidance needs.
        condition_length: L of tensor conditions `(B, L, D)`, which kernels may depend on too; default the model's.

    Returns:
        Rising sizes, for `generate`'s `batch_sizes`.

    Raises:
        ValueError: `max_size` below 1; guidance that the model has no condition for.
    """
    if max_size < 1:
        raise ValueError(f"max_size is {max_size}; accepted: 1 or more")
    generator = torch.Generator().manual_seed(0)
    networks = [
        network
        for _ in range(PROBES)
        for network in probe_networks(model, guidance_type, guided, device, condition_length, generator)
    ]
    order = torch.cat([torch.arange(SAMPLES), torch.randint(SAMPLES, (max_size,), generator=generator)])
    largest: list[Tensor] | None = None
    sizes = []
    for size in reversed(all_sizes(max_size)):
        answers = _answers(networks, order[:size].to(device), largest)
        if answers is not None:
            largest = answers
            sizes.append(size)
    return tuple(sizes[::-1])


def _answers(networks: list[Network], order: Tensor, expected: list[Tensor] | None) -> list[Tensor] | None:
    """Each network's answers `(SAMPLES, bytes)` in batches of this size; None if they depend on the position or the
    others in the batch, or are not as expected."""
    answers = []
    for i, network in enumerate(networks):
        # The order is rotated by one sample at a time: each sample comes first once, and is at every position once.
        orders = [(order + turn) % SAMPLES for turn in range(SAMPLES)]
        rows = [_bits(network(index)) for index in orders]
        first = torch.stack([row[0] for row in rows])
        if expected is not None and not torch.equal(first, expected[i]):
            return None
        if not all(torch.equal(row, first[index]) for row, index in zip(rows, orders, strict=True)):
            return None
        answers.append(first)
    return answers


def probe_networks(
    model: DiffusionModel,
    guidance_type: GuidanceType,
    guided: bool | None,
    device: torch.device | str,
    condition_length: int | None,
    generator: torch.Generator,
) -> list[Network]:
    """The network in every way that it will be called, and the decoder, on `SAMPLES` random samples.

    Each is a function of the indices `(B,)` of samples, and gives tensors `(B, ...)`.
    """
    schedule = model.noise_schedule
    t = schedule.t_min + (schedule.T - schedule.t_min) * torch.rand((), generator=generator, dtype=torch.float64)
    seeds = torch.randint(2**32, (SAMPLES,), generator=generator).tolist()
    x = initial_noise(model.sample_shape, seeds, schedule.starting_std(t))[0].to(device)
    condition = uncond_condition = None
    if guidance_type != "uncond":
        condition = _conditions(model, condition_length, SAMPLES, generator).to(device)
        uncond_condition = model.conditions(guidance_type, condition)["uncond_condition"]
    if guidance_type == "classifier-free" and uncond_condition is None:
        uncond_condition = _conditions(model, condition_length, 1, generator).to(device)

    unguided = UNGUIDED_SCALES[guidance_type]
    scales = {True: [unguided + 1], False: [unguided], None: [unguided + 1, unguided]}[guided]
    rescale = 0.7 if guidance_type == "classifier-free" else 0.0  # Rescaling has sums that may round otherwise.
    model_fns = [model.model_fn(guidance_type, scale, rescale) for scale in scales]

    def predict(model_fn: GuidedModel, index: Tensor) -> tuple[Tensor, ...]:
        return model_fn.predict(x[index], t, 1.0, None if condition is None else condition[index], uncond_condition)

    return [*(partial(predict, model_fn) for model_fn in model_fns), lambda index: (model.decode(x[index]),)]


def _conditions(model: DiffusionModel, length: int | None, count: int, generator: torch.Generator) -> Tensor:
    """Random conditions, `(count,)` or `(count, L, D)`. Raises: ValueError."""
    if model.condition_shape is not None:
        default_length, width = model.condition_shape
        return torch.randn(count, length or default_length or DEFAULT_CONDITION_LENGTH, width, generator=generator)
    if model.num_classes == 0:
        raise ValueError("the model has no conditions; accepted: guidance_type 'uncond'")
    return torch.randint(model.num_classes, (count,), generator=generator)


def _bits(rows: tuple[Tensor, ...]) -> Tensor:
    """Tensors `(B, ...)` as `(B, bytes)`, in which -0 is not 0, and NaN is itself."""
    return torch.cat([tensor.flatten(1).contiguous().view(torch.uint8) for tensor in rows], dim=1)
