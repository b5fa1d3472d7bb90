"""A zip file of a diffusers scheduler folder, with its model card."""

import io
import tempfile
import zipfile
from pathlib import Path

from timetuner_core.exports.formats import Exported
from timetuner_core.exports.levels import Levels

NOTES = [
    "A pipeline's model_index.json names another scheduler: assign this one to `pipeline.scheduler`.",
    "The `timetuner` package runs it: `pip install timetuner[diffusers]`.",
]


def diffusers_folder(levels: Levels, card: str) -> Exported:
    """`scheduler/scheduler_config.json`, which `TimeTunerScheduler.from_pretrained` reads, and `README.md`.

    Raises:
        ExportError: a schedule that `TimeTunerScheduler` does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        levels.scheduler.save_pretrained(folder)
        config = Path(folder, "scheduler_config.json").read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {"scheduler/scheduler_config.json": config, "README.md": card.encode()}.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # Its time is always the same, and so is the file.
    return Exported(buffer.getvalue(), [*NOTES, *levels.notes])
