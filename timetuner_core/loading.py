"""Loading models: diffusers-format folders (JSON configs and safetensors, never a pickle) and built-ins."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from timetuner_core.mixtures import GaussianMixture, gratings_mixture, ring_mixture
from timetuner_core.model_wrapper import GuidanceType, GuidedModel, ModelType, model_wrapper
from timetuner_core.noise_schedule import NoiseScheduleVP

UNET_CONFIG = "unet/config.json"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
METADATA = "timetuner.json"
DATA = "data.safetensors"
MODEL_FILES = (UNET_CONFIG, UNET_WEIGHTS, SCHEDULER_CONFIG, METADATA, DATA)

MODEL_TYPES: dict[str, ModelType] = {"epsilon": "noise", "sample": "x_start", "v_prediction": "v"}
MAX_PARAMETERS = 4_000_000_000

BUNDLED = Path(__file__).parent / "bundled"
BUILTIN_MIXTURES: dict[str, Callable[[], GaussianMixture]] = {
    "mixture-ring": ring_mixture,
    "mixture-gratings": gratings_mixture,
}
BUILTIN_FOLDERS = {"digits8": BUNDLED / "digits8"}
BUILTINS = (*BUILTIN_FOLDERS, *BUILTIN_MIXTURES)


class ModelFormatError(ValueError):
    """A model folder that cannot be used: which file or key is at fault, and what is accepted."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


@dataclass(frozen=True)
class DiffusionModel:
    """A frozen network with all that sampling and tuning need to know of it.

    Attributes:
        network: `network(x, t_input, labels=None)`; `classifier(x, t_input, labels) -> log p(c | x_t)` or None.
        num_classes: 0 for an unconditional model.
        null_class_label: the label that stands for "no class", which classifier-free guidance needs.
        draw_data: `(num_samples, generator) -> (x0, labels or None)`, or None if the model came without data.
        reference: a fixed set of data `(P, *sample_shape)` to measure distances to, or None.
    """

    network: Callable[..., Tensor]
    classifier: Callable[..., Tensor] | None
    noise_schedule: NoiseScheduleVP
    model_type: ModelType
    sample_shape: tuple[int, ...]
    num_classes: int
    null_class_label: int | None
    num_parameters: int
    draw_data: Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]] | None
    reference: Tensor | None

    @property
    def guidance_types(self) -> tuple[GuidanceType, ...]:
        """The kinds of guidance this model can be sampled with."""
        types: list[GuidanceType] = []
        if self.num_classes == 0 or self.null_class_label is not None:
            types.append("uncond")
        if self.classifier is not None:
            types.append("classifier")
        if self.num_classes > 0 and self.null_class_label is not None:
            types.append("classifier-free")
        return tuple(types)

    def model_fn(self, guidance_type: GuidanceType, guidance_scale: float) -> GuidedModel:
        """The guided eps prediction; see `model_wrapper`."""
        return model_wrapper(
            self.network,
            self.noise_schedule,
            self.model_type,
            guidance_type=guidance_type,
            guidance_scale=guidance_scale,
            classifier_fn=self.classifier,
        )

    def conditions(self, guidance_type: GuidanceType, labels: Tensor | None) -> dict[str, Tensor | None]:
        """`condition` and `uncond_condition` for `model_fn`, from class labels `(B,)`."""
        if guidance_type == "uncond":
            return {"condition": None, "uncond_condition": None}
        if guidance_type == "classifier" or labels is None:
            return {"condition": labels, "uncond_condition": None}
        return {"condition": labels, "uncond_condition": labels.new_full((1,), self.null_class_label or 0)}


def load_builtin(name: str, device: torch.device | str = "cpu") -> DiffusionModel:
    """A model that comes with the package: one of `BUILTINS`.

    Raises:
        ModelFormatError: unknown name.
    """
    if name in BUILTIN_FOLDERS:
        return load_folder(BUILTIN_FOLDERS[name], device)
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
        draw_data=mixture.sample,
        reference=mixture.sample(10_000, torch.Generator().manual_seed(0))[0],
    )


