"""Every kind of diffusers model: loaded, called, differentiated, decoded, and refused when malformed."""

import json
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.core.conftest import normals, save_model, tiny_unet
from timetuner_core.catalog import GuidanceType
from timetuner_core.grids import make_timesteps, uniform_timesteps
from timetuner_core.models.loading import DiffusionModel, ModelFormatError, load_builtin, load_folder
from timetuner_core.noise_schedule import NoiseScheduleEDM, NoiseScheduleFlow
from timetuner_core.samplers import SAMPLERS
from timetuner_core.sampling.generate import Guidance, generate
from timetuner_core.tuners import EndToEndTuner, SolverTuner
from timetuner_core.tuning.problem import TuningState
from timetuner_core.tuning_setup import Experiment

NUM_CLASSES = 3
CONDITION_LENGTH, CONDITION_DIM = 2, 6


def attention_unet(**config: Any) -> Any:
    return tiny_unet(down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), **config)


def class_unet() -> Any:
    return attention_unet(num_class_embeds=NUM_CLASSES + 1)


def condition_unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": CONDITION_DIM,
    }
    return UNet2DConditionModel(**(defaults | config)).eval().requires_grad_(False)


def dit(**config: Any) -> Any:
    """Random throughout: its own initialisation leaves the output layers at zero."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "in_channels": 1,
        "out_channels": 2,
        "num_layers": 2,
        "norm_num_groups": 4,
        "sample_size": 4,
        "patch_size": 2,
        "num_embeds_ada_norm": NUM_CLASSES,
    }
    network = DiTTransformer2DModel(**(defaults | config)).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape))
    return network


def vae(**config: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 1,
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_size": 8,
        "scaling_factor": 0.5,
    }
    return AutoencoderKL(**(defaults | config)).eval().requires_grad_(False)


# Each kind with the name of the argument that its condition is.
KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "unet": (class_unet, "class_labels"),
    "condition-unet": (condition_unet, "encoder_hidden_states"),
    "dit": (dit, "class_labels"),
}


def save_kind(folder: Path, kind: str) -> Any:
    """Write a model of that kind with what classifier-free guidance needs, and give diffusers' own module."""
    module, saved = saved_kind(kind)
    for name, content in saved.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return module


