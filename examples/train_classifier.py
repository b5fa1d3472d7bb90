"""Train the bundled classifier, in whose features digits are compared: scikit-learn's 8x8 handwritten digits.

    python examples/train_classifier.py --out timetuner_core/bundled/digits-classifier

Writes `model.safetensors` and prints the accuracy on every fifth image, which it is not trained on. Seeded; under a
minute on one CPU core.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from timetuner_core.models.digits_classifier import DigitsClassifier


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits in -1..1, `(1797, 1, 8, 8)`, and int64 labels `(1797,)`."""
    dataset = load_digits()
    images = torch.tensor(dataset.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(dataset.target, dtype=torch.int64)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel each way, its surroundings blank."""
    size = images.shape[-1]
    padded = functional.pad(images, (1, 1, 1, 1), value=-1)
    windows = torch.stack([padded[..., y : y + size, x : x + size] for y in range(3) for x in range(3)])
    return windows[torch.randint(9, (len(images),), generator=generator), torch.arange(len(images))]


def train(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    num_iters: int,
    batch_size: int = 64,
    lr: float = 5e-3,
    noise_std: float = 0.2,
    generator: torch.Generator,
) -> None:
    """Minimise the cross-entropy (label smoothing 0.1) of shifted, noisy images; leaves averaged weights."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=1e-2)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, num_iters, pct_start=0.1)
    average = torch.optim.swa_utils.AveragedModel(
        classifier, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    for i in range(num_iters):
        index = torch.randint(len(images), (batch_size,), generator=generator)
        x = shifted(images[index], generator)
        x = x + noise_std * torch.randn(x.shape, generator=generator)
        loss = functional.cross_entropy(classifier(x.clamp(-1, 1)), labels[index], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_schedule.step()
        average.update_parameters(classifier)
        if i % 500 == 0:
            print(f"iteration {i:6d}  loss {loss.item():.4f}", flush=True)
    classifier.load_state_dict(average.module.state_dict())


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> str:
    right = torch.cat([classifier(batch).argmax(dim=1) for batch in images.split(1000)]) == labels
    return f"{int(right.sum())} of {len(right)} right, {float(right.double().mean()):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-iters", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.monotonic()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = digits()
    held_out = torch.arange(len(images)) % 5 == 0
    classifier = DigitsClassifier()
    train(classifier, images[~held_out], labels[~held_out], num_iters=args.num_iters, generator=generator)
    for name, rows in (("trained on", ~held_out), ("held out", held_out)):
        print(f"{name}: {accuracy(classifier, images[rows], labels[rows])}")

    args.out.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), args.out / "model.safetensors")
    print(f"wrote {args.out} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