def load_folder(path: Path, device: torch.device | str = "cpu") -> DiffusionModel:
    """Load a diffusers-format folder: `unet/` (a `UNet2DModel`), `scheduler/`, and optionally
    `timetuner.json` (`{"null_class_label": int}`) and `data.safetensors` (`images`, uint8 `(P, C, H, W)` in
    0..255 or float32 in the network's own range, and `labels`, int64 `(P,)`).

    Everything is checked before the network is built in memory: weights against the configuration by
    name and shape, then that they are finite.

    Raises:
        ModelFormatError: anything missing, malformed, unsupported, or at odds with the configuration.
    """
    config = _read_json(path, UNET_CONFIG)
    network = _load_unet(config, path, device)
    noise_schedule, model_type = _read_scheduler(_read_json(path, SCHEDULER_CONFIG))
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    sample_shape = (int(network.config.in_channels), int(height), int(width))
    num_embeddings = int(network.config.num_class_embeds or 0)
    null_class_label = _read_null_class(path, num_embeddings)
    num_classes = num_embeddings - (null_class_label is not None)
    data = _read_data(path, sample_shape, num_classes)

    def call(x: Tensor, t_input: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None and null_class_label is not None:
            labels = torch.full((len(x),), null_class_label, device=x.device)
        prediction: Tensor = network(x, t_input, class_labels=labels).sample
        return prediction

    def draw(num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        assert data is not None
        images, labels = data
        index = torch.randint(len(images), (num_samples,), generator=generator)
        return images[index], None if labels is None else labels[index]

    return DiffusionModel(
        network=call,
        classifier=None,
        noise_schedule=noise_schedule,
        model_type=model_type,
        sample_shape=sample_shape,
        num_classes=num_classes,
        null_class_label=null_class_label,
        num_parameters=sum(p.numel() for p in network.parameters()),
        draw_data=None if data is None else draw,
        reference=None if data is None else data[0],
    )


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFormatError(name, "the file is missing; a diffusers-format folder has it") from None
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(name, f"not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelFormatError(name, "accepted: a JSON object")
    return content


def _load_unet(config: dict[str, Any], path: Path, device: torch.device | str) -> Any:
    from diffusers import UNet2DModel  # here, as it takes seconds that built-in mixtures need not wait

    class_name = config.get("_class_name")
    if class_name != "UNet2DModel":
        raise ModelFormatError(UNET_CONFIG, f"_class_name is {class_name!r}; accepted: 'UNet2DModel'")
    try:
        network: Any
        with torch.device("meta"):  # shapes only: a hostile configuration allocates nothing
            network = UNet2DModel.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # diffusers raises whatever its constructors meet
        raise ModelFormatError(UNET_CONFIG, f"no UNet2DModel can be built from it ({error})") from None
    if network.config.sample_size is None:
        raise ModelFormatError(UNET_CONFIG, "sample_size is null; accepted: the images' size in pixels")
    if network.config.in_channels != network.config.out_channels:
        raise ModelFormatError(UNET_CONFIG, "out_channels must equal in_channels")
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    _check_weights(path / UNET_WEIGHTS, expected)
    state = load_file(path / UNET_WEIGHTS)
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFormatError(UNET_WEIGHTS, f"tensor {name!r} has NaN or infinite values; accepted: finite ones")
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return network.requires_grad_(False).eval().to(device)


def _check_weights(file: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Names and shapes in the header against those the configuration asks for."""
    if not file.exists():
        raise ModelFormatError(UNET_WEIGHTS, "the file is missing; weights are accepted as safetensors only")
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFormatError(UNET_WEIGHTS, f"not a whole safetensors file ({error})") from None
    for name, shape in expected.items():
        if found.get(name) != shape:
            given = f"shape {found[name]}" if name in found else "none"
            message = f"tensor {name!r} should have shape {shape} by {UNET_CONFIG}, the file has {given}"
            raise ModelFormatError(UNET_WEIGHTS, message)
    if extra := sorted(set(found) - set(expected)):
        raise ModelFormatError(UNET_WEIGHTS, f"tensor {extra[0]!r} has no place in the model of {UNET_CONFIG}")


def _read_scheduler(config: dict[str, Any]) -> tuple[NoiseScheduleVP, ModelType]:
    from diffusers import DDPMScheduler

    prediction = config.get("prediction_type", "epsilon")
    if prediction not in MODEL_TYPES:
        raise ModelFormatError(
            SCHEDULER_CONFIG, f"prediction_type is {prediction!r}; accepted: {', '.join(MODEL_TYPES)}"
        )
    num_steps = config.get("num_train_timesteps", 1000)
    if not isinstance(num_steps, int) or not 1 <= num_steps <= 100_000:
        raise ModelFormatError(SCHEDULER_CONFIG, f"num_train_timesteps is {num_steps!r}; accepted: 1 to 100000")
    try:
        scheduler = DDPMScheduler.from_config(config)  # type: ignore[no-untyped-call]
        return NoiseScheduleVP("discrete", alphas_cumprod=scheduler.alphas_cumprod), MODEL_TYPES[prediction]
    except Exception as error:  # as above
        raise ModelFormatError(SCHEDULER_CONFIG, f"no noise schedule can be built from it ({error})") from None


def _read_null_class(path: Path, num_embeddings: int) -> int | None:
    if not (path / METADATA).exists():
        return None
    label = _read_json(path, METADATA).get("null_class_label")
    if label is None:
        return None
    if not isinstance(label, int) or isinstance(label, bool) or label != num_embeddings - 1 or num_embeddings < 2:
        accepted = f"null or {num_embeddings - 1}, the last class embedding" if num_embeddings > 1 else "null"
        raise ModelFormatError(METADATA, f"null_class_label is {label!r}; accepted: {accepted}")
    return label


def _read_data(path: Path, sample_shape: tuple[int, ...], num_classes: int) -> tuple[Tensor, Tensor | None] | None:
    if not (path / DATA).exists():
        return None
    try:
        tensors = load_file(path / DATA)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFormatError(DATA, f"not a whole safetensors file ({error})") from None
    images, labels = tensors.get("images"), tensors.get("labels")
    if images is None or tuple(images.shape[1:]) != sample_shape or len(images) < 2:
        given = "none" if images is None else f"shape {tuple(images.shape)}"
        accepted = f"shape (P, {', '.join(map(str, sample_shape))}) with P of 2 or more"
        raise ModelFormatError(DATA, f"tensor 'images': {given}; accepted: {accepted}")
    if images.dtype == torch.uint8:
        images = images.float() / 127.5 - 1
    if images.dtype != torch.float32 or not bool(torch.isfinite(images).all()):
        raise ModelFormatError(DATA, "tensor 'images': accepted: uint8, or finite float32")
    if num_classes == 0:
        return images, None
    if labels is None or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ModelFormatError(DATA, f"tensor 'labels': accepted: int64 of shape ({len(images)},)")
    if not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise ModelFormatError(DATA, f"tensor 'labels': accepted: values in 0..{num_classes - 1}")
    return images, labels