@cache
def saved_kind(kind: str) -> tuple[Any, dict[str, bytes]]:
    """A module of that kind and the files of its folder; diffusers takes long to write them."""
    module = KINDS[kind][0]()
    with TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "dit":
            save_dit(folder, module)
        else:
            save_model(folder, module, {"null_class_label": NUM_CLASSES} if kind == "unet" else None)
        if kind == "condition-unet":
            tensors = {"conditions": conditions_of(kind, 5), "uncond_condition": conditions_of(kind, 1)}
            save_file(tensors, folder / "data.safetensors")
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return module, {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@cache
def loaded(kind: str, **options: Any) -> DiffusionModel:
    with TemporaryDirectory() as folder:
        save_kind(Path(folder), kind)
        return load_folder(Path(folder), **options)


def save_dit(folder: Path, module: Any) -> None:
    from diffusers import DDPMScheduler

    module.save_pretrained(folder / "transformer")
    DDPMScheduler().save_pretrained(folder / "scheduler")


def conditions_of(kind: str, rows: int) -> Tensor:
    if kind == "condition-unet":
        return normals(rows, CONDITION_LENGTH, CONDITION_DIM, seed=rows).float()
    return torch.arange(rows) % NUM_CLASSES


def inputs(rows: int = 4) -> tuple[Tensor, Tensor]:
    return normals(rows, 1, 4, 4).float(), torch.linspace(3.0, 900.0, rows)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_a_loaded_network_gives_what_diffusers_own_module_gives(kind: str) -> None:
    module, _ = saved_kind(kind)
    x, t_input = inputs()
    condition = conditions_of(kind, len(x))
    expected = module(x, t_input, **{KINDS[kind][1]: condition}).sample[:, :1]
    torch.testing.assert_close(loaded(kind).network(x, t_input, condition), expected, rtol=0, atol=1e-6)


def test_every_kind_says_what_conditions_it_takes(kind: str) -> None:
    model = loaded(kind)
    tensors = kind == "condition-unet"
    assert model.sample_shape == model.image_shape == (1, 4, 4)
    assert model.guidance_types == ("uncond", "classifier-free")
    assert model.num_classes == (0 if tensors else NUM_CLASSES)
    assert model.null_class_label == (None if tensors else NUM_CLASSES)
    assert model.condition_shape == ((CONDITION_LENGTH, CONDITION_DIM) if tensors else None)
    assert model.draw_conditions is not None
    drawn = model.draw_conditions(50, torch.Generator().manual_seed(0))
    allowed = {tuple(row.flatten().tolist()) for row in conditions_of(kind, 5)}
    assert {tuple(row.flatten().tolist()) for row in drawn} == allowed


def test_no_condition_means_the_one_that_stands_for_none(kind: str) -> None:
    model = loaded(kind)
    x, t_input = inputs()
    assert model.uncond_condition is not None
    explicit = model.uncond_condition.repeat(len(x), *[1] * (model.uncond_condition.ndim - 1))
    torch.testing.assert_close(model.network(x, t_input), model.network(x, t_input, explicit))
    assert not torch.allclose(model.network(x, t_input), model.network(x, t_input, conditions_of(kind, len(x))))


@pytest.mark.parametrize("guidance_type", ["uncond", "classifier-free"])
def test_forward_mode_agrees_with_finite_differences_and_autograd(kind: str, guidance_type: GuidanceType) -> None:
    model = loaded(kind, dtype=torch.float64)
    model_fn = model.model_fn(guidance_type, 2.0)
    conditions: Any = model.conditions(guidance_type, conditions_of(kind, 4))
    x, direction, r = normals(4, 1, 4, 4), normals(4, 1, 4, 4, seed=1), torch.tensor(0.98, dtype=torch.float64)

    def eps(r: Tensor) -> Tensor:
        return model_fn.predict(x, torch.tensor(0.6, dtype=torch.float64), r, **conditions).eps

    _, tangent = torch.func.jvp(eps, (r,), (torch.ones_like(r),))
    h = 1e-7
    torch.testing.assert_close(tangent, (eps(r + h) - eps(r - h)) / (2 * h), rtol=1e-5, atol=1e-6)
    assert tangent.abs().max() > 1e-3
    leaf = r.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((eps(leaf) * direction).sum(), leaf)
    torch.testing.assert_close(gradient, (tangent * direction).sum())


def test_forward_mode_works_in_single_precision(kind: str) -> None:
    x, t_input = inputs()
    tangents = []
    for dtype in (torch.float32, torch.float64):
        network = loaded(kind, dtype=dtype).network
        tangents.append(torch.func.jvp(partial(network, x), (t_input,), (torch.ones_like(t_input),))[1])
    torch.testing.assert_close(*tangents, rtol=1e-3, atol=1e-5)


def test_float64_is_float32_without_the_rounding(kind: str) -> None:
    x, t_input = inputs()
    single, double = (loaded(kind, dtype=dtype).network(x, t_input) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("options", "tolerance"), [({"dtype": torch.bfloat16}, 0.05), ({"channels_last": True}, 1e-5)])
def test_options_change_the_speed_and_not_the_answer(kind: str, options: dict[str, Any], tolerance: float) -> None:
    x, t_input = inputs()
    condition = conditions_of(kind, len(x))
    expected = loaded(kind).network(x, t_input, condition)
    output = loaded(kind, **options).network(x, t_input, condition)
    assert output.dtype == torch.float32
    assert output.is_contiguous()
    assert torch.linalg.vector_norm(output - expected) < tolerance * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize(
    "tuner",
    [
        EndToEndTuner(total_iters=2, start="given", batch_size=4, teacher_num_steps=4),
        SolverTuner(objective="solver", total_iters=1, start="given", batch_size=2, teacher_num_steps=4),
    ],
    ids=lambda tuner: str(tuner.objective),
)
def test_what_is_tuned_of_a_network_in_bfloat16_is_not_rounded_to_it(
    tmp_path: Path, tuner: EndToEndTuner | SolverTuner
) -> None:
    save_kind(tmp_path, "unet")
    experiment = Experiment(load_folder(tmp_path, dtype=torch.bfloat16), Guidance("uncond", 1.0), SAMPLERS["ddim"])
    problem = experiment.problem("noise", make_timesteps(experiment.model.noise_schedule, 2), 8, tuner.batch_size)
    assert problem.population.dtype == torch.float32
    *_, state = tuner.run(problem, TuningState.start(problem.timesteps))
    for values in (state.t_ratios, state.timesteps, state.memory):
        assert values.dtype == torch.float64
    moved = torch.cat([state.t_ratios, state.timesteps[1:-1]])
    assert bool((moved != moved.bfloat16().double()).any())


def test_a_compiled_network_gives_the_same_and_still_differentiates_in_forward_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The default backend wants a C++ compiler and a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    save_kind(tmp_path, "unet")
    plain, compiled = (load_folder(tmp_path, compile=compile).network for compile in (False, True))
    x, t_input = inputs()
    torch.testing.assert_close(compiled(x, t_input), plain(x, t_input))
    tangents = [torch.func.jvp(partial(f, x), (t_input,), (torch.ones_like(t_input),))[1] for f in (plain, compiled)]
    torch.testing.assert_close(*tangents)


def test_guided_samples_are_the_same_in_any_batch(kind: str) -> None:
    model = loaded(kind)
    condition = conditions_of(kind, 4)
    timesteps = uniform_timesteps(model.noise_schedule, 3)

    def sample(batch_size: int) -> Tensor:
        guidance = Guidance("classifier-free", 3.0)
        return generate(model, guidance, [0, 1, 2, 3], condition, timesteps, batch_size=batch_size)

    torch.testing.assert_close(sample(4), sample(1), rtol=1e-4, atol=1e-4)


def test_weights_under_diffusers_old_attention_names_are_found(tmp_path: Path) -> None:
    module = attention_unet()
    save_model(tmp_path, module)
    weights = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(weights).items():
        former = next((name.replace(f".{new}.", f".{old[new]}.") for new in old if f".{new}." in name), name)
        renamed[former] = tensor
    assert any(".proj_attn." in name for name in renamed)
    save_file(renamed, weights)
    x, t_input = inputs()
    torch.testing.assert_close(load_folder(tmp_path).network(x, t_input), module(x, t_input).sample)


LATENT_STATISTICS: list[dict[str, Any]] = [
    {"scaling_factor": 0.5},
    {"scaling_factor": 2.0, "shift_factor": 0.3},
    {"scaling_factor": 0.5, "latents_mean": [0.1], "latents_std": [2.0]},
]


@pytest.mark.parametrize("statistics", LATENT_STATISTICS)
def test_latents_are_scaled_as_diffusers_pipelines_do(statistics: dict[str, Any], tmp_path: Path) -> None:
    module = vae(**statistics)
    module.save_pretrained(tmp_path / "vae")
    save_model(tmp_path, tiny_unet())
    model = load_folder(tmp_path)
    assert (model.sample_shape, model.image_shape) == ((1, 4, 4), (3, 8, 8))
    images = normals(2, 3, 8, 8).float()
    mean = module.encode(images).latent_dist.mean
    shift = statistics.get("latents_mean", [statistics.get("shift_factor", 0.0)])[0]
    scale = statistics["scaling_factor"] / statistics.get("latents_std", [1.0])[0]
    latents = model.encode(images)
    torch.testing.assert_close(latents, (mean - shift) * scale)
    torch.testing.assert_close(model.decode(latents), module.decode(mean).sample, rtol=1e-4, atol=1e-5)


def test_a_model_of_400_training_steps_and_images_that_are_no_squares_is_that_of_diffusers(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    module = tiny_unet(sample_size=(4, 6))
    module.save_pretrained(tmp_path / "unet")
    scheduler = DDIMScheduler(400, clip_sample=False, timestep_spacing="trailing")
    scheduler.save_pretrained(tmp_path / "scheduler")
    model = load_folder(tmp_path)
    assert (model.sample_shape, model.noise_schedule.max_num_steps) == ((1, 4, 6), 400)
    scheduler.set_timesteps(5)
    timesteps = model.noise_schedule.time_of_model_input(scheduler.timesteps.double())
    samples = generate(model, Guidance("uncond", 1.0), [3, 4], None, torch.cat([timesteps, torch.zeros(1)]))
    x = torch.stack([torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    for t in scheduler.timesteps:
        x = scheduler.step(module(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(samples, x, rtol=1e-4, atol=1e-4)


def test_a_latent_model_is_tuned_in_latents_and_sampled_in_pixels(tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path / "vae")
    save_model(tmp_path, tiny_unet())
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_file({"images": images}, tmp_path / "data.safetensors")
    model = load_folder(tmp_path)
    assert model.draw_data is not None
    assert model.reference is not None
    x0, _ = model.draw_data(5, torch.Generator().manual_seed(0))
    expected = model.encode(images.float() / 127.5 - 1)
    assert all(torch.isclose(expected, row).flatten(1).all(1).any() for row in x0)
    assert model.reference.shape == (3, 3, 8, 8)

    timesteps = uniform_timesteps(model.noise_schedule, 2)
    arguments: Any = (model, Guidance("uncond", 1.0), [0, 1, 2], None, timesteps)
    latents, decoded = (generate(*arguments, batch_size=2, decode=decode) for decode in (False, True))
    assert latents.shape == (3, 1, 4, 4)
    torch.testing.assert_close(decoded, model.decode(latents))


def test_the_bundled_latent_model_gives_its_own_data_back() -> None:
    model = load_builtin("digits32-ldm")
    assert (model.sample_shape, model.image_shape, model.model_type) == ((2, 8, 8), (1, 32, 32), "v")
    assert model.reference is not None
    images = model.reference[:64]
    latents = model.encode(images)
    assert latents.square().mean() == pytest.approx(1, abs=0.1)
    # A peak signal to noise ratio above 38 dB.
    assert (model.decode(latents) - images).square().mean() < 4 * 10**-3.8


def scheduler_folder(folder: Path, class_name: str, **config: Any) -> Path:
    import diffusers

    save_model(folder, tiny_unet())
    getattr(diffusers, class_name)(**config).save_pretrained(folder / "scheduler")
    return folder


def change_config(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


VP_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
    ("DDIMScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    ("DDIMScheduler", {"trained_betas": [0.001, 0.01, 0.1], "num_train_timesteps": 3}),
    ("PNDMScheduler", {"steps_offset": 1, "skip_prk_steps": True}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {"prediction_type": "v_prediction"}),
]


@pytest.mark.parametrize(("class_name", "config"), VP_CONFIGS)
def test_the_noise_schedule_is_that_of_the_folders_scheduler(
    class_name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    import diffusers

    model = load_folder(scheduler_folder(tmp_path, class_name, **config))
    alphas_cumprod = getattr(diffusers, class_name)(**config).alphas_cumprod.double()
    n = len(alphas_cumprod)
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    torch.testing.assert_close(model.noise_schedule.marginal_alpha(t) ** 2, alphas_cumprod)
    # Step n of diffusers is fed as such, wherever its inference grid starts.
    torch.testing.assert_close(model.noise_schedule.model_input_time(t), torch.arange(n, dtype=torch.float64))
    assert model.model_type == ("v" if "prediction_type" in config else "noise")


@pytest.mark.parametrize("class_name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_zero_terminal_snr_keeps_every_log_finite(class_name: str, tmp_path: Path) -> None:
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    model = load_folder(scheduler_folder(tmp_path, class_name, **config))
    lambda_T = model.noise_schedule.marginal_lambda(torch.tensor(1.0, dtype=torch.float64))
    assert lambda_T == pytest.approx(math.log(1e-6), abs=1e-6)
    samples = generate(model, Guidance("uncond", 1.0), [0], None, uniform_timesteps(model.noise_schedule, 4))
    assert bool(samples.isfinite().all())


@pytest.mark.parametrize(
    ("class_name", "config", "shift"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 3.0),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}, 1.0),
        (
            "UniPCMultistepScheduler",
            {"use_flow_sigmas": True, "flow_shift": 2.0, "prediction_type": "flow_prediction"},
            2.0,
        ),
    ],
)
def test_flow_matching_is_read(class_name: str, config: dict[str, Any], shift: float, tmp_path: Path) -> None:
    model = load_folder(scheduler_folder(tmp_path, class_name, **config))
    assert isinstance(model.noise_schedule, NoiseScheduleFlow)
    assert (model.model_type, model.noise_schedule.shift) == ("flow", shift)
    assert model.noise_schedule.num_train_timesteps == 1000


@pytest.mark.parametrize("class_name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_is_preconditioned_as_diffusers_does(class_name: str, prediction_type: str, tmp_path: Path) -> None:
    import diffusers

    config = {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.7, "prediction_type": prediction_type}
    model = load_folder(scheduler_folder(tmp_path, class_name, **config))
    assert isinstance(model.noise_schedule, NoiseScheduleEDM)
    assert (model.noise_schedule.t_min, model.noise_schedule.T) == (0.01, 50.0)
    scheduler = getattr(diffusers, class_name)(**config)
    x, sigma = 3.0 * normals(2, 1, 4, 4).float(), torch.tensor(3.0)
    output = model.network(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma).expand(2))
    x0 = model.model_fn("uncond", 1.0).predict(x, sigma).x0
    torch.testing.assert_close(x0, scheduler.precondition_outputs(x, output, sigma), rtol=1e-5, atol=1e-5)


# Each has a name, the file that is wrong, how, and a word that the message must have.
BAD_CONFIGS: list[tuple[str, str, dict[str, Any], str]] = [
    ("unet", "unet/config.json", {"_class_name": "UNet1DModel"}, "UNet2DConditionModel"),
    ("unet", "unet/config.json", {"time_embedding_type": "fourier"}, "positional"),
    ("unet", "unet/config.json", {"class_embed_type": "timestep", "num_class_embeds": None}, "class_embed_type"),
    ("unet", "unet/config.json", {"layers_per_block": 10**9}, "layers_per_block"),
    ("unet", "unet/config.json", {"sample_size": 10**9}, "sample_size"),
    ("unet", "unet/config.json", {"sample_size": "4"}, "sample_size"),
    ("condition-unet", "unet/config.json", {"sample_size": None}, "sample_size"),
    ("condition-unet", "unet/config.json", {"out_channels": 3}, "out_channels"),
    ("condition-unet", "unet/config.json", {"num_class_embeds": 4}, "num_class_embeds"),
    ("condition-unet", "unet/config.json", {"addition_embed_type": "text", "cross_attention_dim": 64}, "addition"),
    ("condition-unet", "unet/config.json", {"cross_attention_dim": [6]}, "cross_attention_dim"),
    ("dit", "transformer/config.json", {"out_channels": 3}, "out_channels"),
    ("dit", "transformer/config.json", {"sample_size": 5}, "patch_size"),
    ("dit", "transformer/config.json", {"sample_size": 4096}, "patches"),
    ("dit", "transformer/config.json", {"num_layers": 10**9}, "num_layers"),
    ("dit", "transformer/config.json", {"_class_name": "UNet2DModel"}, "DiTTransformer2DModel"),
    ("dit", "scheduler/scheduler_config.json", {"_class_name": "VQDiffusionScheduler"}, "DDIMScheduler"),
    ("dit", "scheduler/scheduler_config.json", {"timestep_type": "continuous"}, "timestep_type"),
    ("dit", "scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "v_prediction"),
    ("dit", "scheduler/scheduler_config.json", {"trained_betas": [0.1, 2.0], "num_train_timesteps": 2}, "schedule"),
]
BAD_SCHEDULERS: list[tuple[str, dict[str, Any], str]] = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 0}, "shift"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": float("nan")}, "shift"),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas"),
    ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": -1}, "num_train_timesteps"),
    ("EDMEulerScheduler", {"sigma_min": 90.0}, "sigma_min"),
    ("EDMEulerScheduler", {"sigma_data": "big"}, "sigma_data"),
    ("EDMEulerScheduler", {"prediction_type": "sample"}, "epsilon"),
]


@pytest.mark.parametrize(("kind", "file", "changes", "word"), BAD_CONFIGS)
def test_a_configuration_that_cannot_be_used_is_refused_by_name(
    kind: str, file: str, changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    save_kind(tmp_path, kind)
    change_config(tmp_path / file, **changes)
    assert_refused(tmp_path, file, word)


@pytest.mark.parametrize(("class_name", "changes", "word"), BAD_SCHEDULERS)
def test_a_scheduler_that_gives_no_schedule_is_refused(
    class_name: str, changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    scheduler_folder(tmp_path, class_name)
    change_config(tmp_path / "scheduler/scheduler_config.json", **changes)
    assert_refused(tmp_path, "scheduler/scheduler_config.json", word)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"latent_channels": 2}, "latent_channels"),
        ({"out_channels": 1}, "in_channels"),
        ({"scaling_factor": 0.0}, "scaling_factor"),
        ({"latents_mean": [0.0, 1.0], "latents_std": [1.0, 1.0]}, "latents_mean"),
    ],
)
def test_a_vae_that_does_not_fit_is_refused(config: dict[str, Any], word: str, tmp_path: Path) -> None:
    save_model(tmp_path, tiny_unet())
    vae(**config).save_pretrained(tmp_path / "vae")
    assert_refused(tmp_path, "vae/config.json", word)


def no_transformer_weights(folder: Path) -> str:
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    return "transformer/diffusion_pytorch_model.safetensors"


def truncated_vae(folder: Path) -> str:
    vae().save_pretrained(folder / "vae")
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    return "vae/diffusion_pytorch_model.safetensors"


def nan_in_vae(folder: Path) -> str:
    vae().save_pretrained(folder / "vae")
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.conv_in.bias"][0] = torch.nan
    save_file(tensors, weights)
    return "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("spoil", [no_transformer_weights, truncated_vae, nan_in_vae])
def test_weights_that_cannot_be_used_are_refused_by_file(spoil: Callable[[Path], str], tmp_path: Path) -> None:
    save_kind(tmp_path, "dit")
    assert_refused(tmp_path, spoil(tmp_path), "safetensors")


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"uncond_condition": torch.zeros(2, CONDITION_LENGTH, CONDITION_DIM)}, "uncond_condition"),
        ({"conditions": torch.zeros(3, CONDITION_LENGTH, CONDITION_DIM + 1)}, "conditions"),
        ({"conditions": torch.full((3, CONDITION_LENGTH, CONDITION_DIM), torch.nan)}, "finite"),
        ({"images": torch.zeros(3, 1, 4, 4)}, "conditions"),
        (
            {"conditions": torch.zeros(3, 2, CONDITION_DIM), "uncond_condition": torch.zeros(1, 3, CONDITION_DIM)},
            "length",
        ),
    ],
)
def test_conditions_that_do_not_fit_are_refused(tensors: dict[str, Tensor], word: str, tmp_path: Path) -> None:
    save_kind(tmp_path, "condition-unet")
    save_file(tensors, tmp_path / "data.safetensors")
    assert_refused(tmp_path, "data.safetensors", word)


