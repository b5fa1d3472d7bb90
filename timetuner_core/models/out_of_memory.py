"""Telling that memory ran out, of whatever device."""

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. PyTorch raises a plain `RuntimeError` for the processor's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "DefaultCPUAllocator")
    )
