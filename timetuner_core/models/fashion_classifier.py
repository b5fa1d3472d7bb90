"""A space to measure distances between images of clothes in: what a small classifier sees in them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

NUM_FEATURES = 64
WEIGHTS = Path(__file__).parents[1] / "bundled" / "fashion-classifier" / "model.safetensors"


class FashionClassifier(nn.Module):
    """A network of 90 thousand parameters, 1x32x32 pixels in -1..1 to the logits of ten kinds of clothes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 16, 3, padding=1, stride=2)
        self.conv_2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv_3 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.hidden = nn.Linear(64 * 4 * 4, NUM_FEATURES)
        self.logits = nn.Linear(NUM_FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        """The layer before the logits, `(B, 64)`, of `(B, 1, 32, 32)`. GELU never leaves a feature at 0 for all images,
        so the features' covariance is not singular."""
        for conv in (self.conv_1, self.conv_2, self.conv_3):
            x = functional.gelu(conv(x))
        return functional.gelu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.features(x))
        return logits


@cache
def fashion_classifier() -> FashionClassifier:
    """The bundled one, frozen, on the CPU."""
    classifier = FashionClassifier()
    classifier.load_state_dict(load_file(WEIGHTS))
    return classifier.eval().requires_grad_(False)


def fashion_features() -> Callable[[Tensor], Tensor]:
    """The bundled classifier's features `(B, 64)` of images `(B, 1, 32, 32)`, on the CPU. Pixels are clamped to -1..1,
    where its training images lie."""
    classifier = fashion_classifier()

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return classifier.features(images.cpu().float().clamp(-1, 1))

    return features
