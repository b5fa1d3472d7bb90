"""The bundled model draws digits: close to the data, and of the class asked for."""

import pytest
import torch
from torch import Tensor

from tests.core.conftest import normals
from timetuner_core.evaluation.distances import frechet_distance
from timetuner_core.grids import uniform_timesteps
from timetuner_core.models.digits_classifier import digits_classifier, to_8x8
from timetuner_core.models.loading import DiffusionModel, load_builtin
from timetuner_core.sampling.generate import Guidance, generate


@pytest.fixture(scope="module")
def digits8() -> DiffusionModel:
    return load_builtin("digits8")


def samples(
    model: DiffusionModel, guidance: Guidance, labels: Tensor | None, num_samples: int, sampler: str, num_steps: int
) -> Tensor:
    timesteps = uniform_timesteps(model.noise_schedule, num_steps)
    seeds = list(range(num_samples))
    return generate(model, guidance, seeds, labels, timesteps, sampler=sampler, batch_size=128)


def test_unguided_samples_are_distributed_like_the_digits(digits8: DiffusionModel) -> None:
    assert digits8.reference is not None
    x0 = samples(digits8, Guidance("uncond", 1.0), None, 256, "ddim", 25)
    distance, noise_distance = (frechet_distance(x, digits8.reference) for x in (x0, normals(256, 1, 8, 8)))
    assert distance is not None
    assert noise_distance is not None
    assert distance < 1.0 < 0.1 * noise_distance
    assert float((x0.clamp(-1, 1) - x0).abs().mean()) < 0.05


def test_a_classifier_of_digits_recognises_guided_samples(digits8: DiffusionModel) -> None:
    """The bundled classifier, which `test_features.py` tries on digits that were held out."""
    asked = torch.arange(120) % 10
    drawn = samples(digits8, Guidance("classifier-free", 2.0), asked, 120, "dpmpp_2m", 10)
    recognised = digits_classifier()(to_8x8(drawn)).argmax(dim=1) == asked
    assert float(recognised.double().mean()) > 0.95


def test_the_same_noise_becomes_another_digit_under_another_label(digits8: DiffusionModel) -> None:
    guidance = Guidance("classifier-free", 2.0)
    threes, eights = (samples(digits8, guidance, torch.full((4,), label), 4, "dpmpp_2m", 10) for label in (3, 8))
    assert float((threes - eights).abs().mean()) > 0.1
