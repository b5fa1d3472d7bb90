"""The autoencoder of a latent-diffusion model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timetuner_core.models.folder_files import (
    VAE_CONFIG,
    VAE_WEIGHTS,
    VQVAE_CONFIG,
    VQVAE_WEIGHTS,
    ModelFormatError,
    Shape,
)
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
) -> Autoencoder | None:
    """The `AutoencoderKL` in `vae/` or the `VQModel` in `vqvae/`, or None if there is neither. It runs in float32
    whatever the network does: half precision overflows in many.

    Latents of an `AutoencoderKL` are the posterior's mode, less `shift_factor`, times `scaling_factor` (or by
    channel, `latents_mean` and `latents_std`). Those of a `VQModel` are not quantized yet, times `scaling_factor`.

    Raises:
        ModelFormatError: see `load_module`; or one that does not fit the network.
    """
    is_vq = (path / VQVAE_CONFIG).exists()
    if is_vq and (path / VAE_CONFIG).exists():
        raise ModelFormatError(VQVAE_CONFIG, "there is a vae/ too; accepted: one autoencoder")
    if not is_vq and not (path / VAE_CONFIG).exists():
        return None
    config_name, weights_name = (VQVAE_CONFIG, VQVAE_WEIGHTS) if is_vq else (VAE_CONFIG, VAE_WEIGHTS)
    vae, _ = load_module(path, config_name, weights_name, ("VQModel",) if is_vq else ("AutoencoderKL",))
    channels, height, width = latent_shape
    if vae.config.latent_channels != channels:
        message = f"latent_channels is {vae.config.latent_channels}; accepted: {channels}, as the network has"
        raise ModelFormatError(config_name, message)
    if vae.config.in_channels != vae.config.out_channels:
        raise ModelFormatError(config_name, "out_channels must equal in_channels")
    upscale = 2 ** (len(vae.config.block_out_channels) - 1)
    check_features(vae.config.block_out_channels[0], upscale * height, upscale * width, config_name)
    shift, scale = (factor.to(device) for factor in _normalisation(vae.config, channels, config_name))
    vae = Options(torch.float32, options.channels_last).apply(vae, device)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        encoded = vae.encode(images.to(device).float())
        latents: Tensor = encoded.latents if is_vq else encoded.latent_dist.mode()
        return (latents - shift) * scale

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        images: Tensor = vae.decode(latents.to(device).float() / scale + shift).sample
        return images

    image_shape = (int(vae.config.out_channels), upscale * height, upscale * width)
    return Autoencoder(encode, decode, image_shape, size_in_bytes(vae))


def _normalisation(config: Any, channels: int, config_name: str) -> tuple[Tensor, Tensor]:
    """The shift that a VAE's latents are reduced by, and the factor after that, each `(C, 1, 1)` or `(1, 1, 1)`."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    try:
        if mean is None or std is None:
            mean, std = [config.get("shift_factor") or 0.0], [1.0]
        shift = torch.tensor(mean, dtype=torch.float32)
        scale = config.scaling_factor / torch.tensor(std, dtype=torch.float32)
        shift, scale = shift.reshape(-1, 1, 1), scale.reshape(-1, 1, 1)
        fits = {len(shift), len(scale)} <= {1, channels} and bool(torch.isfinite(shift).all())
        if fits and bool((torch.isfinite(scale) & (scale > 0)).all()):
            return shift, scale
    except (TypeError, ValueError, RuntimeError):
        pass
    keys = "scaling_factor, shift_factor, latents_mean, latents_std"
    raise ModelFormatError(config_name, f"{keys}: accepted: numbers, the last two a list of {channels}, scales above 0")
