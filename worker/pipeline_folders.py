"""The files of registered pipelines: in the artifact store, below `MODELS_DIR`, or in a cache of a hub."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from service.shared.artifacts import ArtifactStore
from service.shared.settings import Settings
from timetuner_core.models.folder_files import ModelFormatError, files_of
from timetuner_core.pipelines.files import pipeline_files, read_index
from worker.downloading import download

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
            return self._in_cache(source["hub"], source["revision"], is_complete="fingerprint" in source)
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

    def _in_cache(self, name: str, revision: str, *, is_complete: bool) -> Path:
        """The snapshot of a revision. What is not there is downloaded if the operator allows it.

        Args:
            is_complete: whether a snapshot that is there has all files, as that of a registered model has. An earlier
                download may have been interrupted.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        snapshot = None
        if is_complete or not self._settings.allow_downloads:
            with suppress(LocalEntryNotFoundError):
                snapshot = Path(snapshot_download(name, revision=revision, local_files_only=True))
        if snapshot is None and not self._settings.allow_downloads:
            message = f"{name!r} at revision {revision!r} is not in the Hugging Face cache"
            accepted = "one that is there; or any on the hub, if the operator sets ALLOW_DOWNLOADS=true"
            raise ModelFormatError("hub", f"{message}; accepted: {accepted}")
        snapshot = snapshot or download(name, revision)
        _refuse_links(snapshot, snapshot.resolve().parents[1], "the cache")
        return snapshot


def revision_of(snapshot: Path) -> str:
    """The commit of a snapshot in the cache."""
    return snapshot.name


def _refuse_links(folder: Path, root: Path, named: str) -> None:
    """Raises: ModelFormatError, if a file that is read is a link to outside of `root`."""
    for name in pipeline_files(files_of(folder), read_index(folder)):
        if not (folder / name).resolve().is_relative_to(root):
            raise ModelFormatError(name, f"it is a link that leads out of {named}; accepted: files in it")
