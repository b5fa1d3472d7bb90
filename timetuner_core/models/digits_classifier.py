"""A space to measure distances between images of digits in: what a small classifier sees in them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

NUM_FEATURES = 32
WEIGHTS = Path(__file__).parents[1] / "bundled" / "digits-classifier" / "model.safetensors"


class DigitsClassifier(nn.Module):
    """A convolutional network of 22 thousand parameters, 1x8x8 pixels in -1..1 to the logits of ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv_2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.hidden = nn.Linear(32 * 4 * 4, NUM_FEATURES)
        self.logits = nn.Linear(NUM_FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        """The layer before the logits, `(B, 32)`, of `(B, 1, 8, 8)`. GELU, not ReLU: no feature is ever dead, which
        would leave the features' covariance singular."""
        x = functional.gelu(self.conv_1(x))
        x = functional.gelu(self.conv_2(x)).flatten(1)
        return functional.gelu(self.hidden(x))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.features(x))
        return logits


@cache
def digits_classifier() -> DigitsClassifier:
    """The bundled one, frozen, on the CPU."""
    classifier = DigitsClassifier()
    classifier.load_state_dict(load_file(WEIGHTS))
    return classifier.eval().requires_grad_(False)


def to_8x8(images: Tensor) -> Tensor:
    """`(B, 1, 8, 8)` or `(B, 1, 32, 32)`, as the classifier takes them: averaged to 8x8, clamped to -1..1, where
    its training images lie.

    Raises:
        ValueError: another shape.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) not in {(1, 8, 8), (1, 32, 32)}:
        raise ValueError(f"images have shape {tuple(images.shape)}; accepted: (B, 1, 8, 8) and (B, 1, 32, 32)")
    return functional.adaptive_avg_pool2d(images.float(), 8).clamp(-1, 1)


def digit_features() -> Callable[[Tensor], Tensor]:
    """The bundled classifier's features of images of digits, see `to_8x8`: `(B, 32)`, on the CPU."""
    classifier = digits_classifier()

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return classifier.features(to_8x8(images.cpu()))

    return features
