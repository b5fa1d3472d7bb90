"""Networks to be registered."""

from diffusers import UNet2DModel


def small_unet() -> UNet2DModel:
    """Unconditional, RGB, of 8 x 8 pixels."""
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
