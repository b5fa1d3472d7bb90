"""Train the bundled model: a class-conditional DDPM on scikit-learn's 8x8 handwritten digits.

    python examples/train_digits.py --out timetuner_core/bundled/digits8

Writes a diffusers-format folder: `unet/`, `scheduler/`, `model_index.json`, plus the two files this
project adds, `timetuner.json` (the null class of classifier-free guidance) and `data.safetensors`
(the training images). Seeded; about ten minutes on two CPU cores.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

NUM_CLASSES = 10
NULL_CLASS = NUM_CLASSES  # the extra embedding that stands for "no class"


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits as uint8 images `(1797, 1, 8, 8)` in 0..255 and int64 labels `(1797,)`."""
    dataset = load_digits()
    images = torch.tensor(dataset.images * (255 / 16)).round().to(torch.uint8)
    return images[:, None], torch.tensor(dataset.target, dtype=torch.int64)


def build_unet() -> UNet2DModel:
    """An eps-predicting U-Net of 0.7 M parameters, attention at 4x4 only."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=NUM_CLASSES + 1,
    )


def train(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: Tensor,
    labels: Tensor,
    *,
    num_iters: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    class_dropout: float = 0.15,
    ema_decay: float = 0.998,
    generator: torch.Generator,
) -> None:
    """Minimise ||eps - eps_theta(x_t, t, c)||^2 (DDPM, eq. 14); leaves the averaged weights in `unet`."""
    x0 = images.float() / 127.5 - 1
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, weight_decay=1e-3)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, num_iters, pct_start=0.05)
    average = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
    )
    for i in range(num_iters):
        index = torch.randint(len(x0), (batch_size,), generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        eps = torch.randn(x0[index].shape, generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < class_dropout
        c = torch.where(dropped, NULL_CLASS, labels[index])
        x_t = scheduler.add_noise(x0[index], eps, t)
        loss = (eps - unet(x_t, t, c).sample).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        lr_schedule.step()
        average.update_parameters(unet)
        if i % 500 == 0:
            print(f"iteration {i:6d}  loss {loss.item():.4f}", flush=True)
    unet.load_state_dict(average.module.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-iters", type=int, default=9000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.monotonic()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = digits()
    unet = build_unet()
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)
    train(unet, scheduler, images, labels, num_iters=args.num_iters, generator=generator)

    DDPMPipeline(unet, scheduler).save_pretrained(args.out)
    metadata = {"null_class_label": NULL_CLASS}
    (args.out / "timetuner.json").write_text(json.dumps(metadata, indent=2) + "\n")
    save_file({"images": images, "labels": labels}, args.out / "data.safetensors")
    print(f"wrote {args.out} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
