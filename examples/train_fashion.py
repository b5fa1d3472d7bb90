"""Train the bundled model of clothes: a class-conditional diffusion model on Fashion-MNIST at 32x32 pixels.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    python examples/train_fashion.py --data fashion --out timetuner_core/bundled/fashion32 --sheet samples.png

A U-Net on pixels that predicts v: the decoder of an autoencoder would smooth what few steps get wrong. The loss and the
folder are those of `train_ldm.py`. Weights are stored in half precision. `data.safetensors` has 2,000 images of the
test set, which nothing is trained on. Seeded; 24 minutes on one of two cores that other programs used, too.
"""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from train_ldm import NUM_CLASSES, ddim, save_sheet, train_unet, write_folder

IMAGES_PER_CLASS = 200  # `data.safetensors` has as many.
PACKAGE_FOLDER = "usr/share/datasets/fashion-mnist"


def fashion(data: Path, part: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's `train` (60,000) or `t10k` (10,000) images, with a black margin of 2 pixels to 32x32: uint8
    `(P, 1, 32, 32)`, and int64 labels `(P,)`.

    Args:
        data: the folder that Debian's package was unpacked to; `/` if it is installed.
    """
    images, labels = (
        np.frombuffer(gzip.decompress((data / PACKAGE_FOLDER / f"{part}-{name}.gz").read_bytes())[header:], np.uint8)
        for name, header in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8))
    )
    padded = functional.pad(torch.tensor(images).view(-1, 1, 28, 28), (2, 2, 2, 2))
    return padded, torch.tensor(labels, dtype=torch.int64)


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """The indices of the first `count` images of each class, in order, `(10 * count,)`."""
    return torch.cat([(labels == label).nonzero()[:count, 0] for label in range(NUM_CLASSES)]).sort().values


def build_unet() -> UNet2DModel:
    """A v-predicting U-Net of 1.8 M parameters, attention at 4x4 only."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=NUM_CLASSES + 1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="where Debian's dataset-fashion-mnist was unpacked")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="where to write data and samples as a PNG")
    parser.add_argument("--num-iters", type=int, default=7200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.monotonic()
    (images, labels), (test_images, test_labels) = (fashion(args.data, part) for part in ("train", "t10k"))
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    unet = build_unet()
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    x0 = images.float() / 127.5 - 1
    train_unet(unet, scheduler, x0, labels, num_iters=args.num_iters, batch_size=32, lr=1.5e-3, generator=generator)

    write_folder(args.out, unet=unet.half(), scheduler=scheduler)
    held_out = first_of_each_class(test_labels, IMAGES_PER_CLASS)
    data = {"images": test_images[held_out].contiguous(), "labels": test_labels[held_out]}
    save_file(data, args.out / "data.safetensors")
    print(f"wrote {args.out} in {time.monotonic() - started:.0f} s")
    if args.sheet:
        noise = torch.Generator().manual_seed(args.seed)
        samples = ddim(unet.float(), scheduler, torch.arange(NUM_CLASSES).repeat(5), noise).clamp(-1, 1)
        save_sheet(args.sheet, torch.cat([data["images"][:20].float() / 127.5 - 1, samples]), NUM_CLASSES)


if __name__ == "__main__":
    main()
