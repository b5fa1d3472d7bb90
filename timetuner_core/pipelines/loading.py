"""Loading a whole pipeline from a folder in the format of diffusers."""

from pathlib import Path
from typing import Any

import torch


def load_pipeline(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The `DiffusionPipeline` of a folder, without its progress bar. Weights are read from safetensors only."""
    from diffusers import DiffusionPipeline

    options = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True}
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, **options)  # type: ignore[no-untyped-call]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
