"""Downloads a pipeline into the Hugging Face cache, in a process of its own, as workers themselves stay offline:

python -m worker.downloading NAME REVISION
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from timetuner_core.models.folder_files import MODEL_INDEX, ModelFormatError, parse_json
from timetuner_core.pipelines.files import PipelineIndex, pipeline_files

# These variables keep a worker from downloads of its own.
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def download(name: str, revision: str) -> Path:
    """The snapshot of a revision, with those of its files that are read: never pickles or code.

    Raises:
        ModelFormatError: it cannot be downloaded, or is no pipeline that is read.
    """
    environment = {variable: value for variable, value in os.environ.items() if variable not in OFFLINE}
    command = [sys.executable, "-P", "-m", __name__, name, revision]
    child = subprocess.run(command, env=environment, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        words = " ".join(child.stderr.decode(errors="replace").split())[-300:]
        answer = {"field": "hub", "message": f"{name!r} cannot be downloaded ({words}); accepted: a name on the hub"}
    if "field" in answer:
        raise ModelFormatError(answer["field"], answer["message"])
    return Path(answer["snapshot"])


def main(name: str, revision: str) -> None:
    """Download, and write the snapshot's folder, or what is at fault, to stdout as JSON.

    A snapshot that is in the cache will do if the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download

    answer: dict[str, str] = {}
    try:
        index = Path(hf_hub_download(name, MODEL_INDEX, revision=revision))
        commit = index.parent.name  # All files are those of one commit, though a branch may move meanwhile.
        files = list_repo_files(name, revision=commit)
        wanted = pipeline_files(files, PipelineIndex.of(parse_json(MODEL_INDEX, index.read_bytes())))
        answer["snapshot"] = snapshot_download(name, revision=commit, allow_patterns=wanted)
    except ModelFormatError as error:
        answer = {"field": error.field, "message": error.message}
    except Exception:  # The hub may be away in many ways.
        answer["snapshot"] = snapshot_download(name, revision=revision, local_files_only=True)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
