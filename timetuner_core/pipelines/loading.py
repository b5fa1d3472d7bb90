"""Loading a whole pipeline from a folder in the format of diffusers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from timetuner_core.models.folder_files import MODEL_INDEX, ModelFormatError, files_of
from timetuner_core.pipelines.files import check_pipeline_files, only_read_files, variant_of

if TYPE_CHECKING:
    from timetuner_core.pipelines.placement import Placement


def load_pipeline(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    placement: "Placement" = "device",
) -> Any:
    """The `DiffusionPipeline` of a folder, without its progress bar. Weights are read from safetensors only.

    Nothing is downloaded, and no code is run but that of diffusers and transformers. A folder that
    `inspecting.inspect_in_child` has accepted has all weights; diffusers itself leaves missing ones as they are.

    Args:
        placement: `device`: on `device` as a whole. `offload`: each component is there for its own calls only.
            `balanced`: over all devices, by diffusers' `device_map`, whatever `device` is.

    Raises:
        ModelFormatError: code, pickles, unreadable files, or weights that are missing.
        MemoryError: a component fits none of the devices that it is to be balanced over.
    """
    index = check_pipeline_files(folder)
    from timetuner_core.pipelines.components import check_classes

    pipeline_class = check_classes(index)
    with only_read_files(folder) as files:
        pipeline = pipeline_class.from_pretrained(
            files,
            dtype=dtype,
            variant=variant_of(files_of(folder), index),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **({"device_map": "balanced"} if placement == "balanced" else {}),
        )
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            for weight, tensor in component.named_parameters():
                if tensor.is_meta:
                    raise ModelFormatError(MODEL_INDEX, f"{name} has no weight {weight!r}; accepted: all weights")
            component.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    if placement == "device":
        return pipeline.to(device)
    from timetuner_core.pipelines.placement import check_balanced, offload

    if placement == "balanced":
        check_balanced(pipeline)
    else:
        offload(pipeline, torch.device(device))
    return pipeline
