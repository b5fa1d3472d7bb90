"""Loading a whole pipeline in a worker, whose output is lines of its log alone."""

from pathlib import Path
from typing import Any

import torch

from timetuner_core.pipelines.loading import load_pipeline


def load_quietly(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline of a folder: see `load_pipeline`. From then on, its libraries draw no bars and log errors only.

    diffusers warns of prompts that CLIP cuts off by their text.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    return load_pipeline(folder, device, dtype)
