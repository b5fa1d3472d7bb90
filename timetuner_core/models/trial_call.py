"""Trying a model once, as sampling calls it: some faults show in no configuration and in no weight.

The network is called for one sample of the model's size, without guidance and with each kind of guidance that the model
has. Its decoder is called once, and so is the encoder if data came with the model.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timetuner_core.catalog import GuidanceType
from timetuner_core.models.diffusion_model import DiffusionModel
from timetuner_core.models.folder_files import (
    TRANSFORMER_CONFIG,
    TRANSFORMER_WEIGHTS,
    UNET_CONFIG,
    UNET_WEIGHTS,
    VAE_CONFIG,
    VAE_WEIGHTS,
    VQVAE_CONFIG,
    VQVAE_WEIGHTS,
    ModelFormatError,
    Shape,
)
from timetuner_core.models.out_of_memory import is_out_of_memory

GUIDANCE_SCALE = 2.0
CONDITION_LENGTH = 8  # The trial's condition `(1, L, D)` has this L where the model takes any.
ROUND_SIZE = 64  # A network that fails is tried at a multiple of this size, which can be halved six times.
MAX_SHOWN_CHARACTERS = 200  # Errors show this much of what PyTorch says.


class _Part(NamedTuple):
    """A component of a model's folder, for errors."""

    name: str
    config: str
    weights: str


@torch.no_grad()
def try_calls(model: DiffusionModel, path: Path) -> None:
    """Call a model's network, guided in each way it can be, its decoder, and its encoder if data came with it.

    Args:
        path: the folder that the model was loaded from, whose files errors name.

    Raises:
        ModelFormatError: a call fails, or gives another shape than sampling needs, or values that are not finite.
        MemoryError: there is too little memory for a call.
    """
    generator = torch.Generator().manual_seed(0)
    for guidance_type in model.guidance_types:
        _try_network(model, guidance_type, _network_of(path), generator)
    autoencoder = _autoencoder_of(path)
    if autoencoder is not None:
        latents = torch.randn(1, *model.sample_shape, generator=generator)
        _try_map(model.decode, latents, model.image_shape, autoencoder._replace(name="decoder"))
        if model.reference is not None:
            _try_map(model.encode, model.reference[:1], model.sample_shape, autoencoder._replace(name="encoder"))


def _network_of(path: Path) -> _Part:
    if (path / TRANSFORMER_CONFIG).exists():
        return _Part("network", TRANSFORMER_CONFIG, TRANSFORMER_WEIGHTS)
    return _Part("network", UNET_CONFIG, UNET_WEIGHTS)


def _autoencoder_of(path: Path) -> _Part | None:
    parts = (_Part("autoencoder", VAE_CONFIG, VAE_WEIGHTS), _Part("autoencoder", VQVAE_CONFIG, VQVAE_WEIGHTS))
    return next((part for part in parts if (path / part.config).exists()), None)


def _try_network(model: DiffusionModel, guidance_type: GuidanceType, part: _Part, generator: torch.Generator) -> None:
    """Predict from pure noise at `T`, where sampling starts."""
    condition = None if guidance_type == "uncond" else _one_condition(model, generator)
    conditions: dict[str, Any] = model.conditions(guidance_type, condition)
    # Scale 1 alone is possible without a condition that stands for none: it calls the network with its condition alone.
    guides = guidance_type == "classifier" or conditions["uncond_condition"] is not None
    model_fn = model.model_fn(guidance_type, GUIDANCE_SCALE if guides else 1.0)
    t = torch.tensor(model.noise_schedule.T, dtype=torch.float64)
    noise = torch.randn(1, *model.sample_shape, generator=generator) * model.noise_schedule.starting_std(t)
    called = f"the network, called for {_shown(noise)} with guidance_type {guidance_type!r},"
    try:
        x0, eps = model_fn.predict(noise, t, **conditions)
    except Exception as error:  # A network may raise anything.
        _raise_if_out_of_memory(error)
        fault, accepted = _fault(model, condition)
        message = f"{fault}{called} fails ({_words(error)}); accepted: {accepted}"
        raise ModelFormatError(part.config, message) from None
    if eps.shape != noise.shape:
        raise ModelFormatError(part.config, f"{called} gives {_shown(eps)}; accepted: the shape it is given")
    _check_finite(part, called, x0, eps)


def _one_condition(model: DiffusionModel, generator: torch.Generator) -> Tensor:
    """Class 0 `(1,)`; or a tensor `(1, L, D)`, from the model's data or else of noise."""
    if model.condition_shape is None:
        return torch.zeros(1, dtype=torch.long)
    if model.draw_conditions is not None:
        return model.draw_conditions(1, generator).float()
    length, dim = model.condition_shape
    return torch.randn(1, length or CONDITION_LENGTH, dim, generator=generator)


def _fault(model: DiffusionModel, condition: Tensor | None) -> tuple[str, str]:
    """The reason why a network cannot be called, and what is accepted.

    The fault is `sample_size`, if the network can be called at another size; otherwise nothing is known of it.
    """
    channels, *sizes = model.sample_shape
    round_sizes = [math.ceil(size / ROUND_SIZE) * ROUND_SIZE for size in sizes]
    x = torch.zeros(1, channels, *round_sizes)
    t_input = model.noise_schedule.model_input_time(torch.tensor([model.noise_schedule.T])).float()
    try:
        runs = sizes != round_sizes and model.network(x, t_input, condition).shape == x.shape
    except Exception:  # A network may raise anything.
        runs = False
    if not runs:
        return "", "in_channels, sample_size, block types and conditions that fit each other"
    given = sizes[0] if len(set(sizes)) == 1 else sizes
    return f"sample_size is {given}: ", f"a size that the blocks can halve and double, such as {round_sizes[0]}"


def _try_map(function: Callable[[Tensor], Tensor], x: Tensor, accepted: Shape, part: _Part) -> None:
    """Call the decoder or the encoder for one sample `(1, ...)`, which must give one of shape `accepted`."""
    called = f"the {part.name}, called for {_shown(x)},"
    try:
        y = function(x)
    except Exception as error:  # An autoencoder may raise anything.
        _raise_if_out_of_memory(error)
        message = f"{called} fails ({_words(error)}); accepted: channels, sizes and block types that fit each other"
        raise ModelFormatError(part.config, message) from None
    if tuple(y.shape[1:]) != tuple(accepted):
        message = f"{called} gives {_shown(y)}; accepted: {(1, *accepted)}"
        raise ModelFormatError(part.config, f"{message}, by block_out_channels and out_channels")
    _check_finite(part, called, y)


def _check_finite(part: _Part, called: str, *outputs: Tensor) -> None:
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise ModelFormatError(part.weights, f"{called} gives values that are not finite; accepted: finite ones")


def _raise_if_out_of_memory(error: Exception) -> None:
    """Raises: MemoryError. It is no fault of the model that this machine is too small."""
    if is_out_of_memory(error):
        raise MemoryError(_words(error)) from None


def _shown(x: Tensor) -> str:
    return f"a batch of shape {tuple(x.shape)}"


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:MAX_SHOWN_CHARACTERS] or type(error).__name__
