"""Where a pipeline's components are: all on one device, each on it in turn, or over several devices."""

from typing import Any, Literal

import torch
from accelerate.hooks import ModelHook, add_hook_to_module  # type: ignore[import-untyped]
from accelerate.utils import send_to_device  # type: ignore[import-untyped]

Placement = Literal["device", "offload", "balanced"]


class OnlyOne(ModelHook):  # type: ignore[misc]
    """Moves a component to the device for its call, and the one that was there before to the processor's memory.

    The hooks of diffusers' model offload follow the order of one call: as others join in the middle, text encoder,
    denoiser and decoder would be on the device together. These hooks keep to one, whatever comes next.
    """

    def __init__(self, device: torch.device, present: list[torch.nn.Module]) -> None:
        """Args: present: the component on the device, if one is; all hooks of a pipeline share the list."""
        self.execution_device, self._present = device, present

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self._present != [module]:
            while self._present:
                self._present.pop().to("cpu")
            module.to(self.execution_device)
            self._present.append(module)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


def offload(pipeline: Any, device: torch.device) -> None:
    """Keep a pipeline's components in the processor's memory, from where each comes to the device for its calls.

    Components that diffusers excludes from that, as they work outside of their `forward`, stay on the device.
    """
    present: list[torch.nn.Module] = []
    for name, component in pipeline.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        if name in pipeline._exclude_from_cpu_offload:
            component.to(device)
        else:
            add_hook_to_module(component, OnlyOne(device, present))


def check_balanced(pipeline: Any) -> None:
    """Refuse a pipeline of which diffusers has put a component on no device. Raises: MemoryError."""
    places = pipeline.hf_device_map or {}
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and places.get(name) in (None, "cpu"):
            raise MemoryError(f"component {name!r} of the pipeline fits no device; accepted: placement 'offload'")
