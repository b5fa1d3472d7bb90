"""Registering a whole pipeline: its files are found and inspected, and a first call is tried."""

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.shared.settings import Settings
from timetuner_core.models.folder_files import MODEL_INDEX, SCHEDULER_CONFIG, ModelFormatError
from timetuner_core.pipelines.files import check_pipeline_files, fingerprint, pipeline_hash, saved_dtype
from timetuner_core.pipelines.inspecting import inspect_in_child
from timetuner_core.pipelines.trial import try_pipeline
from worker.pipeline_folders import PipelineFolders, revision_of
from worker.pipeline_loading import load_quietly, placement_of


@dataclass(frozen=True)
class FoundPipeline:
    """A pipeline whose files are there.

    Attributes:
        source: that of its model, with what is pinned: the dtype, the commit, and the state of files that are not ours.
    """

    folder: Path
    source: dict[str, Any]
    content_hash: str

    @classmethod
    def at(cls, folders: PipelineFolders, source: Mapping[str, Any]) -> "FoundPipeline":
        """Raises: ModelFormatError."""
        folder = folders.find(source)
        check_pipeline_files(folder)
        dtype = source["dtype"] if source["dtype"] != "auto" else saved_dtype(folder)
        pinned = {**source, "dtype": dtype}
        if "hub" in source:
            pinned["revision"] = revision_of(folder)
        if "artifact" not in source:
            pinned["fingerprint"] = fingerprint(folder)
        return cls(folder, pinned, pipeline_hash(folder, dtype))

    def describe(self, device: torch.device, settings: Settings) -> dict[str, Any]:
        """The model's `spec`, by what its files say and by a call.

        Raises:
            ModelFormatError: the pipeline cannot be used, or its files changed meanwhile.
            MemoryError: this machine is too small for it.
        """
        dtype: str = self.source["dtype"]
        spec = inspect_in_child(self.folder, dtype)
        try:
            placement = placement_of(settings, device, spec["num_bytes"])
            spec = try_pipeline(load_quietly(self.folder, device, getattr(torch, dtype), placement), spec)
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if "fingerprint" in self.source and fingerprint(self.folder) != self.source["fingerprint"]:
            raise ModelFormatError(MODEL_INDEX, "the files changed while they were read; accepted: files that stay")
        # Exports of schedules need it, and the API may not reach the folder.
        config = self.folder / SCHEDULER_CONFIG
        return spec | ({"scheduler_config": json.loads(config.read_text())} if config.is_file() else {})
