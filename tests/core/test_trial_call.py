"""Models whose files are all in order, but that cannot be called as sampling calls them, or give no images."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.core.conftest import save_model, tiny_unet
from tests.core.test_model_kinds import KINDS, condition_unet, save_kind, vae
from timetuner_core.models.loading import ModelFormatError, load_builtin, load_folder
from timetuner_core.models.trial_call import try_calls

UNET, UNET_WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
VAE, VAE_WEIGHTS = "vae/config.json", "vae/diffusion_pytorch_model.safetensors"


def unet_of_another_number_of_channels(folder: Path) -> None:
    """The skip connections of these blocks are for images of three channels."""
    down, up = ("SkipDownBlock2D", "DownBlock2D"), ("UpBlock2D", "SkipUpBlock2D")
    save_model(folder, tiny_unet(block_out_channels=(8, 8), down_block_types=down, up_block_types=up))


def unet_of_an_odd_size(folder: Path) -> None:
    """The blocks halve 7 to 4 and 2, and double that to 8."""
    blocks = ("ResnetDownsampleBlock2D",) * 2, ("ResnetUpsampleBlock2D",) * 2
    down, up = (*blocks[0], "DownBlock2D"), ("UpBlock2D", *blocks[1])
    channels = (8, 8, 8)
    save_model(
        folder, condition_unet(sample_size=7, block_out_channels=channels, down_block_types=down, up_block_types=up)
    )


def latent_model(folder: Path, **config: Any) -> None:
    save_model(folder, tiny_unet())
    vae(**config).save_pretrained(folder / "vae")


def decoder_that_doubles_once_only(folder: Path) -> None:
    """The encoder halves twice."""
    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",)
    latent_model(folder, block_out_channels=(4, 4, 4), down_block_types=down, up_block_types=up)


def enlarge(file: Path, tensor: str) -> None:
    tensors = load_file(file)
    tensors[tensor] = 3e38 * tensors[tensor].sign()
    save_file(tensors, file)


def network_that_overflows(folder: Path) -> None:
    """Each weight is finite, and their sums are not."""
    save_model(folder, tiny_unet())
    enlarge(folder / UNET_WEIGHTS, "conv_out.weight")


def decoder_that_overflows(folder: Path) -> None:
    latent_model(folder)
    enlarge(folder / VAE_WEIGHTS, "decoder.conv_out.weight")


REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "blocks for another number of channels": (
        unet_of_another_number_of_channels,
        UNET,
        "but got 1 channels .*; accepted: in_channels",
    ),
    "a size that the blocks cannot halve": (
        unet_of_an_odd_size,
        UNET,
        "sample_size is 7: the network, .*; accepted: a size .* such as 64",
    ),
    "a network that overflows": (network_that_overflows, UNET_WEIGHTS, "not finite"),
    "a decoder of another scale": (decoder_that_doubles_once_only, VAE, r"\(1, 3, 8, 8\); accepted: \(1, 3, 16, 16\)"),
    "a decoder that overflows": (decoder_that_overflows, VAE_WEIGHTS, "not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_sampled_is_refused_by_the_file_at_fault(name: str, tmp_path: Path) -> None:
    make, field, words = REFUSED[name]
    make(tmp_path)
    model = load_folder(tmp_path)  # The files alone show no fault.
    with pytest.raises(ModelFormatError, match=words) as caught:
        try_calls(model, tmp_path)
    assert caught.value.field == field


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_called_as_sampling_does_without_and_with_guidance(kind: str, tmp_path: Path) -> None:
    save_kind(tmp_path, kind)
    model, calls = load_folder(tmp_path), []

    def network(x: Tensor, t_input: Tensor, condition: Tensor | None = None) -> Tensor:
        calls.append((tuple(x.shape), None if condition is None else len(condition)))
        return model.network(x, t_input, condition)

    try_calls(dataclasses.replace(model, network=network), tmp_path)
    # Guidance calls the network for two rows: with the condition, and with the one that stands for none.
    assert calls == [((1, *model.sample_shape), None), ((2, *model.sample_shape), 2)]


def test_a_guided_model_that_fails_with_its_labels_only_is_refused(tmp_path: Path) -> None:
    save_kind(tmp_path, "unet")
    model = load_folder(tmp_path)

    def network(x: Tensor, t_input: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            raise IndexError("index out of range in self")
        return model.network(x, t_input)

    with pytest.raises(ModelFormatError, match=r"'classifier-free', fails \(index out of range in self\)"):
        try_calls(dataclasses.replace(model, network=network), tmp_path)


def test_a_model_without_a_condition_that_stands_for_none_is_called_with_conditions_alone(tmp_path: Path) -> None:
    save_model(tmp_path, condition_unet())
    try_calls(load_folder(tmp_path), tmp_path)


def test_the_encoder_is_tried_with_the_data_that_came(tmp_path: Path) -> None:
    latent_model(tmp_path)
    images = torch.zeros(2, 3, 8, 8)
    save_file({"images": images}, tmp_path / "data.safetensors")
    model = load_folder(tmp_path)
    try_calls(model, tmp_path)
    small = dataclasses.replace(model, encode=lambda images: images[:, :1, :2, :2])
    with pytest.raises(ModelFormatError, match=r"vae/config.json: the encoder, .*\(1, 1, 2, 2\); accepted: \(1, 1, 4"):
        try_calls(small, tmp_path)


def test_a_machine_that_is_too_small_is_no_fault_of_the_model(tmp_path: Path) -> None:
    def network(*_: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")

    save_kind(tmp_path, "unet")
    model = dataclasses.replace(load_folder(tmp_path), network=network)
    with pytest.raises(MemoryError, match="not enough memory"):
        try_calls(model, tmp_path)


@pytest.mark.parametrize("builtin", ["digits8", "digits32-ldm"])
def test_the_bundled_models_can_be_called(builtin: str) -> None:
    from timetuner_core.catalog import BUILTIN_FOLDERS

    try_calls(load_builtin(builtin), BUILTIN_FOLDERS[builtin])
