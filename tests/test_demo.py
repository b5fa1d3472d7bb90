"""The demo says what its figures say, and no more; the examples' pictures show what they say."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from timetuner_core.catalog import BUNDLED

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import demo
import pipeline_pictures

NOTHING = np.zeros((len(demo.CLASSES), 1, 32, 32))


def comparison(untuned: float, doubled: float, tuned: float) -> demo.Comparison:
    ways = [demo.Way(f"way-{calls}", calls, NOTHING, away) for calls, away in ((4, untuned), (8, doubled), (4, tuned))]
    return demo.Comparison(*ways)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ((6.0, 3.0, 2.0), "with 4 calls 3.0 times as near to the teacher's, nearer than untuned with 8"),
        ((6.0, 2.0, 4.0), "with 4 calls 1.5 times as near to the teacher's, not nearer than untuned with 8"),
        ((6.0, 2.0, 7.0), "with 4 calls no nearer to the teacher's, not nearer than untuned with 8"),
    ],
)
def test_its_sentence_follows_from_the_distances(figures: tuple[float, float, float], said: str) -> None:
    assert said in demo.in_a_sentence([comparison(*figures)])


def test_its_picture_has_a_block_for_each_number_of_calls(tmp_path: Path) -> None:
    heights = []
    for number in (1, 2):
        demo.write_picture(tmp_path / "demo.png", [comparison(3.0, 2.0, 1.0)] * number, NOTHING)
        heights.append(Image.open(tmp_path / "demo.png").height)
    assert heights[0] > 3 * 64
    assert heights[1] > 1.9 * heights[0]


def test_a_network_without_classes_computes_what_the_class_of_none_does() -> None:
    unet = UNet2DModel.from_pretrained(BUNDLED / demo.MODEL, subfolder="unet", torch_dtype=torch.float32)
    x, t = torch.randn((2, 1, 32, 32), generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    expected = unet(x, t, torch.tensor([10, 10])).sample
    found = pipeline_pictures.unconditional(unet, 10)(x, t).sample
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, unet(x, t, torch.tensor([3, 3])).sample)


def test_a_distance_is_the_mean_of_the_images_distances() -> None:
    one, other = np.zeros((2, 1, 2, 2)), np.zeros((2, 1, 2, 2))
    other[0], other[1] = 1.0, 3.0
    assert demo.distance(one, other) == pytest.approx((2 + 6) / 2)
