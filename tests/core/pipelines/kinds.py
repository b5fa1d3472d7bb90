"""44 kinds of diffusers pipelines, tiny: what each consists of, and how it is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from tests.core.pipelines import parts
from tests.core.pipelines.parts import PROMPT, WIDTH, seeded

IMAGE_SIZE = 16

Parts = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline.

    Attributes:
        pipeline: a class of diffusers. parts: what it is built of, the native scheduler included.
        call: arguments of one call.
        num_steps: of a call, in which the native scheduler and a sampler of ours take the same steps.
        sampler: the one that is the native scheduler's.
    """

    name: str
    pipeline: str
    parts: Callable[[], Parts]
    call: Callable[[], Parts]
    sampler: str = "ddim"
    num_steps: int = 3

    def build(self) -> Any:
        pipeline = getattr(diffusers, self.pipeline)(**self.parts())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def picture(*shape: int) -> Tensor:
    return torch.rand(shape or (1, 3, IMAGE_SIZE, IMAGE_SIZE), generator=torch.Generator().manual_seed(1))


def mask() -> Tensor:
    half = torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    half[..., IMAGE_SIZE // 2 :] = 1
    return half


# Native schedulers, which leave x0 as it is.


def ddim(**config: Any) -> Any:
    return diffusers.DDIMScheduler(**{"clip_sample": False, **config})


def stable_diffusion_ddim(**config: Any) -> Any:
    return ddim(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        steps_offset=1,
        **config,
    )


def euler() -> Any:
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def prompted(**call: Any) -> Callable[[], Parts]:
    """A call with a prompt and guidance, which gives latents."""
    return lambda: {"prompt": PROMPT, "guidance_scale": 3.0, "output_type": "latent", **call}


# Pipelines of pixels and of classes


def ldm_unconditional() -> Parts:
    vqvae = diffusers.VQModel
    config = {"num_vq_embeddings": 16, "vq_embed_dim": 3, "norm_num_groups": 2, "block_out_channels": (4, 8)}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return {"vqvae": seeded(vqvae, **config, **blocks), "unet": parts.unet(), "scheduler": ddim()}


def ldm_text() -> Parts:
    scheduler = stable_diffusion_ddim()
    models = {"vqvae": parts.vae(), "bert": parts.clip(), "tokenizer": parts.tokenizer(77)}
    return {**models, "unet": parts.conditional_unet(), "scheduler": scheduler}


def dit() -> Parts:
    transformer = seeded(
        diffusers.DiTTransformer2DModel,
        sample_size=8,
        num_layers=2,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    return {"transformer": transformer, "vae": parts.vae(), "scheduler": ddim()}


# Stable Diffusion and what is built like it


def stable_diffusion(scheduler: Any = None, in_channels: int = 4, **unet: Any) -> Parts:
    return {
        "unet": parts.conditional_unet(in_channels=in_channels, **unet),
        "vae": parts.vae(),
        "text_encoder": parts.clip(),
        "tokenizer": parts.tokenizer(),
        "scheduler": scheduler or stable_diffusion_ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def controlled() -> Parts:
    return {**stable_diffusion(), "controlnet": parts.controlnet()}


def marigold() -> Parts:
    names = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
    scheduler = stable_diffusion_ddim(prediction_type="v_prediction")
    all_parts = stable_diffusion(scheduler, in_channels=8)
    return {name: all_parts[name] for name in names} | {"prediction_type": "depth"}


def animatediff() -> Parts:
    names = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
    adapter = seeded(
        diffusers.MotionAdapter,
        block_out_channels=(4, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    scheduler = ddim(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1)
    all_parts = stable_diffusion(scheduler)
    return {name: all_parts[name] for name in names} | {"motion_adapter": adapter}


def latent_consistency() -> Parts:
    scheduler = diffusers.LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    return stable_diffusion(scheduler, time_cond_proj_dim=8)


def sdxl(image_to_image: bool = False) -> Parts:
    # Image-to-image counts five numbers of size and aesthetics, text-to-image six of sizes and crops.
    numbers = 5 if image_to_image else 6
    unet = parts.SDXL | {"projection_class_embeddings_input_dim": numbers * 4 + WIDTH}
    return {
        "unet": parts.conditional_unet(**unet),
        "vae": parts.vae(),
        "text_encoder": parts.clip(),
        "tokenizer": parts.tokenizer(),
        "text_encoder_2": parts.clip_with_projection(),
        "tokenizer_2": parts.tokenizer(),
        "scheduler": euler(),
        **({"requires_aesthetics_score": True} if image_to_image else {}),
    }


def sdxl_controlled() -> Parts:
    return {**sdxl(), "controlnet": parts.controlnet(**parts.SDXL)}


SIMPLE_CROSS_ATTENTION: dict[str, Any] = {
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "cross_attention_dim": 32,
    "encoder_hid_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
}


def deepfloyd_if() -> Parts:
    unet = parts.conditional_unet(
        **SIMPLE_CROSS_ATTENTION,
        sample_size=IMAGE_SIZE,
        in_channels=3,
        out_channels=6,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        act_fn="gelu",
    )
    # The variance that the network predicts as well is dropped by the pipeline.
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, variance_type="fixed_small"
    )
    models = {"text_encoder": parts.t5(), "tokenizer": parts.tokenizer(77), "unet": unet}
    others = {"watermarker": None, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {**models, **others, "scheduler": scheduler}


def kandinsky() -> Parts:
    unet = parts.conditional_unet(
        **SIMPLE_CROSS_ATTENTION, out_channels=8, addition_embed_type="image", encoder_hid_dim_type="image_proj"
    )
    movq = seeded(
        diffusers.VQModel,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    scheduler = ddim(beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False, steps_offset=1)
    return {"unet": unet, "movq": movq, "scheduler": scheduler}


# Diffusion transformers on a discrete schedule


def pixart() -> Parts:
    transformer = seeded(
        diffusers.PixArtTransformer2DModel,
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        cross_attention_dim=16,
        out_channels=8,
    )
    models = {
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer(),
        "vae": parts.vae(),
        "transformer": transformer,
    }
    return {**models, "scheduler": ddim(beta_end=0.012)}


def hunyuan_dit() -> Parts:
    transformer = seeded(
        diffusers.HunyuanDiT2DModel,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=WIDTH,
        hidden_size=16,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
    )
    bert = transformers.BertConfig(
        vocab_size=32, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return {
        "transformer": transformer,
        "vae": parts.vae(),
        "text_encoder": seeded(transformers.BertModel, bert),
        "tokenizer": parts.tokenizer(77),
        "text_encoder_2": parts.t5(),
        "tokenizer_2": parts.tokenizer(256),
        "scheduler": diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.02, clip_sample=False),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


# Flow matching


def cogview4() -> Parts:
    transformer = seeded(
        diffusers.CogView4Transformer2DModel,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
    )
    glm = transformers.GlmConfig(
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=32,
        pad_token_id=1,
    )
    scheduler = flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return {
        "transformer": transformer,
        "vae": parts.vae(),
        "text_encoder": seeded(transformers.GlmModel, glm),
        "tokenizer": parts.tokenizer(),
        "scheduler": scheduler,
    }


def aura_flow() -> Parts:
    transformer = seeded(
        diffusers.AuraFlowTransformer2DModel,
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=WIDTH,
        pos_embed_max_size=64,
    )
    config = transformers.UMT5Config(vocab_size=32, d_model=WIDTH, d_ff=16, d_kv=4, num_layers=1, num_heads=2)
    return {
        "transformer": transformer,
        "vae": parts.vae(),
        "text_encoder": seeded(transformers.UMT5EncoderModel, config),
        "tokenizer": parts.tokenizer(),
        "scheduler": flow(shift=1.73),
    }


@parts.cache
def gemma() -> Any:
    config = transformers.Gemma2Config(
        head_dim=4,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=32,
        sliding_window=2,
    )
    return seeded(transformers.Gemma2Model, config)


def lumina2() -> Parts:
    transformer = seeded(
        diffusers.Lumina2Transformer2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=WIDTH,
    )
    models = {"transformer": transformer, "vae": parts.flow_vae(), "text_encoder": gemma()}
    return {**models, "tokenizer": parts.tokenizer(), "scheduler": flow(shift=6.0)}


def sana() -> Parts:
    transformer = seeded(
        diffusers.SanaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        sample_size=8,
    )
    vae = seeded(
        diffusers.AutoencoderDC,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    models = {"transformer": transformer, "vae": vae, "text_encoder": gemma()}
    return {**models, "tokenizer": parts.tokenizer(), "scheduler": flow(shift=7.0)}


def stable_diffusion_3() -> Parts:
    transformer = seeded(
        diffusers.SD3Transformer2DModel,
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
    )
    return {
        "transformer": transformer,
        "vae": parts.flow_vae(),
        "text_encoder": parts.clip_with_projection(),
        "tokenizer": parts.tokenizer(),
        "text_encoder_2": parts.clip_with_projection(),
        "tokenizer_2": parts.tokenizer(),
        "text_encoder_3": parts.t5(2 * WIDTH),
        "tokenizer_3": parts.tokenizer(),
        "scheduler": flow(shift=3.0),
    }


def flux() -> Parts:
    transformer = seeded(
        diffusers.FluxTransformer2DModel,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return {
        "transformer": transformer,
        "vae": parts.flow_vae(latent_channels=1),
        "text_encoder": parts.clip(),
        "tokenizer": parts.tokenizer(),
        "text_encoder_2": parts.t5(),
        "tokenizer_2": parts.tokenizer(),
        "scheduler": flow(use_dynamic_shifting=True, shift=3.0),
    }


def qwen_image() -> Parts:
    transformer = seeded(
        diffusers.QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    vae = seeded(
        diffusers.AutoencoderKLQwenImage,
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": WIDTH,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 32,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "rope_parameters": {"mrope_section": [1, 1, 0], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": WIDTH},
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": seeded(transformers.Qwen2_5_VLForConditionalGeneration, config),
        "tokenizer": parts.tokenizer(1024),
        "scheduler": flow(use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9),
    }


def z_image() -> Parts:
    transformer = seeded(
        diffusers.ZImageTransformer2DModel,
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=1,
        n_kv_heads=1,
        cap_feat_dim=WIDTH,
        axes_dims=(8, 4, 4),
        axes_lens=(256, 32, 32),
    )
    with torch.no_grad():  # left as torch.empty found them
        transformer.x_pad_token.fill_(1)
        transformer.cap_pad_token.fill_(1)
    config = transformers.Qwen3Config(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=32,
    )
    return {
        "transformer": transformer,
        "vae": parts.flow_vae(),
        "text_encoder": seeded(transformers.Qwen3Model, config),
        "tokenizer": parts.tokenizer(512),
        "scheduler": flow(shift=3.0),
    }


def chroma() -> Parts:
    transformer = seeded(
        diffusers.ChromaTransformer2DModel,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=16,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    models = {"transformer": transformer, "vae": parts.flow_vae(latent_channels=1), "text_encoder": parts.t5()}
    return {**models, "tokenizer": parts.tokenizer(), "scheduler": flow()}


# Videos


def wan() -> Parts:
    transformer = seeded(
        diffusers.WanTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    vae = seeded(
        diffusers.AutoencoderKLWan,
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    models = {"transformer": transformer, "vae": vae, "text_encoder": parts.t5(), "tokenizer": parts.tokenizer()}
    return {**models, "scheduler": flow(shift=7.0)}


def ltx() -> Parts:
    transformer = seeded(
        diffusers.LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
    )
    vae = seeded(
        diffusers.AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    )
    models = {"transformer": transformer, "vae": vae, "text_encoder": parts.t5(), "tokenizer": parts.tokenizer()}
    return {**models, "scheduler": flow(use_dynamic_shifting=True, shift_terminal=0.1)}


def cogvideox() -> Parts:
    transformer = seeded(
        diffusers.CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
    )
    vae = seeded(
        diffusers.AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    models = {"transformer": transformer, "vae": vae, "text_encoder": parts.t5(), "tokenizer": parts.tokenizer()}
    return {**models, "scheduler": ddim()}


def hunyuan_video() -> Parts:
    transformer = seeded(
        diffusers.HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 4, 4),
    )
    vae = seeded(
        diffusers.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    llama = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=32
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": seeded(transformers.LlamaModel, llama),
        "tokenizer": parts.tokenizer(256),
        "text_encoder_2": parts.clip(),
        "tokenizer_2": parts.tokenizer(),
        "scheduler": flow(shift=7.0),
    }


def mochi() -> Parts:
    transformer = seeded(
        diffusers.MochiTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = seeded(
        diffusers.AutoencoderKLMochi,
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    models = {"transformer": transformer, "vae": vae, "text_encoder": parts.t5(), "tokenizer": parts.tokenizer()}
    return {**models, "scheduler": flow()}


def unprompted(**call: Any) -> Callable[[], Parts]:
    return lambda: call


IMAGE_TO_IMAGE: dict[str, Any] = {"image": picture(), "strength": 0.8}
INPAINTING: dict[str, Any] = {"image": picture(), "mask_image": mask()}
SMALL: dict[str, Any] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
SHORT: dict[str, Any] = {"max_sequence_length": 16}
VIDEO: dict[str, Any] = {**SMALL, **SHORT, "num_frames": 9}
EMBEDDING = picture(1, WIDTH)

KINDS = (
    Kind(
        "ddpm",
        "DDPMPipeline",
        lambda: {"unet": parts.unet(), "scheduler": diffusers.DDPMScheduler(clip_sample=False)},
        unprompted(output_type="np"),
        "ddpm",
    ),
    Kind("ddim", "DDIMPipeline", lambda: {"unet": parts.unet(), "scheduler": ddim()}, unprompted(output_type="np")),
    Kind("ldm-uncond", "LDMPipeline", ldm_unconditional, unprompted(output_type="np")),
    Kind("ldm-text", "LDMTextToImagePipeline", ldm_text, prompted(output_type="np")),
    Kind("dit", "DiTPipeline", dit, unprompted(class_labels=[1], guidance_scale=3.0, output_type="np")),
    Kind("sd15", "StableDiffusionPipeline", stable_diffusion, prompted()),
    Kind("sd15-img2img", "StableDiffusionImg2ImgPipeline", stable_diffusion, prompted(**IMAGE_TO_IMAGE)),
    Kind(
        "sd15-inpaint",
        "StableDiffusionInpaintPipeline",
        lambda: stable_diffusion(in_channels=9),
        prompted(**INPAINTING, **SMALL),
    ),
    Kind("sd15-controlnet", "StableDiffusionControlNetPipeline", controlled, prompted(image=picture())),
    Kind(
        "instruct-pix2pix",
        "StableDiffusionInstructPix2PixPipeline",
        lambda: stable_diffusion(in_channels=8),
        prompted(image=picture()),
    ),
    Kind(
        "marigold",
        "MarigoldDepthPipeline",
        marigold,
        unprompted(image=picture(), processing_resolution=0, output_type="np"),
    ),
    Kind("animatediff", "AnimateDiffPipeline", animatediff, prompted(num_frames=2)),
    Kind(
        "sd2",
        "StableDiffusionPipeline",
        lambda: stable_diffusion(use_linear_projection=True, attention_head_dim=(2, 4)),
        prompted(),
    ),
    Kind(
        "sd21-v",
        "StableDiffusionPipeline",
        lambda: stable_diffusion(stable_diffusion_ddim(prediction_type="v_prediction")),
        prompted(),
    ),
    Kind("lcm", "LatentConsistencyModelPipeline", latent_consistency, prompted(), num_steps=1),
    Kind("sdxl", "StableDiffusionXLPipeline", sdxl, prompted(), "euler"),
    Kind(
        "sdxl-img2img",
        "StableDiffusionXLImg2ImgPipeline",
        lambda: sdxl(image_to_image=True),
        prompted(**IMAGE_TO_IMAGE),
        "euler",
    ),
    Kind(
        "sdxl-inpaint",
        "StableDiffusionXLInpaintPipeline",
        lambda: sdxl(image_to_image=True),
        prompted(**INPAINTING, **SMALL, strength=0.8),
        "euler",
    ),
    Kind("sdxl-controlnet", "StableDiffusionXLControlNetPipeline", sdxl_controlled, prompted(image=picture()), "euler"),
    Kind("deepfloyd-if", "IFPipeline", deepfloyd_if, prompted(output_type="np"), "ddpm"),
    Kind(
        "kandinsky22",
        "KandinskyV22Pipeline",
        kandinsky,
        unprompted(image_embeds=EMBEDDING, negative_image_embeds=-EMBEDDING, **SMALL, output_type="latent"),
    ),
    Kind("pixart-alpha", "PixArtAlphaPipeline", pixart, prompted(use_resolution_binning=False, **SHORT)),
    Kind("pixart-sigma", "PixArtSigmaPipeline", pixart, prompted(use_resolution_binning=False, **SHORT)),
    Kind("hunyuan-dit", "HunyuanDiTPipeline", hunyuan_dit, prompted(use_resolution_binning=False, **SMALL), "ddpm"),
    Kind("cogview4", "CogView4Pipeline", cogview4, prompted(**SMALL, **SHORT)),
    Kind("auraflow", "AuraFlowPipeline", aura_flow, prompted(**SMALL, **SHORT)),
    Kind("lumina2", "Lumina2Pipeline", lumina2, prompted(**SMALL, **SHORT)),
    Kind(
        "sana",
        "SanaPipeline",
        sana,
        prompted(height=32, width=32, **SHORT, use_resolution_binning=False, complex_human_instruction=None),
    ),
    Kind("sd3", "StableDiffusion3Pipeline", stable_diffusion_3, prompted(**SHORT)),
    Kind(
        "sd3-img2img",
        "StableDiffusion3Img2ImgPipeline",
        stable_diffusion_3,
        prompted(**IMAGE_TO_IMAGE, **SMALL, **SHORT),
    ),
    Kind("flux", "FluxPipeline", flux, prompted(**SMALL, **SHORT)),
    Kind("flux-img2img", "FluxImg2ImgPipeline", flux, prompted(**IMAGE_TO_IMAGE, **SMALL, **SHORT)),
    Kind(
        "qwen-image",
        "QwenImagePipeline",
        qwen_image,
        prompted(**SMALL, **SHORT, negative_prompt="bad", true_cfg_scale=3.0),
    ),
    Kind("z-image", "ZImagePipeline", z_image, prompted(**SMALL, **SHORT)),
    Kind("chroma", "ChromaPipeline", chroma, prompted(**SMALL, **SHORT, negative_prompt="bad")),
    Kind("wan", "WanPipeline", wan, prompted(**VIDEO)),
    Kind("ltx", "LTXPipeline", ltx, prompted(**{**VIDEO, "height": 32, "width": 32})),
    Kind("cogvideox", "CogVideoXPipeline", cogvideox, prompted(**VIDEO)),
    Kind(
        "hunyuan-video",
        "HunyuanVideoPipeline",
        hunyuan_video,
        prompted(**VIDEO, prompt_template={"template": "{}", "crop_start": 0}),
    ),
    Kind("mochi", "MochiPipeline", mochi, prompted(**{**VIDEO, "num_frames": 7})),
)


# Kinds whose native scheduler TimeTunerScheduler refuses, and its configuration.
REFUSED: dict[str, Parts] = {
    "consistency": {"_class_name": "CMStochasticIterativeScheduler", "sigma_min": 0.002, "sigma_max": 80.0},
    "svd": {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "timestep_type": "continuous"},
    "cogview3": {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 4.0},
    "stable-audio": {"_class_name": "CosineDPMSolverMultistepScheduler", "prediction_type": "v_prediction"},
}
