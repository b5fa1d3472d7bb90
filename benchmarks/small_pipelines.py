"""Stable Diffusion 1.5 in small, with random weights, for benchmarks of whole pipelines."""

import copy
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from tests.core.pipelines.kinds import KINDS


def kind(name: str) -> Any:
    """A pipeline of the tests."""
    return next(kind for kind in KINDS if kind.name == name).build()


def small_stable_diffusion(channels: int, sample_size: int, norm_num_groups: int, levels: int = 2) -> Any:
    """A pipeline with latents of `sample_size`, which the VAE doubles; its U-Net has `channels` at the first level.

    With two levels it has one layer in each. With four it has the blocks and layers of Stable Diffusion 1.5's own.
    """
    pipeline = copy.copy(kind("sd15"))
    with_attention = {2: 1, 4: 3}[levels]
    without = levels - with_attention
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=tuple(channels * min(2**level, 4) for level in range(levels)),
        layers_per_block=levels // 2,
        down_block_types=("CrossAttnDownBlock2D",) * with_attention + ("DownBlock2D",) * without,
        up_block_types=("UpBlock2D",) * without + ("CrossAttnUpBlock2D",) * with_attention,
        cross_attention_dim=pipeline.unet.config.cross_attention_dim,
        norm_num_groups=norm_num_groups,
    )
    pipeline.unet = unet.eval()
    return pipeline
