"""Train the bundled latent-diffusion model: digits of 32x32 pixels through a VAE to 2x8x8 latents.

    python examples/train_ldm.py --out timetuner_core/bundled/digits32-ldm --sheet samples.png

Two stages (Rombach et al. 2022): an `AutoencoderKL`, then, with it frozen, a class-conditional v-predicting
U-Net on its latents. Writes a diffusers-format folder: `vae/`, `unet/`, `scheduler/`, `model_index.json`, plus
`timetuner.json` (the null class of classifier-free guidance) and `data.safetensors` (the training images).
Seeded; under fifteen minutes on two CPU cores. The sheet shows, from the top, two rows of digits, the same
through the VAE, and five rows of samples, a class per column.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

NUM_CLASSES = 10
NULL_CLASS = NUM_CLASSES  # the extra embedding that stands for "no class"


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 8x8 digits, bicubically at 32x32: uint8 `(1797, 1, 32, 32)`, and int64 labels `(1797,)`."""
    dataset = load_digits()
    images = torch.tensor(dataset.images, dtype=torch.float32)[:, None] * (255 / 16)
    smooth = functional.interpolate(images, size=(32, 32), mode="bicubic", align_corners=False)
    return smooth.round().clamp(0, 255).to(torch.uint8), torch.tensor(dataset.target, dtype=torch.int64)


def build_vae() -> AutoencoderKL:
    """1x32x32 pixels to 2x8x8 latents, 0.65 M parameters, no attention."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        sample_size=32,
        latent_channels=2,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DModel:
    """A v-predicting U-Net of 0.7 M parameters on the latents, attention at 4x4 only."""
    return UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=NUM_CLASSES + 1,
    )


def minimise(
    loss_fn: Callable[[], Tensor], network: torch.nn.Module, *, num_iters: int, lr: float, ema_decay: float
) -> None:
    """AdamW, one cycle of the learning rate; leaves the averaged weights in `network`."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-3)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, num_iters, pct_start=0.05)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
    )
    for i in range(num_iters):
        loss = loss_fn()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        lr_schedule.step()
        average.update_parameters(network)
        if i % 200 == 0:
            print(f"iteration {i:6d}  loss {loss.item():.5f}", flush=True)
    network.load_state_dict(average.module.state_dict())


def train_vae(
    vae: AutoencoderKL,
    x0: Tensor,
    *,
    num_iters: int,
    batch_size: int = 16,
    kl_weight: float,
    generator: torch.Generator,
) -> None:
    """Minimise the mean squared error plus `kl_weight` times the KL divergence per latent value (Kingma &
    Welling 2014), then set `scaling_factor` so that latents have unit standard deviation."""

    def loss_fn() -> Tensor:
        x = x0[torch.randint(len(x0), (batch_size,), generator=generator)]
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        error = (vae.decode(z).sample - x).square().mean()
        return error + kl_weight * posterior.kl().mean() / z[0].numel()

    minimise(loss_fn, vae, num_iters=num_iters, lr=3e-3, ema_decay=0.99)
    vae.requires_grad_(False).eval()
    vae.register_to_config(scaling_factor=round(1 / float(encode(vae, x0).square().mean().sqrt()), 4))


@torch.no_grad()
def encode(vae: AutoencoderKL, x0: Tensor) -> Tensor:
    """Latents, not yet scaled, `(P, C, 8, 8)`: the posterior's mode, as users of the model encode."""
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in x0.split(256)])


