"""Train the bundled classifier in whose features images of clothes are compared: Fashion-MNIST at 32x32 pixels.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    python examples/train_fashion_classifier.py --data fashion --out timetuner_core/bundled/fashion-classifier

Writes `model.safetensors` and prints the accuracy on the test set, which it is not trained on. Seeded; eleven minutes
on two cores that other programs used, too.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from train_classifier import accuracy, train
from train_fashion import fashion

from timetuner_core.models.fashion_classifier import FashionClassifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="where Debian's dataset-fashion-mnist was unpacked")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-iters", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.monotonic()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    sets = {}
    for name in ("train", "t10k"):
        images, labels = fashion(args.data, name)
        sets[name] = images.float() / 127.5 - 1, labels
    classifier = FashionClassifier()
    train(classifier, *sets["train"], num_iters=args.num_iters, lr=3e-3, generator=generator)
    for name, (x0, labels) in sets.items():
        print(f"{name}: {accuracy(classifier, x0, labels)}")

    args.out.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.half() for name, weight in classifier.state_dict().items()}, args.out / "model.safetensors")
    print(f"wrote {args.out} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
