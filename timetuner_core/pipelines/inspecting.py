"""All that is checked about a saved pipeline before its weights are loaded, and the description that comes of it.

Configurations and vocabularies come from strangers, so a worker inspects them in a child process, whose time and memory
are limited: python -m timetuner_core.pipelines.inspecting FOLDER DTYPE MEMORY_BYTES CPU_SECONDS
"""

import inspect
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timetuner_core.models.folder_files import MODEL_INDEX, ModelFormatError, files_of
from timetuner_core.pipelines.files import (
    check_pipeline_files,
    denoisers_of,
    only_read_files,
    saved_dtype,
    variant_of,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "TMPDIR", "LD_LIBRARY_PATH")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "DIFFUSERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Limits:
    """Limits of a child process. PyTorch alone maps several GiB, most of which it never touches."""

    memory_bytes: int = 32 * 2**30
    cpu_seconds: int = 300
    seconds: float = 900.0


DEFAULT_LIMITS = Limits()


def inspect_in_child(folder: Path, dtype: str = "auto", limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """`inspect_pipeline` in a child process, offline and without the environment of this one.

    Raises:
        ModelFormatError: also if the child took too long, or too much memory.
    """
    with tempfile.TemporaryDirectory(prefix="timetuner-inspecting-") as home:
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment |= OFFLINE | {"HF_HOME": home, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", "-m", __name__, str(folder), dtype]
        command += [str(limits.memory_bytes), str(limits.cpu_seconds)]
        try:
            options: dict[str, Any] = {"env": environment, "stdin": subprocess.DEVNULL, "timeout": limits.seconds}
            child = subprocess.run(command, capture_output=True, check=False, **options)
        except subprocess.TimeoutExpired:
            message = f"its components took longer than {limits.seconds:g} seconds to build"
            raise ModelFormatError(MODEL_INDEX, f"{message}; accepted: less") from None
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        words = " ".join(child.stderr.decode(errors="replace").split())[-300:]
        most = f"{limits.cpu_seconds} seconds of CPU, {limits.memory_bytes} bytes of memory"
        message = f"its components could not be built: the process ended with {child.returncode} ({words})"
        raise ModelFormatError(MODEL_INDEX, f"{message}; accepted: what takes up to {most}") from None
    if "field" in answer:
        raise ModelFormatError(answer["field"], answer["message"])
    spec: dict[str, Any] = answer["spec"]
    return spec


def inspect_pipeline(folder: Path, dtype: str = "auto") -> dict[str, Any]:
    """Check a folder's files, build each component without its weights, and describe the pipeline.

    Args:
        dtype: that the pipeline is loaded in; `auto` is what the denoiser's files have.

    Returns:
        The model's `spec` as JSON. A trial call finds out what is None here: `image_shape`, `sample_shape`, `output`
        and `size_multiple`.

    Raises:
        ModelFormatError: names the file, and what is accepted.
    """
    if dtype not in DTYPES:
        raise ModelFormatError("dtype", f"it is {dtype!r}; accepted: {', '.join(DTYPES)}")
    index = check_pipeline_files(folder)
    from timetuner_core.pipelines.components import check_components, pipeline_class

    found = pipeline_class(index)
    variant_of(files_of(folder), index)
    dtype = saved_dtype(folder) if dtype == "auto" else dtype
    arguments = _arguments(found)
    with only_read_files(folder) as files:
        components = check_components(files, index)
    pipeline = _put_together(found, {**components, **index.options})
    networks = [component for component in components.values() if hasattr(component, "parameters")]
    return {
        "kind": "pipeline",
        "pipeline": index.pipeline,
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": dtype,
        "call": arguments,
        "output": None,
        "size_multiple": None,
        "image_shape": None,
        "sample_shape": None,
        "tunable": _why_not_tunable(pipeline),
        "flags_content": getattr(pipeline, "safety_checker", None) is not None,
        "licence": _licence(folder),
        **_schedule(pipeline),
        "x0_error_at_start": None,
        "clipping": None,
        "num_classes": 0,
        "null_class_label": None,
        "condition_shape": None,
        "guidance_types": ["uncond"],
        "num_parameters": sum(_values(components[name]) for name in denoisers_of(index)),
        "num_bytes": sum(map(_values, networks)) * BYTES_PER_VALUE[dtype],
        "has_uncond_condition": False,
        "has_conditions": False,
        "has_data": False,
    }


def _arguments(pipeline_class: Any) -> dict[str, dict[str, Any]]:
    """The arguments of a call that a request may give. Raises: ModelFormatError, if they are not enough for a call."""
    from timetuner_core.pipelines.call_arguments import call_arguments, needed_arguments

    arguments = call_arguments(pipeline_class)
    for name in needed_arguments(pipeline_class):
        if name not in arguments:
            message = f"a call of {pipeline_class.__name__} needs {name!r}, which no request can give"
            accepted = "pipelines that are called with prompts, numbers and images"
            raise ModelFormatError(MODEL_INDEX, f"{message}; accepted: {accepted}")
    return arguments


def _put_together(pipeline_class: Any, parts: dict[str, Any]) -> Any:
    """The pipeline of components without weights. Raises: ModelFormatError."""
    known = inspect.signature(pipeline_class.__init__).parameters
    try:
        return pipeline_class(**{name: value for name, value in parts.items() if name in known})
    except Exception as error:  # The constructors of diffusers may raise anything.
        words = " ".join(str(error).split())[:500] or type(error).__name__
        message = f"no {pipeline_class.__name__} can be built of its components ({words}); accepted: its own ones"
        raise ModelFormatError(MODEL_INDEX, message) from None


def _why_not_tunable(pipeline: Any) -> str | None:
    from timetuner_core.pipelines.checks import check_tunable

    try:
        check_tunable(pipeline)
    except ValueError as error:
        return str(error)
    return None


def _schedule(pipeline: Any) -> dict[str, Any]:
    """The noise schedule and the prediction. A scheduler that cannot be expressed has 1 as its `T` and no `t_start`."""
    from timetuner_core.models.schedulers import MODEL_TYPES, read_scheduler_config

    config = pipeline.scheduler.config
    try:
        spec = read_scheduler_config({**config, "_class_name": type(pipeline.scheduler).__name__})
    except ModelFormatError:
        model_type = MODEL_TYPES.get(config.get("prediction_type", ""), "x_start")
        steps = config.get("num_train_timesteps")
        return {"model_type": model_type, "T": 1.0, "t_start": None, "t_min": 0.0, "num_train_timesteps": steps}
    schedule = spec.noise_schedule
    return {
        "model_type": spec.model_type,
        "T": schedule.T,
        "t_start": schedule.t_start,
        "t_min": schedule.t_min,
        "num_train_timesteps": schedule.max_num_steps,
    }


def _licence(folder: Path) -> dict[str, str | None]:
    from timetuner_core.pipelines.model_card import read_licence

    return read_licence(folder)


def _values(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main(folder: str, dtype: str, memory_bytes: str, cpu_seconds: str) -> None:
    """Inspect a folder within limits, and write the description, or what is at fault, to stdout as JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Texts that libraries print are no part of the answer.
    try:
        found: dict[str, Any] = {"spec": inspect_pipeline(Path(folder), dtype)}
    except ModelFormatError as error:
        found = {"field": error.field, "message": error.message}
    with answer:
        json.dump(found, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
