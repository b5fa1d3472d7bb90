"""Tiny pipelines as registered models, and the requests for them."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from starlette.testclient import TestClient
from ulid import ULID

from service.app import create_app
from service.registry.database import Registry
from service.registry.tables import Model
from tests.conftest import MakeDatabaseUrl
from tests.core.pipelines.kinds import KINDS, Kind
from tests.worker.in_process import InProcess
from timetuner_core.pipelines.files import pipeline_hash
from timetuner_core.pipelines.inspecting import inspect_pipeline
from timetuner_core.pipelines.loading import load_pipeline
from timetuner_core.pipelines.trial import try_pipeline
from worker.pipeline_sampling import image_of

Json = dict[str, Any]
BY_NAME = {kind.name: kind for kind in KINDS}
NOT_GIVEN = ("output_type", "prompt_template")
FIELDS = ("prompt", "negative_prompt", "guidance_scale", "height", "width")
# Arguments of some kinds as a request gives them: sizes that its tiny autoencoder does not tell, and no list for none.
GIVEN: dict[str, dict[str, Any]] = {
    "ldm-text": {"height": 16, "width": 16},
    "sana": {"complex_human_instruction": []},
}
SIZE = 16


class ApiAndWorker(NamedTuple):
    api: TestClient
    worker: InProcess


@contextmanager
def api_and_worker(make_database_url: MakeDatabaseUrl, folder: Path, **settings: Any) -> Iterator[ApiAndWorker]:
    """The API and a worker, both in this process, with a new database."""
    registry = Registry(make_database_url("sqlite", folder))
    worker = InProcess(folder, registry, **settings)
    address: Json = {"base_url": "http://127.0.0.1", "client": ("127.0.0.1", 1)}
    with TestClient(create_app(worker.settings), **address) as api:
        yield ApiAndWorker(api, worker)
    worker.close()
    registry.close()


def picture(size: int = SIZE, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def data_url(image: Image.Image, kind: str = "png") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def call_of(kind: Kind) -> Json:
    """The arguments of a kind's call as Python has them, with a picture in place of a tensor."""
    call = {name: value for name, value in kind.call().items() if name not in NOT_GIVEN}
    pictures: Json = {"image": picture(), "mask_image": picture(mode="L")}
    return {name: pictures.get(name, value) for name, value in call.items()} | GIVEN.get(kind.name, {})


def request_of(kind: Kind, model: str, **changed: Any) -> Json:
    """The same as a request to the API."""
    call = {name: data_url(v) if isinstance(v, Image.Image) else v for name, v in call_of(kind).items()}
    fields: Json = {name: call.pop(name) for name in FIELDS if name in call}
    return {"model": model, "num_steps": kind.num_steps, **fields, "call": call, **changed}


def plain(kind: Kind, pipeline: Any, seed: int, num_steps: int, **changed: Any) -> torch.Tensor:
    """The image of a plain call of the pipeline, (C, H, W) or (F, C, H, W) in [-1, 1]."""
    call = {**call_of(kind), "output_type": "np", **changed}
    generator = torch.Generator().manual_seed(seed)
    return image_of(pipeline(**call, num_inference_steps=num_steps, generator=generator))


def register(worker: InProcess, name: str, **spec: Any) -> tuple[str, Any]:
    """The id of a pipeline that was saved and registered, and the pipeline as it is loaded from there."""
    kind, key = BY_NAME[name], f"models/{ULID()}"
    folder = worker.artifacts.local_folder(key)
    kind.build().save_pretrained(folder)
    pipeline = load_pipeline(folder)
    found = try_pipeline(pipeline, inspect_pipeline(folder, "float32"), **call_of(kind)) | spec
    with worker.registry.write() as session:
        source = {"artifact": key, "kind": "pipeline", "dtype": "float32"}
        model = Model(name=name, content_hash=pipeline_hash(folder, "float32"), source=source, spec=found)
        session.add(model)
    return model.id, pipeline
