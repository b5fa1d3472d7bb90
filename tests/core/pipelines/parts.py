"""Tiny parts of pipelines, with random weights: each is built once per process, and pipelines share it."""

from functools import cache
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel, UNet2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WIDTH = 8  # Text embeddings have this width, unless a pipeline fixes another.
PROMPT = "a red square on a table"
WORDS = ("<s>", "<pad>", "</s>", "<unk>", *PROMPT.split(), "bad")


def seeded(build: Any, *args: Any, **kwargs: Any) -> Any:
    """`build(*args, **kwargs)` in eval mode; its weights do not depend on what was built before."""
    torch.manual_seed(0)
    return build(*args, **kwargs).eval()


@cache
def tokenizer(model_max_length: int = 16) -> Any:
    """One token per word, padded to the right, with a start and an end."""
    words = {word: index for index, word in enumerate(dict.fromkeys(WORDS))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", words["<s>"]), ("</s>", words["</s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=model_max_length,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def _clip_config(width: int) -> Any:
    return transformers.CLIPTextConfig(
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=77,
        vocab_size=32,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


@cache
def clip(width: int = WIDTH) -> Any:
    return seeded(transformers.CLIPTextModel, _clip_config(width))


@cache
def clip_with_projection(width: int = WIDTH) -> Any:
    return seeded(transformers.CLIPTextModelWithProjection, _clip_config(width))


@cache
def clip_vision(width: int = WIDTH) -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        intermediate_size=16,
        patch_size=4,
    )
    return seeded(transformers.CLIPVisionModelWithProjection, config)


@cache
def t5(width: int = WIDTH) -> Any:
    config = transformers.T5Config(
        vocab_size=32, d_model=width, d_ff=16, d_kv=4, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return seeded(transformers.T5EncoderModel, config)


@cache
def vae(latent_channels: int = 4, **config: Any) -> Any:
    """Latents are half the image's size."""
    defaults: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
    }
    return seeded(AutoencoderKL, latent_channels=latent_channels, **{**defaults, **config})


@cache
def flow_vae(latent_channels: int = 4) -> Any:
    """Latents are of the image's size, shifted and scaled."""
    return vae(
        latent_channels,
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


@cache
def unet(**config: Any) -> Any:
    return seeded(
        UNet2DModel,
        **{
            "block_out_channels": (4, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **config,
        },
    )


CONDITIONAL: dict[str, Any] = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 2,
}
SDXL: dict[str, Any] = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 2 * WIDTH,
    "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
}


@cache
def conditional_unet(**config: Any) -> Any:
    up_block_types = ("CrossAttnUpBlock2D", "UpBlock2D")
    return seeded(UNet2DConditionModel, **{**CONDITIONAL, "sample_size": 8, "up_block_types": up_block_types, **config})


@cache
def controlnet(**config: Any) -> Any:
    """A ControlNet. Output convolutions that start at zero, as usual, would leave the U-Net as it is."""
    model = seeded(ControlNetModel, **{**CONDITIONAL, "conditioning_embedding_out_channels": (4, 8), **config})
    with torch.no_grad():
        for block in (*model.controlnet_down_blocks, model.controlnet_mid_block):
            torch.nn.init.normal_(block.weight)
    return model
