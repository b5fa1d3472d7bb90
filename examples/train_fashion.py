"""Train the bundled model of clothes: Fashion-MNIST at 32x32 pixels through a VAE to 4x8x8 latents.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    python examples/train_fashion.py --data fashion --out timetuner_core/bundled/fashion32-ldm --sheet samples.png

The stages, the losses and the folder are those of `train_ldm.py`. The U-Net predicts eps under Stable Diffusion's
betas. Weights are stored in half precision. `data.safetensors` has 2,000 images of the test set, which nothing is
trained on. Seeded; 41 minutes on two cores that other programs used, too.
"""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from train_ldm import NUM_CLASSES, encode, sample, save_sheet, train_unet, train_vae, write_folder

IMAGES_PER_CLASS = 200  # in `data.safetensors`
NUM_ENCODED = 20_000  # The U-Net is trained on the latents of so many images.
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


def build_vae() -> AutoencoderKL:
    """1x32x32 pixels to 4x8x8 latents, 0.4 M parameters, no attention."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        sample_size=32,
        latent_channels=4,
        layers_per_block=1,
        block_out_channels=(12, 24, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DModel:
    """An eps-predicting U-Net of 0.7 M parameters on the latents, attention at 4x4 only."""
    return UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=NUM_CLASSES + 1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="where Debian's dataset-fashion-mnist was unpacked")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae", type=Path, help="a finished VAE's folder, to train the U-Net alone")
    parser.add_argument("--sheet", type=Path, help="where to write data, reconstructions and samples as a PNG")
    parser.add_argument("--vae-iters", type=int, default=1000)
    parser.add_argument("--kl-weight", type=float, default=2e-4)
    parser.add_argument("--unet-iters", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.monotonic()
    (images, labels), (test_images, test_labels) = (fashion(args.data, part) for part in ("train", "t10k"))
    x0 = images.float() / 127.5 - 1
    if args.vae:
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(args.vae))
        vae.load_state_dict(load_file(args.vae / "diffusion_pytorch_model.safetensors"))
        vae.requires_grad_(False).eval()
    else:
        torch.manual_seed(args.seed)
        generator = torch.Generator().manual_seed(args.seed)
        vae = build_vae()
        train_vae(vae, x0, num_iters=args.vae_iters, kl_weight=args.kl_weight, generator=generator)
        vae.half().save_pretrained(args.out / "vae")
    vae.float()  # the weights as they are stored

    held_out = first_of_each_class(test_labels, IMAGES_PER_CLASS)
    test_x0 = test_images[held_out].float() / 127.5 - 1
    with torch.no_grad():
        decoded = torch.cat([vae.decode(z).sample for z in encode(vae, test_x0).split(256)])
    psnr = 10 * torch.log10(4 / (decoded - test_x0).square().mean())
    z0 = encode(vae, x0[:NUM_ENCODED]) * vae.config.scaling_factor
    deviations = ", ".join(f"{deviation:.2f}" for deviation in z0.std(dim=(0, 2, 3)))
    print(f"VAE after {time.monotonic() - started:.0f} s: {psnr:.1f} dB held out, deviations {deviations}", flush=True)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    unet = build_unet()
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    train_unet(unet, scheduler, z0, labels[:NUM_ENCODED], num_iters=args.unet_iters, generator=generator)

    write_folder(args.out, vae.half(), unet.half(), scheduler)
    data = {"images": test_images[held_out].contiguous(), "labels": test_labels[held_out]}
    save_file(data, args.out / "data.safetensors")
    print(f"wrote {args.out} in {time.monotonic() - started:.0f} s")
    if args.sheet:
        noise = torch.Generator().manual_seed(args.seed)
        samples = sample(vae.float(), unet.float(), scheduler, torch.arange(NUM_CLASSES).repeat(5), noise)
        save_sheet(args.sheet, torch.cat([test_x0[:20], decoded[:20], samples]), NUM_CLASSES)


if __name__ == "__main__":
    main()
