"""The description of a model that a service gives its users."""

from typing import Any

from timetuner_core.clipping import clipping_text
from timetuner_core.models.diffusion_model import DiffusionModel


def describe(model: DiffusionModel, x0_error: float | None = None) -> dict[str, Any]:
    """The facts of a loaded model that requests depend on, as JSON: the service's `ModelSpec`.

    Args:
        x0_error: that of `find_starting_time`, at the time that the model starts at; None if it was not measured.
    """
    return {
        "sample_shape": list(model.sample_shape),
        "image_shape": list(model.image_shape),
        "model_type": model.model_type,
        "T": model.noise_schedule.T,
        "t_start": model.noise_schedule.t_start,
        "x0_error_at_start": x0_error,
        "t_min": model.noise_schedule.t_min,
        "clipping": clipping_text(model.clipping),
        "num_train_timesteps": model.noise_schedule.max_num_steps,
        "num_classes": model.num_classes,
        "null_class_label": model.null_class_label,
        "condition_shape": None if model.condition_shape is None else list(model.condition_shape),
        "guidance_types": list(model.guidance_types),
        "num_parameters": model.num_parameters,
        "has_uncond_condition": model.uncond_condition is not None,
        "has_conditions": model.draw_conditions is not None,
        "has_data": model.draw_data is not None,
    }