def train_unet(
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    z0: Tensor,
    labels: Tensor,
    *,
    num_iters: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    class_dropout: float = 0.15,
    generator: torch.Generator,
) -> None:
    """Minimise ||v - v_theta(z_t, t, c)||^2, v = alpha_t eps - sigma_t z_0 (Salimans & Ho 2022), or the same of eps if
    the scheduler's configuration says `epsilon`.

    Args:
        z0: scaled latents, or images, `(P, C, H, W)`.
    """
    predicts_v = scheduler.config.prediction_type == "v_prediction"

    def loss_fn() -> Tensor:
        index = torch.randint(len(z0), (batch_size,), generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        eps = torch.randn(z0[index].shape, generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < class_dropout
        c = torch.where(dropped, NULL_CLASS, labels[index])
        target = scheduler.get_velocity(z0[index], eps, t) if predicts_v else eps
        return (target - unet(scheduler.add_noise(z0[index], eps, t), t, c).sample).square().mean()

    minimise(loss_fn, unet, num_iters=num_iters, lr=lr, ema_decay=0.998)
    unet.requires_grad_(False).eval()


@torch.no_grad()
def ddim(unet: UNet2DModel, scheduler: DDIMScheduler, classes: Tensor, generator: torch.Generator) -> Tensor:
    """DDIM in 100 steps, unguided: scaled latents, or images, `(B, C, H, W)`."""
    size = unet.config.sample_size
    x = torch.randn((len(classes), unet.config.in_channels, size, size), generator=generator)
    scheduler.set_timesteps(100)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, classes).sample, t, x).prev_sample
    return x


@torch.no_grad()
def sample(
    vae: AutoencoderKL, unet: UNet2DModel, scheduler: DDIMScheduler, classes: Tensor, generator: torch.Generator
) -> Tensor:
    """Decoded images by `ddim`, `(B, 1, 32, 32)` in -1..1."""
    images: Tensor = vae.decode(ddim(unet, scheduler, classes, generator) / vae.config.scaling_factor).sample
    return images.clamp(-1, 1)


def save_sheet(path: Path, images: Tensor, columns: int, scale: int = 2) -> None:
    """`(B, 1, H, W)` in -1..1, row by row, two pixels apart."""
    spaced = functional.pad(images, (1, 1, 1, 1), value=-1)
    rows = [torch.cat(list(row[:, 0]), dim=1) for row in spaced.split(columns)]
    pixels = ((torch.cat(rows) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    sheet = Image.fromarray(pixels.numpy())
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="where to write digits, reconstructions and samples as a PNG")
    parser.add_argument("--vae-iters", type=int, default=1200)
    parser.add_argument("--kl-weight", type=float, default=2e-4)
    parser.add_argument("--unet-iters", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.monotonic()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = digits()
    x0 = images.float() / 127.5 - 1
    vae, unet = build_vae(), build_unet()
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    train_vae(vae, x0, num_iters=args.vae_iters, kl_weight=args.kl_weight, generator=generator)
    z0 = encode(vae, x0) * vae.config.scaling_factor
    with torch.no_grad():
        decoded = torch.cat([vae.decode(z / vae.config.scaling_factor).sample for z in z0.split(256)])
    psnr = 10 * torch.log10(4 / (decoded - x0).square().mean())
    print(f"VAE done in {time.monotonic() - started:.0f} s: {psnr:.1f} dB, standard deviation by channel ", end="")
    print(z0.std(dim=(0, 2, 3)).tolist(), flush=True)
    train_unet(unet, scheduler, z0, labels, num_iters=args.unet_iters, generator=generator)

    write_folder(args.out, vae=vae, unet=unet, scheduler=scheduler)
    save_file({"images": images, "labels": labels}, args.out / "data.safetensors")
    print(f"wrote {args.out} in {time.monotonic() - started:.0f} s")
    if args.sheet:
        noise = torch.Generator().manual_seed(args.seed)
        samples = sample(vae, unet, scheduler, torch.arange(NUM_CLASSES).repeat(5), noise)
        save_sheet(args.sheet, torch.cat([x0[:20], decoded[:20], samples]), NUM_CLASSES)


def write_folder(out: Path, **parts: Any) -> None:
    """Write everything but the data: the parts of the pipeline, each in a folder of its name."""
    out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        part.save_pretrained(out / name)
    index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    write_json(out / "model_index.json", {"_class_name": "DiffusionPipeline", **index})
    write_json(out / "timetuner.json", {"null_class_label": NULL_CLASS})


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
