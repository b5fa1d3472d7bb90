"""Save a network of the size of DDPM's for CIFAR-10, never trained, as a diffusers-format folder:

    python benchmarks/untrained_network.py FOLDER

For measurements of speed where the bundled networks are too small to say anything, as on a GPU. 3x32x32 images, ten
classes and the null class, 36 million weights drawn from seed 0. Sizes: Ho et al., "Denoising Diffusion Probabilistic
Models", NeurIPS 2020, appendix B.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

NUM_CLASSES = 10


def main() -> None:
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=NUM_CLASSES + 1,
    )
    network.save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    (folder / "timetuner.json").write_text(json.dumps({"null_class_label": NUM_CLASSES}))
    print(f"{network.num_parameters() / 1e6:.1f} million weights in {folder}")


if __name__ == "__main__":
    main()
