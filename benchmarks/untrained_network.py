"""Save a network of the size of DDPM's for CIFAR-10, never trained, as a diffusers-format folder:

    python benchmarks/untrained_network.py FOLDER
    python benchmarks/untrained_network.py FOLDER --stand-in

For measurements of speed where the bundled networks are too small to say anything, as on a GPU. 3x32x32 images, ten
classes and the null class, 36 million weights drawn from seed 0. Sizes: Ho et al., "Denoising Diffusion Probabilistic
Models", NeurIPS 2020, appendix B.

With `--stand-in` the network stands in for a GPU on a processor: 36 transformer blocks on four small tokens of a 1x8x8
image, so that starting its operations takes nearly all of its time, whatever the batch.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel

NUM_CLASSES = 10


def ddpm_network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=NUM_CLASSES + 1,
    )


def stand_in() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=36,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=NUM_CLASSES,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stand-in", action="store_true")
    args = parser.parse_args()
    folder: Path = args.folder
    torch.manual_seed(0)
    network = stand_in() if args.stand_in else ddpm_network()
    network.save_pretrained(folder / ("transformer" if args.stand_in else "unet"))
    DDPMScheduler().save_pretrained(folder / "scheduler")
    (folder / "timetuner.json").write_text(json.dumps({"null_class_label": NUM_CLASSES}))
    print(f"{network.num_parameters() / 1e6:.1f} million weights in {folder}")


if __name__ == "__main__":
    main()
