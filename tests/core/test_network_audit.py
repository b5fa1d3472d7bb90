"""Every argument of every diffusers network that we read, against that network's own call.

Each argument is set to another value than its default, and a tiny network of it is saved and loaded. Our call must be
the network's own, or the refusal must name the argument. An argument that a newer diffusers adds fails here until
somebody gives it another value. `python -m tests.core.test_network_audit` prints what became of each.
"""

import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor

from tests.core.conftest import normals, save_model, tiny_unet
from timetuner_core.models.loading import ModelFormatError, load_folder

CONDITION_DIM, NUM_CLASSES = 6, 3
TWO_LEVELS: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (4, 8),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
UNETS_VALUES: dict[str, list[Any]] = {
    "act_fn": ["relu"],
    "attention_head_dim": [2],
    "block_out_channels": [(8, 4)],
    "center_input_sample": [True],
    "class_embed_type": ["timestep", "identity"],
    "downsample_padding": [0],
    "dropout": [0.5],
    "flip_sin_to_cos": [False],
    "freq_shift": [1],
    "in_channels": [{"in_channels": 2, "out_channels": 2}, {"in_channels": 2, "out_channels": 4}, 3],
    "layers_per_block": [2],
    "mid_block_scale_factor": [2],
    "norm_eps": [1e-3],
    "norm_num_groups": [2],
    "num_class_embeds": [NUM_CLASSES],
    "out_channels": [2, 3],
    "resnet_time_scale_shift": ["scale_shift"],
    "sample_size": [8, (4, 8), (7, 9), 28],
    "time_embedding_dim": [16],
}


class Network(NamedTuple):
    """A network with small values for its constructor, others to try (a dict sets several arguments), and the
    arguments whose other values are refused."""

    base: dict[str, Any]
    others: dict[str, list[Any]]
    refused: dict[str, Callable[[Any], bool]]


def always(value: Any) -> bool:
    return True


