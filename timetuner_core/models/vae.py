"""The autoencoder of a latent-diffusion model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timetuner_core.models.folder_files import VAE_CONFIG, VAE_WEIGHTS, ModelFormatError, Shape
from timetuner_core.models.networks import Options, check_features, load_module, size_in_bytes


@dataclass(frozen=True)
class Autoencoder:
    """Maps images `(B, *image_shape)` in -1..1 to the network's latents `(B, *sample_shape)`, and back."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    image_shape: Shape
    num_bytes: int


def load_vae(
    path: Path, latent_shape: tuple[int, int, int], device: torch.device | str, options: Options
) -> Autoencoder:
    """The `AutoencoderKL` in `vae/`. It runs in float32 whatever the network does: half precision overflows in many.

    Latents are the posterior's mode, less `shift_factor`, times `scaling_factor` (or by channel, `latents_mean`
    and `latents_std`).

    Raises:
        ModelFormatError: see `load_module`; or one that does not fit the network.
    """
    vae, _ = load_module(path, VAE_CONFIG, VAE_WEIGHTS, ("AutoencoderKL",))
    channels, height, width = latent_shape
    if vae.config.latent_channels != channels:
        message = f"latent_channels is {vae.config.latent_channels}; accepted: {channels}, as the network has"
        raise ModelFormatError(VAE_CONFIG, message)
    if vae.config.in_channels != vae.config.out_channels:
        raise ModelFormatError(VAE_CONFIG, "out_channels must equal in_channels")
    upscale = 2 ** (len(vae.config.block_out_channels) - 1)
    check_features(vae.config.block_out_channels[0], upscale * height, upscale * width, VAE_CONFIG)
    shift, scale = (factor.to(device) for factor in _normalisation(vae.config, channels))
    vae = Options(torch.float32, options.channels_last).apply(vae, device)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        latents: Tensor = vae.encode(images.to(device).float()).latent_dist.mode()
        return (latents - shift) * scale

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        images: Tensor = vae.decode(latents.to(device).float() / scale + shift).sample
        return images

    image_shape = (int(vae.config.out_channels), upscale * height, upscale * width)
    return Autoencoder(encode, decode, image_shape, size_in_bytes(vae))


def _normalisation(config: Any, channels: int) -> tuple[Tensor, Tensor]:
    """The shift that a VAE's latents are reduced by, and the factor after that, each `(C, 1, 1)` or `(1, 1, 1)`."""
    mean, std = config.latents_mean, config.latents_std
    try:
        if mean is None or std is None:
            mean, std = [config.shift_factor or 0.0], [1.0]
        shift = torch.tensor(mean, dtype=torch.float32)
        scale = config.scaling_factor / torch.tensor(std, dtype=torch.float32)
        shift, scale = shift.reshape(-1, 1, 1), scale.reshape(-1, 1, 1)
        fits = {len(shift), len(scale)} <= {1, channels} and bool(torch.isfinite(shift).all())
        if fits and bool((torch.isfinite(scale) & (scale > 0)).all()):
            return shift, scale
    except (TypeError, ValueError, RuntimeError):
        pass
    keys = "scaling_factor, shift_factor, latents_mean, latents_std"
    raise ModelFormatError(VAE_CONFIG, f"{keys}: accepted: numbers, the last two a list of {channels}, scales above 0")