def test_a_tensor_conditioned_network_without_uncond_condition_offers_no_guidance(tmp_path: Path) -> None:
    save_model(tmp_path, condition_unet())
    model = load_folder(tmp_path)
    assert model.guidance_types == ("classifier-free",)
    assert model.condition_shape == (None, CONDITION_DIM)
    with pytest.raises(ValueError, match="needs a condition"):
        model.network(*inputs())


ISSUE = {"use_flow_sigmas": True, "flow_shift": 5.0, "prediction_type": "flow_prediction"}
ISSUES_SIGMAS = [1.0, 0.952, 0.883, 0.770, 0.557]


@pytest.mark.parametrize(
    "class_name",
    [
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_the_shift_of_a_converted_flow_scheduler_is_its_own_and_not_the_one_left_in_its_file(
    class_name: str, tmp_path: Path
) -> None:
    import diffusers

    save_model(tmp_path, tiny_unet())
    config = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0).config
    scheduler = getattr(diffusers, class_name).from_config(config, **ISSUE)
    scheduler.save_pretrained(tmp_path / "scheduler")
    saved = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert (saved["shift"], saved["flow_shift"]) == (1.0, 5.0)
    schedule = load_folder(tmp_path).noise_schedule
    sigmas = schedule.marginal_std(make_timesteps(schedule, 5))[:-1]
    assert sigmas.tolist() == pytest.approx(ISSUES_SIGMAS, abs=1e-3)
    scheduler.set_timesteps(5)
    if class_name == "UniPCMultistepScheduler":  # the others start at the shifted 1 - 1 / N
        assert sigmas.tolist() == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-5)
    else:
        assert schedule.model_input_time(sigmas_time(schedule, scheduler.sigmas[:-1])).tolist() == pytest.approx(
            scheduler.timesteps.tolist(), abs=1.001
        )


