"""The table of what differs between pipelines: all else is asked of the pipeline itself."""

# Attributes of a pipeline that hold the networks which are called in each step: those that predict noise, x0 or
# velocity, and what they are controlled by. A pipeline has one or several.
SHARED_NETWORKS = ("unet", "transformer", "transformer_2", "controlnet")

# Attributes of a pipeline that hold networks whose answers depend on prompts alone.
PROMPT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "bert")

# Arguments of a denoiser that tell it the time: a number per row, or one for all.
TIME_ARGUMENTS = ("timestep", "timesteps", "t")

# Arguments of a denoiser without a batch dimension, whatever their shape.
ARGUMENTS_WITHOUT_ROWS = ("txt_ids", "img_ids", "image_rotary_emb")

# Arguments of a denoiser with several rows for each image: AnimateDiff repeats the prompt for each frame.
ARGUMENTS_WITH_MORE_ROWS = ("encoder_hidden_states",)

# Pipelines and schedulers that were trained for few steps. There is no many-step teacher that a schedule could match.
PIPELINES_WITHOUT_TEACHER = (
    "ConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
)
SCHEDULERS_WITHOUT_TEACHER = ("CMStochasticIterativeScheduler", "LCMScheduler", "TCDScheduler")

# Output types of pipelines that refuse "latent". Pipelines that ignore it are noticed by their answer.
OUTPUT_TYPES = {
    "MarigoldDepthPipeline": "np",
    "MarigoldNormalsPipeline": "np",
    "MarigoldIntrinsicsPipeline": "np",
}

# Attributes of pipelines with the size of their latents by default, and with the pixels for each latent.
DEFAULT_SIZES = ("default_sample_size",)
VAE_FACTORS = (
    "vae_scale_factor_spatial",
    "vae_spatial_scale_factor",
    "vae_spatial_compression_ratio",
    "vae_scale_factor",
)