NETWORKS: dict[str, Network] = {
    "UNet2DModel": Network(
        {
            **TWO_LEVELS,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        {
            **UNETS_VALUES,
            "add_attention": [False],
            "attn_norm_num_groups": [2],
            "down_block_types": [("AttnDownBlock2D", "DownBlock2D"), ("ResnetDownsampleBlock2D", "DownBlock2D")],
            "downsample_type": ["resnet"],
            "mid_block_type": [None],
            "num_train_timesteps": [10],
            "time_embedding_type": ["fourier", {"time_embedding_type": "learned", "num_train_timesteps": 1000}],
            "up_block_types": [("UpBlock2D", "AttnUpBlock2D")],
            "upsample_type": ["resnet"],
        },
        {
            "class_embed_type": always,
            "in_channels": lambda value: value == 3,
            "out_channels": lambda value: value == 3,
            "sample_size": lambda value: value == (7, 9),
            "time_embedding_type": always,
        },
    ),
    "UNet2DConditionModel": Network(
        {
            **TWO_LEVELS,
            "cross_attention_dim": CONDITION_DIM,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        {
            **UNETS_VALUES,
            "addition_embed_type": [
                {"addition_embed_type": "text", "cross_attention_dim": 64},
                {
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 4,
                    "projection_class_embeddings_input_dim": 16,
                },
            ],
            "addition_embed_type_num_heads": [2],
            "addition_time_embed_dim": [4],
            "attention_type": ["gated"],
            "class_embeddings_concat": [True],
            "conv_in_kernel": [1],
            "conv_out_kernel": [1],
            "cross_attention_dim": [5, (6, 6)],
            "cross_attention_norm": ["layer_norm"],
            "down_block_types": [("DownBlock2D", "CrossAttnDownBlock2D")],
            "dual_cross_attention": [True],
            "encoder_hid_dim": [{"encoder_hid_dim": 5, "encoder_hid_dim_type": "text_proj"}],
            "encoder_hid_dim_type": [{"encoder_hid_dim": 5, "encoder_hid_dim_type": "text_proj"}],
            "mid_block_only_cross_attention": [True],
            "mid_block_type": [None, "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"],
            "num_attention_heads": [2],
            "only_cross_attention": [True],
            "projection_class_embeddings_input_dim": [8],
            "resnet_out_scale_factor": [2.0],
            "resnet_skip_time_act": [True],
            "reverse_transformer_layers_per_block": [
                {"transformer_layers_per_block": (1, 2), "reverse_transformer_layers_per_block": (2, 1)}
            ],
            "time_cond_proj_dim": [4],
            "time_embedding_act_fn": ["silu"],
            "time_embedding_type": ["fourier"],
            "timestep_post_act": ["silu"],
            "transformer_layers_per_block": [2],
            "up_block_types": [("CrossAttnUpBlock2D", "UpBlock2D")],
            "upcast_attention": [True],
            "use_linear_projection": [True],
        },
        {
            "addition_embed_type": always,
            "attention_type": always,
            "class_embed_type": always,
            "class_embeddings_concat": always,
            "cross_attention_dim": lambda value: value != 5,
            "dual_cross_attention": always,
            "encoder_hid_dim": always,
            "encoder_hid_dim_type": always,
            "in_channels": lambda value: value == 3,
            "num_class_embeds": always,
            "out_channels": lambda value: value == 3,
            "time_cond_proj_dim": always,
        },
    ),
    "DiTTransformer2DModel": Network(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 1,
            "out_channels": 2,
            "num_layers": 2,
            "norm_num_groups": 4,
            "sample_size": 4,
            "patch_size": 2,
            "num_embeds_ada_norm": NUM_CLASSES,
        },
        {
            "activation_fn": ["geglu"],
            "attention_bias": [False],
            "attention_head_dim": [8],
            "dropout": [0.5],
            "in_channels": [2, 3],
            "norm_elementwise_affine": [True],
            "norm_eps": [1e-3],
            "norm_num_groups": [2],
            "norm_type": ["ada_norm"],
            "num_attention_heads": [1],
            "num_embeds_ada_norm": [5, None],
            "num_layers": [1],
            "out_channels": [1, None, 3],
            "patch_size": [1, 3],
            "sample_size": [8, 28, 7],
            "upcast_attention": [True],
        },
        {
            "in_channels": lambda value: value == 3,
            "out_channels": lambda value: value == 3,
            "patch_size": lambda value: value == 3,
            "sample_size": lambda value: value == 7,
        },
    ),
    "AutoencoderKL": Network(
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 1,
            "block_out_channels": (4, 4),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "sample_size": 8,
        },
        {
            "act_fn": ["relu"],
            "block_out_channels": [(4, 8)],
            "down_block_types": [("DownEncoderBlock2D", "AttnDownEncoderBlock2D")],
            "force_upcast": [False],
            "in_channels": [{"in_channels": 1, "out_channels": 1}, 1],
            "latent_channels": [2],
            "latents_mean": [{"latents_mean": [0.1], "latents_std": [2.0]}, [0.1]],
            "latents_std": [[2.0]],
            "layers_per_block": [2],
            "mid_block_add_attention": [False],
            "norm_num_groups": [4],
            "out_channels": [1],
            "sample_size": [16],
            "scaling_factor": [0.5],
            "shift_factor": [0.3],
            "up_block_types": [("AttnUpDecoderBlock2D", "UpDecoderBlock2D")],
            "use_post_quant_conv": [False],
            "use_quant_conv": [False],
        },
        {
            "in_channels": lambda value: value == 1,
            "latent_channels": always,
            "out_channels": always,
        },
    ),
    "VQModel": Network(
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 1,
            "block_out_channels": (4, 4),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "num_vq_embeddings": 16,
            "sample_size": 8,
        },
        {
            "act_fn": ["relu"],
            "block_out_channels": [(4, 8)],
            "down_block_types": [("DownEncoderBlock2D", "AttnDownEncoderBlock2D")],
            "force_upcast": [True],
            "in_channels": [{"in_channels": 1, "out_channels": 1}, 1],
            "latent_channels": [2],
            "layers_per_block": [2],
            "lookup_from_codebook": [True],
            "mid_block_add_attention": [False],
            "norm_num_groups": [4],
            "norm_type": ["spatial"],
            "num_vq_embeddings": [8],
            "out_channels": [1],
            "sample_size": [16],
            "scaling_factor": [0.5],
            "up_block_types": [("AttnUpDecoderBlock2D", "UpDecoderBlock2D")],
            "vq_embed_dim": [2],
        },
        {
            "in_channels": lambda value: value == 1,
            "latent_channels": always,
            "out_channels": always,
        },
    ),
}
AUTOENCODERS = {"AutoencoderKL": "vae", "VQModel": "vqvae"}


