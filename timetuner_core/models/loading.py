"""Loading models: diffusers-format folders (JSON configs and safetensors, never a pickle) and built-ins."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timetuner_core.catalog import BUILTIN_FOLDERS, BUILTINS, BUNDLED
from timetuner_core.models.data import ModelData, read_data, read_null_class
from timetuner_core.models.diffusion_model import DiffusionModel, draw_classes, draw_rows
from timetuner_core.models.digits_classifier import digit_features
from timetuner_core.models.fashion_classifier import fashion_features
from timetuner_core.models.folder_files import (
    DATA,
    METADATA,
    MODEL_FILES,
    MODEL_INDEX,
    READ_FOLDERS,
    SCHEDULER_CONFIG,
    TRANSFORMER_CONFIG,
    TRANSFORMER_WEIGHTS,
    UNET_CONFIG,
    UNET_WEIGHTS,
    VAE_CONFIG,
    VAE_WEIGHTS,
    ModelFormatError,
    read_json,
)
from timetuner_core.models.mixtures import GaussianMixture, gratings_mixture, ring_mixture
from timetuner_core.models.networks import LoadedNetwork, Options, load_network
from timetuner_core.models.schedulers import read_scheduler_config, stock_timesteps
from timetuner_core.models.vae import load_vae

__all__ = [
    "BUILTINS",
    "BUILTIN_FOLDERS",
    "BUILTIN_MIXTURES",
    "BUNDLED",
    "DATA",
    "METADATA",
    "MODEL_FILES",
    "SCHEDULER_CONFIG",
    "TRANSFORMER_CONFIG",
    "TRANSFORMER_WEIGHTS",
    "UNET_CONFIG",
    "UNET_WEIGHTS",
    "VAE_CONFIG",
    "VAE_WEIGHTS",
    "DiffusionModel",
    "ModelFormatError",
    "load_builtin",
    "load_folder",
    "read_scheduler_config",
]

# Components of a pipeline that make conditions or look at finished images: conditions come with each request.
NOT_NEEDED = ("bert", "feature_extractor", "safety_checker", "text_encoder", "tokenizer")

BUILTIN_FEATURES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "digits8": digit_features,
    "digits32-ldm": digit_features,
    "fashion32": fashion_features,
}
BUILTIN_MIXTURES: dict[str, Callable[[], GaussianMixture]] = {
    "mixture-ring": ring_mixture,
    "mixture-gratings": gratings_mixture,
}


def load_builtin(
    name: str,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    compile: bool = False,
) -> DiffusionModel:
    """A model that comes with the package: one of `BUILTINS`. For the options see `load_folder`; a mixture has
    no weights for them to bear on. Built-in models start at `T`, from where their published figures were measured.

    Raises:
        ModelFormatError: unknown name.
    """
    if name in BUILTIN_FOLDERS:
        model = load_folder(BUILTIN_FOLDERS[name], device, dtype=dtype, channels_last=channels_last, compile=compile)
        return replace(model, features=BUILTIN_FEATURES[name]())
    if name not in BUILTIN_MIXTURES:
        raise ModelFormatError("builtin", f"{name!r} is unknown; accepted: {', '.join(BUILTINS)}")
    mixture = BUILTIN_MIXTURES[name]()
    on_device = mixture.to(device)
    return DiffusionModel(
        network=on_device,
        classifier=on_device.log_class_posterior,
        noise_schedule=mixture.noise_schedule,
        model_type="noise",
        sample_shape=mixture.sample_shape,
        num_classes=mixture.num_classes,
        null_class_label=mixture.null_class_label,
        num_parameters=0,
        num_bytes=0,
        draw_data=mixture.sample,
        reference=mixture.sample(10_000, torch.Generator().manual_seed(0))[0],
        image_shape=mixture.sample_shape,
        uncond_condition=torch.tensor([mixture.null_class_label]),
        draw_conditions=draw_classes(mixture.num_classes),
        mixture=on_device,
    )


def load_folder(
    path: Path,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    compile: bool = False,
) -> DiffusionModel:
    """Load a diffusers-format folder:

    - `unet/`, a `UNet2DModel` or `UNet2DConditionModel`, or `transformer/`, a `DiTTransformer2DModel`;
    - `scheduler/`, see `models.schedulers.read_scheduler_config`;
    - `vae/`, optional, an `AutoencoderKL`, or `vqvae/`, a `VQModel`: the network works on its latents;
    - `model_index.json`, optional: a pipeline whose other components would change the result is refused;
    - `timetuner.json`, optional: `{"null_class_label": int}`, the last class embedding; a DiT has its own;
    - `data.safetensors`, optional: `images`, `(P, C, H, W)`, uint8 in 0..255 or float32 in -1..1, with `labels`,
      int64 `(P,)`, if there are classes; for a `UNet2DConditionModel`, `conditions` `(P, L, D)`, and
      `uncond_condition` `(1, L, D)`, without which there is no guidance.

    Everything is checked before a network is built in memory: weights against the configuration by name and
    shape, then that they are finite.

    Args:
        dtype: of the network's weights and activations; x, times and the VAE stay in float32.
        channels_last: keep activations in that memory format. compile: run the network by `torch.compile`,
            except where forward-mode derivatives are asked for.

    Raises:
        ModelFormatError: anything missing, malformed, unsupported, or at odds with the configuration.
    """
    _check_components(path)
    options = Options(dtype, channels_last, compile)
    network = load_network(path, device, options)
    scheduler_config = read_json(path, SCHEDULER_CONFIG)
    scheduler = read_scheduler_config(scheduler_config)
    null_class_label = read_null_class(path, network.num_embeddings)
    if network.has_null_class:
        null_class_label = network.num_embeddings - 1
    num_classes = network.num_embeddings - (null_class_label is not None)
    vae = load_vae(path, network.sample_shape, device, options)
    image_shape = network.sample_shape if vae is None else vae.image_shape
    data = read_data(path, image_shape, num_classes, network.condition_dim)
    null_class = None if null_class_label is None else torch.tensor([null_class_label])
    uncond_condition = data.uncond_condition if null_class is None else null_class
    codec: dict[str, Any] = {} if vae is None else {"encode": vae.encode, "decode": vae.decode}
    return DiffusionModel(
        network=_network(network, uncond_condition, device),
        classifier=None,
        noise_schedule=scheduler.noise_schedule,
        model_type=scheduler.model_type,
        sample_shape=network.sample_shape,
        num_classes=num_classes,
        null_class_label=null_class_label,
        num_parameters=network.num_parameters,
        num_bytes=network.num_bytes + (0 if vae is None else vae.num_bytes),
        draw_data=None if data.images is None else partial(data.draw, vae.encode if vae else lambda images: images),
        reference=data.images,
        image_shape=image_shape,
        condition_shape=_condition_shape(data, network.condition_dim),
        uncond_condition=uncond_condition,
        draw_conditions=_draw_conditions(data, num_classes),
        sigma_data=scheduler.sigma_data,
        clipping=scheduler.clipping,
        stock_timesteps=partial(stock_timesteps, scheduler_config),
        **codec,
        dtype=dtype,
    )


def _check_components(path: Path) -> None:
    """Refuse a pipeline with a component that changes its results and is not read, or that is not there."""
    if not (path / MODEL_INDEX).exists():
        return
    for name, component in read_json(path, MODEL_INDEX).items():
        # An entry that is no list is an option of the pipeline; an absent component is [null, null].
        if name.startswith("_") or not isinstance(component, list) or not any(component):
            continue
        if name in READ_FOLDERS:
            if not (path / name).is_dir():
                raise ModelFormatError(MODEL_INDEX, f"it names {name!r}, but there is no folder {name}/")
        elif not name.startswith(NOT_NEEDED):
            message = f"{name!r} is {'.'.join(map(str, component))[:200]!r}, which is not read but changes the images"
            accepted = ", ".join((*READ_FOLDERS, *NOT_NEEDED))
            raise ModelFormatError(MODEL_INDEX, f"{message}; accepted: a pipeline of {accepted}")


def _network(
    network: LoadedNetwork, uncond_condition: Tensor | None, device: torch.device | str
) -> Callable[..., Tensor]:
    """The network, with what stands for "no condition" put in where none is given."""
    default = None if uncond_condition is None else uncond_condition.to(device)

    def call(x: Tensor, t_input: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None and default is not None:
            condition = default.expand(len(x), *default.shape[1:])
        if condition is None and network.condition_dim is not None:
            raise ValueError("the network needs a condition; accepted: a tensor (B, L, D)")
        return network.call(x, t_input, condition)

    return call


def _condition_shape(data: ModelData, condition_dim: int | None) -> tuple[int | None, int] | None:
    if condition_dim is None:
        return None
    given = data.conditions if data.uncond_condition is None else data.uncond_condition
    return None if given is None else int(given.shape[1]), condition_dim


def _draw_conditions(data: ModelData, num_classes: int) -> Callable[[int, torch.Generator], Tensor] | None:
    if num_classes > 0:
        return draw_classes(num_classes)
    return None if data.conditions is None else draw_rows(data.conditions)
