"""The wrapper against closed-form mixtures, and its guidance against the formulas it names."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.conftest import Network, Recorded, linear_betas, normals, predicting, small_mixture
from timetuner_core import NoiseScheduleVP, model_wrapper
from timetuner_core.models.mixtures import GaussianMixture

SCHEDULES = {"discrete": NoiseScheduleVP("discrete", betas=linear_betas(50)), "linear": NoiseScheduleVP("linear")}
T = torch.tensor([0.05, 0.31, 0.72, 0.99], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 0])
NULL = torch.tensor([2])  # small_mixture has two classes

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def exact_eps(mixture: GaussianMixture, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    return mixture(x, mixture.noise_schedule.model_input_time(t), labels)


@every_schedule
@pytest.mark.parametrize("model_type", ["noise", "x_start", "v", "score"])
def test_every_model_type_gives_the_exact_eps(model_type: Any, schedule: NoiseScheduleVP) -> None:
    mixture, x = small_mixture(schedule), normals(4, 2)
    model_fn = model_wrapper(predicting(mixture, schedule, model_type), schedule, model_type)
    torch.testing.assert_close(model_fn(x, T), exact_eps(mixture, x, T), atol=1e-11, rtol=1e-11)


def test_one_time_serves_the_whole_batch() -> None:
    mixture, x = small_mixture(), normals(4, 2)
    model_fn = model_wrapper(mixture, mixture.noise_schedule)
    assert torch.equal(model_fn(x, T[1]), model_fn(x, T[1].expand(4)))


def test_unconditional_sampling_shows_the_network_no_condition() -> None:
    mixture = small_mixture()
    network = Recorded(mixture)
    model_wrapper(network, mixture.noise_schedule)(normals(4, 2), T, LABELS, NULL)
    assert [len(args) for args in network.calls] == [2]


@every_schedule
def test_an_exact_classifier_at_scale_one_gives_the_conditional_eps(schedule: NoiseScheduleVP) -> None:
    mixture, x = small_mixture(schedule), normals(4, 2)
    model_fn = model_wrapper(mixture, schedule, guidance_type="classifier", classifier_fn=mixture.log_class_posterior)
    torch.testing.assert_close(model_fn(x, T, LABELS), exact_eps(mixture, x, T, LABELS), atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_classifier_guidance_adds_the_scaled_gradient_of_the_classifier(scale: float) -> None:
    mixture, x = small_mixture(), normals(4, 2).requires_grad_()
    model_fn = model_wrapper(
        mixture,
        mixture.noise_schedule,
        guidance_type="classifier",
        guidance_scale=scale,
        classifier_fn=mixture.log_class_posterior,
    )
    (gradient,) = torch.autograd.grad(mixture.log_class_posterior(x, T, LABELS).sum(), x)
    sigma_t = mixture.noise_schedule.marginal_std(T)[:, None]
    expected = exact_eps(mixture, x, T) - scale * sigma_t * gradient
    torch.testing.assert_close(model_fn(x, T, LABELS), expected, atol=1e-12, rtol=0)


def test_classifier_guidance_gives_the_network_the_null_condition() -> None:
    mixture = small_mixture()
    network = Recorded(mixture)
    model_fn = model_wrapper(
        network, mixture.noise_schedule, guidance_type="classifier", classifier_fn=mixture.log_class_posterior
    )
    model_fn(normals(4, 2), T, LABELS, NULL)
    assert [args[2].tolist() for args in network.calls] == [[2, 2, 2, 2]]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_classifier_free_guidance_extrapolates_in_one_batched_call(scale: float) -> None:
    mixture, x = small_mixture(), normals(4, 2)
    network = Recorded(mixture)
    model_fn = model_wrapper(network, mixture.noise_schedule, guidance_type="classifier-free", guidance_scale=scale)
    expected = scale * exact_eps(mixture, x, T, LABELS) + (1 - scale) * exact_eps(mixture, x, T)
    torch.testing.assert_close(model_fn(x, T, LABELS, NULL), expected, atol=1e-12, rtol=0)
    assert len(network.calls) == 1


def test_classifier_free_guidance_at_scale_one_pays_for_the_condition_only() -> None:
    mixture = small_mixture()
    network = Recorded(mixture)
    model_wrapper(network, mixture.noise_schedule, guidance_type="classifier-free")(normals(4, 2), T, LABELS)
    assert network.batch_sizes == [4]


def classifier_guided(mixture: GaussianMixture) -> Any:
    return model_wrapper(
        mixture,
        mixture.noise_schedule,
        guidance_type="classifier",
        guidance_scale=2.0,
        classifier_fn=mixture.log_class_posterior,
    )


def test_classifier_gradients_are_the_same_under_no_grad() -> None:
    model_fn, x = classifier_guided(small_mixture()), normals(4, 2)
    with torch.no_grad():
        sampled = model_fn(x, T, LABELS)
    assert torch.equal(sampled, model_fn(x, T, LABELS))
    assert not sampled.requires_grad


@pytest.mark.parametrize("guidance_type", ["uncond", "classifier", "classifier-free"])
def test_guided_eps_is_differentiable_in_x_and_time(guidance_type: Any) -> None:
    mixture = small_mixture()
    model_fn = model_wrapper(
        mixture,
        mixture.noise_schedule,
        guidance_type=guidance_type,
        guidance_scale=2.0,
        classifier_fn=mixture.log_class_posterior,
    )
    x, t = normals(4, 2).requires_grad_(), T.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t: model_fn(x, t, LABELS, NULL), (x, t), check_forward_ad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_steps", [1, 10, 50, 1000])
def test_a_discrete_network_sees_its_training_steps_counted_from_zero(num_steps: int, dtype: torch.dtype) -> None:
    network = Recorded(lambda x, t_input: x)
    model_fn = model_wrapper(network, NoiseScheduleVP("discrete", betas=linear_betas(num_steps)))
    model_fn(torch.zeros(num_steps, 2, dtype=dtype), torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps)
    torch.testing.assert_close(network.calls[0][1], torch.arange(num_steps).float(), atol=1e-4, rtol=0)


def test_a_continuous_network_sees_time_itself() -> None:
    network = Recorded(lambda x, t_input: x)
    model_wrapper(network, NoiseScheduleVP("linear"))(normals(4, 2), T)
    assert torch.equal(network.calls[0][1], T)


@pytest.mark.parametrize(("rows", "repeated"), [([1], [1, 1, 1, 1]), ([0, 1], [0, 1, 0, 1]), ([0, 1, 1, 0],) * 2])
@pytest.mark.parametrize("guidance_type", ["classifier", "classifier-free"])
def test_fewer_condition_rows_are_repeated_to_the_batch(
    guidance_type: Any, rows: list[int], repeated: list[int]
) -> None:
    mixture, x = small_mixture(), normals(4, 2)
    model_fn = model_wrapper(
        mixture,
        mixture.noise_schedule,
        guidance_type=guidance_type,
        guidance_scale=2.0,
        classifier_fn=mixture.log_class_posterior,
    )
    eps = model_fn(x, T, torch.tensor(rows), NULL)
    torch.testing.assert_close(eps, model_fn(x, T, torch.tensor(repeated), NULL.expand(4)), atol=1e-14, rtol=0)


def test_both_conditions_pass_through_the_condition_process() -> None:
    mixture, x = small_mixture(), normals(4, 2)
    names = {"dog": 0, "cat": 1, "": 2}
    by_name = model_wrapper(
        mixture,
        mixture.noise_schedule,
        guidance_type="classifier-free",
        guidance_scale=2.0,
        cond_process_fn=lambda texts: torch.tensor([names[text] for text in texts]),
    )
    by_label = model_wrapper(mixture, mixture.noise_schedule, guidance_type="classifier-free", guidance_scale=2.0)
    texts: Any = ["dog", "cat", "cat", "dog"]
    null_text: Any = [""]
    assert torch.equal(by_name(x, T, texts, null_text), by_label(x, T, LABELS, NULL))


def test_extra_arguments_reach_the_network_and_the_classifier() -> None:
    mixture, x = small_mixture(), normals(4, 2)

    def scaled(function: Network) -> Network:
        return lambda *args, scale: scale * function(*args)

    given = model_wrapper(
        scaled(mixture),
        mixture.noise_schedule,
        model_kwargs={"scale": 3.0},
        guidance_type="classifier",
        classifier_fn=scaled(mixture.log_class_posterior),
        classifier_kwargs={"scale": 2.0},
    )
    built_in = model_wrapper(
        lambda *args: 3.0 * mixture(*args),
        mixture.noise_schedule,
        guidance_type="classifier",
        guidance_scale=2.0,
        classifier_fn=mixture.log_class_posterior,
    )
    torch.testing.assert_close(given(x, T, LABELS), built_in(x, T, LABELS), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        ({"model_type": "velocity"}, "accepted: noise, x_start, v, score"),
        ({"guidance_type": "free"}, "accepted: uncond, classifier, classifier-free"),
        ({"guidance_type": "classifier"}, "needs a classifier_fn"),
    ],
)
def test_a_bad_wrapping_is_refused_naming_what_is_accepted(arguments: dict[str, Any], accepted: str) -> None:
    with pytest.raises(ValueError, match=re.escape(accepted)):
        model_wrapper(small_mixture(), SCHEDULES["linear"], **arguments)


@pytest.mark.parametrize(
    ("guidance_type", "conditions", "accepted"),
    [
        ("classifier-free", (), "needs a condition"),
        ("classifier", (), "needs a condition"),
        ("classifier-free", (LABELS,), "needs an uncond_condition"),
        ("classifier-free", (LABELS[:3], NULL), "3 rows for a batch of 4; accepted: as many rows as samples"),
        ("classifier-free", (LABELS, NULL[:0]), "0 rows for a batch of 4"),
        ("classifier", (LABELS.repeat(2),), "8 rows for a batch of 4"),
    ],
)
def test_a_bad_condition_is_refused_naming_what_is_accepted(
    guidance_type: Any, conditions: tuple[Tensor, ...], accepted: str
) -> None:
    mixture = small_mixture()
    model_fn = model_wrapper(
        mixture,
        mixture.noise_schedule,
        guidance_type=guidance_type,
        guidance_scale=2.0,
        classifier_fn=mixture.log_class_posterior,
    )
    with pytest.raises(ValueError, match=re.escape(accepted)):
        model_fn(normals(4, 2), T, *conditions)