def sigmas_time(schedule: Any, sigmas: Tensor) -> Tensor:
    return schedule.inverse_lambda(torch.log((1 - sigmas.double()) / sigmas.double()))


@pytest.mark.parametrize("num_train_timesteps", [2, 10, 20, 50])
def test_flow_matching_of_few_training_steps_has_diffusers_times_and_ends_at_clean_data(
    num_train_timesteps: int, tmp_path: Path
) -> None:
    import diffusers

    config = {"num_train_timesteps": num_train_timesteps}
    schedule = load_folder(scheduler_folder(tmp_path, "FlowMatchEulerDiscreteScheduler", **config)).noise_schedule
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    for num_steps in (1, 2, 5, 10):
        scheduler.set_timesteps(num_steps)
        timesteps = make_timesteps(schedule, num_steps)
        if num_train_timesteps < 20:
            torch.testing.assert_close(schedule.model_input_time(timesteps[:-1]), scheduler.timesteps.double())
            torch.testing.assert_close(schedule.marginal_std(timesteps), scheduler.sigmas.double(), rtol=0, atol=1e-6)
        assert schedule.marginal_std(timesteps[-1]) <= 0.05


def test_a_flow_network_of_one_training_step_is_fed_sigma_itself(tmp_path: Path) -> None:
    import diffusers

    config = {"num_train_timesteps": 1}
    schedule = load_folder(scheduler_folder(tmp_path, "FlowMatchEulerDiscreteScheduler", **config)).noise_schedule
    timesteps = make_timesteps(schedule, 5)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=schedule.marginal_std(timesteps)[:-1].tolist())  # The pipelines pass them so.
    torch.testing.assert_close(schedule.model_input_time(timesteps[:-1]), scheduler.timesteps.double())
    assert timesteps.tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0], abs=0.001)


