"""The formats of exports, as plain data: nothing here needs PyTorch."""

from dataclasses import dataclass, field


class ExportError(ValueError):
    """A schedule cannot be exported in a format. The text says why, and what is accepted."""


@dataclass(frozen=True)
class Exported:
    """A file to hand out, and what it cannot carry, one sentence for each."""

    content: bytes
    not_carried: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Format:
    """A format of exports.

    Attributes:
        ending: the end of the file's name.
        needs_torch: whether the export computes with the model's noise schedule.
        can_lose: whether `lossy` makes a difference: the format has no place for ratios or a learned solver.
    """

    title: str
    media_type: str
    ending: str
    needs_torch: bool = True
    can_lose: bool = False


FORMATS = {
    "json": Format("TimeTuner's own, to import", "application/json", ".json", needs_torch=False),
    "card": Format("model card", "text/markdown; charset=utf-8", ".md", needs_torch=False),
    "diffusers": Format("diffusers scheduler", "application/zip", ".zip"),
    "sigmas": Format("sigmas for diffusers", "application/json", ".sigmas.json", can_lose=True),
    "comfyui": Format("ComfyUI sigmas", "text/plain; charset=utf-8", ".comfyui.txt", can_lose=True),
    "comfyui-node": Format("ComfyUI node", "text/x-python; charset=utf-8", ".comfyui.py"),
    "sdcpp": Format("stable-diffusion.cpp", "text/plain; charset=utf-8", ".sdcpp.txt", can_lose=True),
}
