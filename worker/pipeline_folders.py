"""Where the files of registered pipelines are: in the artifact store, below `MODELS_DIR`, or in a cache of a hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.shared.artifacts import ArtifactStore
from service.shared.settings import Settings
from timetuner_core.models.folder_files import MODEL_INDEX, ModelFormatError, files_of
from timetuner_core.pipelines.files import PipelineIndex, pipeline_files, read_index

Source = Mapping[str, Any]


class PipelineFolders:
    """Finds the folder of a pipeline by the `source` of its model or registration."""

    def __init__(self, settings: Settings, artifacts: ArtifactStore) -> None:
        self._settings, self._artifacts = settings, artifacts

    def find(self, source: Source) -> Path:
        """The folder, all of whose files that are read lie where the operator allows it.

        Raises:
            ModelFormatError: there is none, or a link in it leads elsewhere.
        """
        if "path" in source:
            return self._below_models_dir(source["path"])
        if "hub" in source:
            return self._in_cache(source["hub"], source["revision"])
        return self._artifacts.local_folder(source["artifact"])

    def _below_models_dir(self, path: str) -> Path:
        if self._settings.models_dir is None:
            raise ModelFormatError("path", "this worker has no MODELS_DIR; accepted: the folder that the API has")
        root = self._settings.models_dir.resolve()
        folder = (root / path).resolve()
        if not folder.is_relative_to(root):
            raise ModelFormatError("path", f"{path!r} leads out of MODELS_DIR; accepted: a folder below it")
        if not folder.is_dir():
            raise ModelFormatError("path", f"there is no folder {path!r} in MODELS_DIR; accepted: one that is there")
        _refuse_links(folder, root, "MODELS_DIR")
        return folder

    def _in_cache(self, name: str, revision: str) -> Path:
        """The snapshot of a revision, which is downloaded if it is not there and the operator allows it."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        options: dict[str, Any] = {"revision": revision}
        try:
            if self._settings.allow_downloads:
                options["allow_patterns"] = _files_on_hub(name, revision)
            else:
                options["local_files_only"] = True
            snapshot = Path(snapshot_download(name, **options))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            message = f"{name!r} at revision {revision!r} is not in the Hugging Face cache"
            if self._settings.allow_downloads:
                message += f", and cannot be downloaded ({' '.join(str(error).split())[:300]})"
            accepted = "one that is there; or ALLOW_DOWNLOADS=true, and a name on the hub"
            raise ModelFormatError("hub", f"{message}; accepted: {accepted}") from None
        _refuse_links(snapshot, snapshot.resolve().parents[1], "the cache")
        return snapshot


def revision_of(snapshot: Path) -> str:
    """The commit of a snapshot in the cache."""
    return snapshot.name


def _files_on_hub(name: str, revision: str) -> list[str]:
    """The files of a pipeline on the hub that are read. Raises: ModelFormatError; the errors of huggingface_hub."""
    from huggingface_hub import hf_hub_download, list_repo_files

    index = PipelineIndex.of(json.loads(Path(hf_hub_download(name, MODEL_INDEX, revision=revision)).read_text()))
    return pipeline_files(list_repo_files(name, revision=revision), index)


def _refuse_links(folder: Path, root: Path, named: str) -> None:
    """Raises: ModelFormatError, if a file that is read is a link to outside of `root`."""
    for name in pipeline_files(files_of(folder), read_index(folder)):
        if not (folder / name).resolve().is_relative_to(root):
            raise ModelFormatError(name, f"it is a link that leads out of {named}; accepted: files in it")
