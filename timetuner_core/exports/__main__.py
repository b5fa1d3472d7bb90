"""`python -m timetuner_core.exports` reads a request as JSON, and prints the export or an error as a line of JSON.

A process that has to do without PyTorch exports so.
"""

import base64
import json
import sys
from collections.abc import Mapping
from typing import Any

from timetuner_core.exports.formats import Exported, ExportError


def export(
    format: str, schedule: Mapping[str, Any], model: Mapping[str, Any], scheduler_config: Mapping[str, Any], lossy: bool
) -> Exported:
    """The export of a schedule in a format that needs PyTorch.

    Args:
        format: of `FORMATS`. schedule, model: as `model_card` takes them.
        scheduler_config: the configuration of the scheduler that the model came with.
        lossy: export a grid although the schedule is more than that.

    Raises:
        ExportError: why not, and what is accepted.
    """
    from timetuner_core.exports import comfyui, diffusers_folder, grids
    from timetuner_core.exports.card import model_card
    from timetuner_core.exports.levels import Levels

    levels = Levels(scheduler_config, schedule)
    if format == "diffusers":
        return diffusers_folder.diffusers_folder(levels, model_card(schedule, model, diffusers_folder.NOTES))
    writers = {
        "sigmas": grids.diffusers_sigmas,
        "comfyui": grids.comfyui_sigmas,
        "comfyui-node": comfyui.comfyui_node,
        "sdcpp": grids.sdcpp_arguments,
    }
    if format not in writers:
        raise ExportError(f"format is {format!r}; accepted: {', '.join(['diffusers', *writers])}")
    return writers[format](levels, lossy)


def answer(request: str) -> dict[str, Any]:
    """The export that a request in JSON asks for, or its error, in a form that JSON takes."""
    try:
        exported = export(**json.loads(request))
    except ExportError as error:
        return {"error": str(error)}
    return {"content": base64.b64encode(exported.content).decode(), "not_carried": exported.not_carried}


def main() -> None:
    answered = json.dumps(answer(sys.stdin.read()))
    print()  # Packages may have written a part of a line.
    print(answered)


if __name__ == "__main__":
    main()
