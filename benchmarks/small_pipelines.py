"""Stable Diffusion 1.5 in small, with random weights, for benchmarks of whole pipelines."""

import copy
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from tests.core.pipelines.kinds import KINDS


def kind(name: str) -> Any:
    """A pipeline of the tests."""
    return next(kind for kind in KINDS if kind.name == name).build()


def small_stable_diffusion(channels: int, sample_size: int, norm_num_groups: int) -> Any:
    """A pipeline with latents of `sample_size`, which the VAE doubles; its U-Net has two levels, from `channels` on."""
    pipeline = copy.copy(kind("sd15"))
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(channels, 2 * channels),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=pipeline.unet.config.cross_attention_dim,
        norm_num_groups=norm_num_groups,
    )
    pipeline.unet = unet.eval()
    return pipeline
