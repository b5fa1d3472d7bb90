"""Calls pipelines. As a program, it loads every pipeline that a folder has saved and writes what each gives:

python -m tests.core.pipelines.run FOLDER [KIND ...]
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Kinds whose constructor replaces the scheduler that was saved.
CONVERTING = ("ddim",)
# The folder, in that of a pipeline, of an exported schedule.
EXPORTED = "exported"


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(kind: Any, pipeline: Any, **call: Any) -> Tensor:
    """The output of one call of a pipeline, always from the same noise."""
    generator = torch.Generator().manual_seed(0)
    outputs = pipeline(num_inference_steps=kind.num_steps, generator=generator, **kind.call(), **call)
    return torch.as_tensor(next(iter(outputs.values())))


def main(folder: Path, names: list[str]) -> None:
    import timetuner_core  # noqa: F401 (the one import that a saved pipeline needs)

    assert "diffusers" not in sys.modules, "import timetuner_core is not light"
    import diffusers
    from safetensors.torch import save_file

    from tests.core.pipelines.kinds import KINDS

    outputs = {}
    for kind in [kind for kind in KINDS if not names or kind.name in names]:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / kind.name)
        name = type(pipeline.scheduler).__name__
        exported = folder / kind.name / EXPORTED
        is_replaced = kind.name in CONVERTING or exported.exists()
        assert (name == "TimeTunerScheduler") != is_replaced, f"{kind.name} has a {name}"
        if is_replaced:
            from timetuner_core.integrations.diffusers import TimeTunerScheduler

            saved = exported if exported.exists() else folder / kind.name
            pipeline.scheduler = TimeTunerScheduler.from_pretrained(saved, subfolder="scheduler")
        pipeline.set_progress_bar_config(disable=True)
        outputs[kind.name] = run(kind, pipeline).contiguous()
    save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    with one_thread():
        main(Path(sys.argv[1]), sys.argv[2:])
