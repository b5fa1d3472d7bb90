"""Tiny pipelines as registered models, and the requests for them."""

import base64
import inspect
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from ulid import ULID

from service.registry.tables import Model
from tests.core.pipelines.kinds import KINDS, Kind
from tests.worker.in_process import InProcess
from timetuner_core.models.schedulers import read_scheduler_config
from timetuner_core.pipelines.loading import load_pipeline
from worker.pipeline_sampling import image_of

Json = dict[str, Any]
BY_NAME = {kind.name: kind for kind in KINDS}
TYPES = {
    "prompt": "text",
    "prompt_2": "text",
    "negative_prompt": "text",
    "height": "integer",
    "width": "integer",
    "guidance_scale": "number",
    "guidance_rescale": "number",
    "strength": "number",
    "eta": "number",
    "num_frames": "integer",
    "max_sequence_length": "integer",
    "use_resolution_binning": "boolean",
    "image": "image",
    "mask_image": "image",
}
SIZE = 16


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
    call = {name: value for name, value in kind.call().items() if name in TYPES}
    pictures: Json = {"image": picture(), "mask_image": picture(mode="L")}
    return {name: pictures.get(name, value) for name, value in call.items()}


def request_of(kind: Kind, model: str, **changed: Any) -> Json:
    """The same as a request to the API."""
    call = {name: data_url(v) if isinstance(v, Image.Image) else v for name, v in call_of(kind).items()}
    fields = {name: call.pop(name) for name in ("prompt", "guidance_scale", "height", "width") if name in call}
    return {"model": model, "num_steps": kind.num_steps, **fields, "call": call, **changed}


def plain(kind: Kind, pipeline: Any, seed: int, num_steps: int, **changed: Any) -> torch.Tensor:
    """The image of a plain call of the pipeline, (C, H, W) or (F, C, H, W) in [-1, 1]."""
    call = {**call_of(kind), "output_type": "np", **changed}
    generator = torch.Generator().manual_seed(seed)
    return image_of(pipeline(**call, num_inference_steps=num_steps, generator=generator))


def spec_of(kind: Kind, pipeline: Any) -> Json:
    """What a worker would find out of a pipeline, by hand."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    call = {
        name: {
            "type": TYPES[name],
            "default": parameters[name].default,
            "required": name in kind.call() and parameters[name].default in (None, inspect.Parameter.empty),
        }
        for name in TYPES
        if name in parameters and (name not in ("image", "mask_image") or name in kind.call())
    }
    for name in ("height", "width"):
        if name in call:
            call[name]["required"] = False
            call[name]["default"] = None
    config = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    scheduler = read_scheduler_config(config)
    shape = list(plain(kind, pipeline, 0, kind.num_steps).shape)
    unet = getattr(pipeline, "unet", None) or pipeline.transformer
    return {
        "kind": "pipeline",
        "pipeline": kind.pipeline,
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": "float32",
        "call": call,
        "output": "frames" if len(shape) == 4 else "images",
        "image_shape": shape,
        "sample_shape": [4, *(size // 2 for size in shape[-2:])],
        "size_multiple": 2,
        "tunable": None,
        "flags_content": False,
        "licence": {"name": None, "source": None},
        "model_type": scheduler.model_type,
        "T": float(scheduler.noise_schedule.T),
        "t_start": None,
        "num_train_timesteps": 1000,
        "guidance_types": ["uncond"],
        "num_classes": 0,
        "null_class_label": None,
        "condition_shape": None,
        "has_uncond_condition": False,
        "has_conditions": False,
        "has_data": False,
        "clipping": None,
        "num_parameters": sum(parameter.numel() for parameter in unet.parameters()),
    }


def register(worker: InProcess, name: str, **spec: Any) -> tuple[str, Any]:
    """The id of a pipeline that was saved and registered, and the pipeline as it is loaded from there."""
    kind, key = BY_NAME[name], f"models/{ULID()}"
    folder = worker.artifacts.local_folder(key)
    kind.build().save_pretrained(folder)
    pipeline = load_pipeline(folder)
    with worker.registry.write() as session:
        source = {"artifact": key, "kind": "pipeline", "dtype": "float32"}
        found = spec_of(kind, pipeline) | spec
        model = Model(name=name, content_hash=key, source=source, spec=found)
        session.add(model)
    return model.id, pipeline
