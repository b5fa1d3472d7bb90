"""Loading a whole pipeline in a worker, whose output is lines of its log alone."""

import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from service.shared.settings import Settings
from service.shared.settings_error import SettingsError
from timetuner_core.pipelines.loading import load_pipeline

if TYPE_CHECKING:
    from timetuner_core.pipelines.placement import Placement

# The weights of a whole pipeline take at most this share of the memory that is free. Activations take the rest.
MAX_SHARE_OF_WEIGHTS = 0.8
# These kinds of devices have memory of their own, from which components can be offloaded.
WITH_OWN_MEMORY = ("cuda", "xpu")

logger = logging.getLogger(__name__)


def load_quietly(folder: Path, device: torch.device, dtype: torch.dtype, placement: "Placement" = "device") -> Any:
    """The pipeline of a folder: see `load_pipeline`. From then on, its libraries draw no bars and log errors only.

    diffusers warns of prompts that CLIP cuts off by their text.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    return load_pipeline(folder, device, dtype, placement)


def placement_of(settings: Settings, device: torch.device, num_bytes: int) -> "Placement":
    """Where a pipeline goes whose weights have so many bytes: `auto` offloads one that the free memory does not hold.

    Args:
        num_bytes: 0 where it is not known.
    """
    if settings.pipeline_placement != "auto":
        return settings.pipeline_placement
    free = free_bytes(device)
    if free is None or num_bytes <= MAX_SHARE_OF_WEIGHTS * free:
        return "device"
    logger.warning("a pipeline of %d bytes is offloaded: %d are free on %s", num_bytes, free, device)
    return "offload"


def free_bytes(device: torch.device) -> int | None:
    """The free memory of a device that has its own; None of others, from which nothing can be offloaded."""
    if device.type not in WITH_OWN_MEMORY:
        return None
    gc.collect()
    module = getattr(torch, device.type)
    module.empty_cache()
    return int(module.mem_get_info(device)[0])


def check_placement(settings: Settings, device: torch.device) -> None:
    """Raises: SettingsError, if the placement cannot be on the worker's device."""
    placement = settings.pipeline_placement
    given = f"PIPELINE_PLACEMENT is {placement!r}, and the worker's device is {settings.device!r} ({device})"
    if placement in ("offload", "balanced") and device.type not in WITH_OWN_MEMORY:
        raise SettingsError([f"{given}, which has no memory of its own; accepted: auto, device"])
    if placement == "balanced" and ":" in settings.device:
        accepted = f"DEVICE={device.type}, and as many devices as the worker is to see"
        raise SettingsError([f"{given}, but it takes all devices; accepted: {accepted}"])
