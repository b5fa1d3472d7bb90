"""The bundled classifier knows digits it was not trained on, and its features tell digits from other things."""

import pytest
import torch
from sklearn.datasets import load_digits

from tests.core.conftest import normals
from timetuner_core.evaluation.distances import frechet_distance
from timetuner_core.models.digits_classifier import digit_features, digits_classifier, to_8x8
from timetuner_core.models.loading import DiffusionModel, load_builtin


@pytest.fixture(params=["digits8", "digits32-ldm"])
def model(request: pytest.FixtureRequest) -> DiffusionModel:
    return load_builtin(request.param)


def test_it_recognises_held_out_digits_of_either_size(model: DiffusionModel) -> None:
    """Every fifth was held out in training."""
    assert model.reference is not None
    images, labels = model.reference[::5], torch.tensor(load_digits().target[::5])
    recognised = digits_classifier()(to_8x8(images)).argmax(dim=1)
    assert float((recognised == labels).double().mean()) >= 0.98


def test_distances_in_its_features_tell_digits_from_noise_and_from_digits_of_one_class(model: DiffusionModel) -> None:
    assert model.reference is not None
    assert model.features is not None
    features = model.features(model.reference)
    assert features.shape == (1797, 32)
    zeros = features[torch.tensor(load_digits().target) == 0]
    noise = model.features(normals(500, *model.image_shape))
    same, one_class, other = (frechet_distance(x, features[1::2]) for x in (features[::2], zeros, noise))
    assert same is not None
    assert one_class is not None
    assert other is not None
    assert 0 <= 50 * same < one_class
    assert 50 * same < other


def test_pixels_out_of_range_look_as_they_are_shown() -> None:
    images = 3 * normals(4, 1, 8, 8)
    features = digit_features()
    assert torch.equal(features(images), features(images.clamp(-1, 1)))


def test_images_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\); accepted: \(B, 1, 8, 8\)"):
        digit_features()(torch.zeros(4, 3, 8, 8))
