"""The bundled model of clothes draws the kind that is asked for, and its classifier can tell."""

import pytest
import torch
from safetensors.torch import load_file

from tests.core.conftest import normals
from timetuner_core.catalog import BUNDLED
from timetuner_core.evaluation.distances import frechet_distance
from timetuner_core.grids import uniform_timesteps
from timetuner_core.models.fashion_classifier import fashion_classifier, fashion_features
from timetuner_core.models.loading import DiffusionModel, load_builtin
from timetuner_core.sampling.generate import Guidance, generate

FOLDER = BUNDLED / "fashion32"
MAX_BYTES = 4e6


@pytest.fixture(scope="module")
def fashion32() -> DiffusionModel:
    return load_builtin("fashion32")


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    return load_file(FOLDER / "data.safetensors")["labels"]


def test_its_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("diffusion_pytorch_model.safetensors")) < MAX_BYTES


def test_the_classifier_recognises_clothes_it_was_not_trained_on(
    fashion32: DiffusionModel, labels: torch.Tensor
) -> None:
    assert fashion32.reference is not None
    recognised = fashion_classifier()(fashion32.reference).argmax(dim=1) == labels
    assert float(recognised.double().mean()) > 0.88


def test_distances_in_its_features_tell_clothes_from_noise_and_from_one_kind(
    fashion32: DiffusionModel, labels: torch.Tensor
) -> None:
    assert fashion32.reference is not None
    features = fashion_features()(fashion32.reference)
    noise = fashion_features()(normals(500, *fashion32.image_shape))
    half, one_kind, other = (frechet_distance(x, features[1::2]) for x in (features[::2], features[labels == 5], noise))
    assert half is not None and one_kind is not None and other is not None
    assert 0 <= 20 * half < min(one_kind, other)


def test_guided_samples_are_of_the_kind_that_is_asked_for(fashion32: DiffusionModel) -> None:
    asked = torch.arange(60) % 10
    timesteps = uniform_timesteps(fashion32.noise_schedule, 10)
    guidance = Guidance("classifier-free", 2.0)
    drawn = generate(fashion32, guidance, list(range(60)), asked, timesteps, sampler="dpmpp_2m", batch_size=60)
    recognised = fashion_classifier()(drawn.clamp(-1, 1)).argmax(dim=1) == asked
    assert float(recognised.double().mean()) > 0.8