def other_configs(name: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each argument with another value, and all of the constructor's arguments with it; first none."""
    network = NETWORKS[name]
    yield "", None, network.base
    for argument, values in network.others.items():
        for value in values:
            yield argument, value, network.base | (value if isinstance(value, dict) else {argument: value})


def randomised(module: Any) -> Any:
    """Some layers begin at zero, where no argument would matter."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.requires_grad_(False).copy_(0.3 * torch.randn(parameter.shape))
    return module.eval()


def save(folder: Path, name: str, module: Any) -> None:
    if name in AUTOENCODERS:
        save_model(folder, tiny_unet())
        module.save_pretrained(folder / AUTOENCODERS[name])
    elif name == "DiTTransformer2DModel":
        module.save_pretrained(folder / "transformer")
        diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    else:
        save_model(folder, module)


def condition_of(name: str, config: Any) -> dict[str, Tensor]:
    if name == "UNet2DConditionModel":
        return {"encoder_hidden_states": normals(2, 2, config.cross_attention_dim, seed=2).float()}
    if name == "DiTTransformer2DModel" or config.num_class_embeds:
        return {"class_labels": torch.tensor([0, 2])}
    return {}


def assert_the_network_is_called_as_it_calls_itself(name: str, module: Any, model: Any) -> None:
    x, times = normals(2, *model.sample_shape).float(), torch.tensor([3.0, 901.0])
    condition = condition_of(name, module.config)
    expected = module(x, times, **condition).sample[:, : x.shape[1]]
    torch.testing.assert_close(model.network(x, times, *condition.values()), expected, rtol=1e-4, atol=1e-5)


def assert_latents_are_those_of_diffusers_pipelines(module: Any, model: Any) -> None:
    config, images = module.config, normals(2, *model.image_shape).float()
    encoded = module.encode(images)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    if config.get("latents_mean") is not None and config.latents_std is not None:
        scaled = (latents - config.latents_mean[0]) / config.latents_std[0] * config.scaling_factor
    else:
        scaled = (latents - (config.get("shift_factor") or 0)) * config.scaling_factor
    torch.testing.assert_close(model.encode(images), scaled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(scaled), module.decode(latents).sample, rtol=1e-3, atol=1e-3)


def audit(name: str, argument: str, value: Any, config: dict[str, Any]) -> str:
    """Tell what became of one configuration; raises AssertionError if it is neither right nor refused by name."""
    try:
        module = randomised(getattr(diffusers, name)(**config))
    except Exception as error:  # diffusers' constructors raise anything
        return f"diffusers refuses it: {error}"
    must_be_refused = NETWORKS[name].refused.get(argument, lambda value: False)(value)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), name, module)
        try:
            model = load_folder(Path(folder))
        except ModelFormatError as refusal:
            assert must_be_refused, f"{refusal}"
            assert argument in refusal.message, f"{refusal}"
            return f"refused: {refusal.message}"
    assert not must_be_refused, "it was accepted"
    if name in AUTOENCODERS:
        assert_latents_are_those_of_diffusers_pipelines(module, model)
    else:
        assert_the_network_is_called_as_it_calls_itself(name, module, model)
    return "the same"


@pytest.mark.parametrize("name", NETWORKS)
def test_every_argument_is_honoured_or_refused_by_name(name: str) -> None:
    for argument, value, config in other_configs(name):
        try:
            audit(name, argument, value, config)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise AssertionError(f"{name} with {argument}={value!r}: {error}") from None


@pytest.mark.parametrize("name", NETWORKS)
def test_every_argument_of_the_installed_diffusers_is_tried(name: str) -> None:
    assert NETWORKS[name].others.keys() == set(inspect.signature(getattr(diffusers, name)).parameters)


def test_a_28_by_28_network_of_four_levels_is_refused_by_its_size(tmp_path: Path) -> None:
    levels: Any = {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4}
    save_model(tmp_path, tiny_unet(sample_size=28, block_out_channels=(4,) * 4, **levels))
    with pytest.raises(ModelFormatError, match="sample_size is 28; accepted: multiples of 8"):
        load_folder(tmp_path)


if __name__ == "__main__":
    for name in NETWORKS:
        for argument, value, config in other_configs(name):
            print(f"{name} {argument}={value!r}: {audit(name, argument, value, config)}")