@pytest.mark.parametrize("grid", ["uniform", "quadratic", "log_snr", "edm"])
def test_edm_with_a_large_sigma_min_ends_at_clean_data_as_diffusers_does(grid: Any, tmp_path: Path) -> None:
    import diffusers

    config = {"sigma_min": 0.4}
    schedule = load_folder(scheduler_folder(tmp_path, "EDMEulerScheduler", **config)).noise_schedule
    scheduler = diffusers.EDMEulerScheduler(**config)
    scheduler.set_timesteps(5)
    timesteps = make_timesteps(schedule, 5, grid)
    assert (timesteps[0].item(), timesteps[-1].item()) == (80.0, 0.0)
    if grid == "edm":
        torch.testing.assert_close(timesteps, scheduler.sigmas.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("class_name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "TCDScheduler"])
def test_epsilon_without_any_signal_at_the_last_step_is_refused(class_name: str, tmp_path: Path) -> None:
    folder = scheduler_folder(tmp_path, class_name, rescale_betas_zero_snr=True)
    assert_refused(folder, "scheduler/scheduler_config.json", "rescale_betas_zero_snr")
    change_config(folder / "scheduler/scheduler_config.json", prediction_type="sample")
    model = load_folder(folder)
    assert (model.model_type, model.noise_schedule.starts_without_signal) == ("x_start", True)


def vq_model() -> Any:
    from diffusers import VQModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "latent_channels": 1,
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
        "num_vq_embeddings": 16,
        "scaling_factor": 0.5,
    }
    return VQModel(**config).eval().requires_grad_(False)


def test_an_ldm_pipeline_is_decoded_by_its_vqvae_as_diffusers_does(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, LDMPipeline

    unet, vqvae = tiny_unet(), vq_model()
    LDMPipeline(vqvae=vqvae, unet=unet, scheduler=DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    model = load_folder(tmp_path)
    assert (model.sample_shape, model.image_shape) == ((1, 4, 4), (3, 8, 8))
    latents = normals(2, 1, 4, 4).float()
    torch.testing.assert_close(model.decode(latents), vqvae.decode(latents / 0.5).sample)


@pytest.mark.parametrize("name", ["controlnet", "adapter", "image_encoder", "motion_adapter", "prior", "brushnet"])
def test_a_pipeline_with_another_component_that_changes_the_images_is_refused_by_its_name(
    name: str, tmp_path: Path
) -> None:
    save_kind(tmp_path, "condition-unet")
    index = {"_class_name": "StableDiffusionControlNetPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "ControlNetModel"]}))
    assert_refused(tmp_path, "model_index.json", f"{name!r} is 'diffusers.ControlNetModel'")


def test_components_that_make_conditions_or_look_at_images_are_not_needed(tmp_path: Path) -> None:
    save_kind(tmp_path, "condition-unet")
    ignored = ["text_encoder", "text_encoder_2", "tokenizer", "safety_checker", "feature_extractor"]
    index: dict[str, Any] = {name: ["transformers", "Some"] for name in ignored}
    index |= {"image_encoder": [None, None], "requires_safety_checker": True, "_class_name": "StableDiffusionPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert load_folder(tmp_path).condition_shape == (CONDITION_LENGTH, CONDITION_DIM)


def test_a_pipeline_whose_decoder_is_not_there_is_refused(tmp_path: Path) -> None:
    save_kind(tmp_path, "unet")
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    assert_refused(tmp_path, "model_index.json", "no folder vae/")


@pytest.mark.parametrize("twice", ["vae", "transformer"])
def test_two_of_what_there_should_be_one_of_are_refused(twice: str, tmp_path: Path) -> None:
    save_kind(tmp_path, "unet")
    if twice == "transformer":
        dit().save_pretrained(tmp_path / "transformer")
        assert_refused(tmp_path, "transformer/config.json", "one network")
    else:
        vae().save_pretrained(tmp_path / "vae")
        vq_model().save_pretrained(tmp_path / "vqvae")
        assert_refused(tmp_path, "vqvae/config.json", "one autoencoder")


def assert_refused(folder: Path, file: str, word: str) -> None:
    with pytest.raises(ModelFormatError) as caught:
        load_folder(folder)
    assert caught.value.field == file
    assert word in str(caught.value)
