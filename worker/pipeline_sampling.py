"""Sampling with whole pipelines: runs of the pipeline make one image or several, and share the calls of its network."""

import copy
import inspect
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.registry.tables import SampleJob, Schedule
from service.shared.job_requests import OWN_SAMPLER, SampleRequest
from service.shared.pipeline_calls import decode_images, output_shape
from service.shared.settings import Settings
from timetuner_core.pipelines.prompts import check_prompt_lengths
from timetuner_core.pipelines.several_images import arguments_in_common, call_of_several, takes_several
from timetuner_core.pipelines.shared_calls import MAX_BATCH, Request, Result, SharedCalls
from timetuner_core.samplers import get_sampler
from worker.conversion import timesteps_of
from worker.lease import JobRefusedError

logger = logging.getLogger(__name__)

# A batch whose size is found has at most so many rows.
LARGEST_BATCH = 64
# A run makes at most so many images, of so many values together. Work beside the network counts for small images only.
MAX_IMAGES_OF_RUN = 8
MAX_VALUES_OF_RUN = 3 * 2**20
# Values of pixels may leave [0, 1] by rounding.
TOLERANCE = 1e-3


@dataclass
class ServedPipeline:
    """A loaded pipeline. Its runs share calls and encoded prompts for as long as it stays loaded.

    Attributes:
        spec: what the registry says of it. num_bytes: the size of all its parts.
        takes_several: whether a run may make several images; None until that was tried.
    """

    pipeline: Any
    spec: Mapping[str, Any]
    shared: SharedCalls
    takes_several: bool | None = None

    @classmethod
    def of(cls, pipeline: Any, spec: Mapping[str, Any], settings: Settings) -> "ServedPipeline":
        """The pipeline, with calls of as many rows as the settings allow.

        With `same_bits` no run shares a call with another. A run's own calls have as many rows as they have.
        """
        size = settings.sample_batch_size
        if settings.same_bits:
            rows = largest = 1
        elif size == "auto":
            rows, largest = MAX_BATCH, LARGEST_BATCH
        else:
            rows = largest = size
        seconds = settings.batch_step_seconds
        shared = SharedCalls(pipeline, max_batch=rows, largest_batch=largest, max_seconds=seconds, refuse_large=False)
        return cls(pipeline, spec, shared, takes_several=False if rows == 1 else None)

    @property
    def num_bytes(self) -> int:
        parts = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        return sum({(tensor.device, tensor.data_ptr()): tensor.nbytes for tensor in tensors}.values())


@dataclass(frozen=True)
class PipelineRow:
    """An image to make.

    Attributes:
        call: the arguments of the run, without its generator. scheduler: makes one for the run.
        is_previewed: whether the request asks what each step predicts.
        solver: what the scheduler follows from. One run may make the images that have equal ones.
        num_values: the values of the image, and of all its frames.
    """

    owner: str
    seed: int
    call: Mapping[str, Any]
    scheduler: Callable[[], Any]
    is_previewed: bool = False
    solver: Hashable = None
    num_values: int = 0


@dataclass(eq=False)
class Moving:
    """An image on its way.

    Attributes:
        scheduler, result: those of its run, once that is submitted.
        index: its place among the `count` images of the run.
    """

    row: PipelineRow
    scheduler: Any = None
    result: Result = field(default_factory=Result)
    index: int = 0
    count: int = 1

    @property
    def num_steps(self) -> int:
        """The steps of the run's own scheduler, which may be more than the request names."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        asked: int = self.row.call["num_inference_steps"]
        return asked if timesteps is None or not self.result.num_steps else len(timesteps)

    @property
    def step(self) -> int:
        """The step that was made last; image-to-image begins in the middle."""
        return min((self.result.first_step or 0) + self.result.num_steps, self.num_steps)


@dataclass(frozen=True)
class PipelineAdvance:
    """The outcome of a step; see `rolling_batch.Advance`. Jobs are done once all their images are, and have one shape.

    Attributes:
        flagged: for each of `done`, whether the safety checker held the image back; empty without a checker.
    """

    done: list[PipelineRow]
    images: Tensor | None
    travelling: list[Moving]
    failed: list[tuple[PipelineRow, Exception]]
    flagged: list[bool] = field(default_factory=list)


class PipelineBatch:
    """The runs of one pipeline, which move on together by one call of its network. Runs join and leave at any step.

    Args:
        capacity: how many runs there may be at once.
        count: told how many rows were put through the network, by how many calls.
    """

    def __init__(self, served: ServedPipeline, capacity: int, count: Callable[[int, int], None]) -> None:
        self._served, self._capacity, self._count = served, capacity, count
        self.rows: list[Moving] = []
        self._new: list[Moving] = []  # They are among the rows, and have no run yet.
        self._ending: list[Result] = []  # Runs that were interrupted: they end with the next step.

    @property
    def room(self) -> int:
        return self._capacity - len(self.rows)

    def add(self, rows: Sequence[PipelineRow]) -> None:
        """Have images join. Their runs begin with the next step."""
        added = list(map(Moving, rows))
        self.rows += added
        self._new += added

    def discard(self, owner: object) -> None:
        """Take an owner's images out. Runs that make no others end, by the pipeline's interrupt."""
        self._interrupt([moving for moving in self.rows if moving.row.owner == owner])

    def close(self) -> None:
        """End all runs of this batch. Another batch may have others of the same pipeline."""
        self._served.shared.end([*[moving.result for moving in self.rows], *self._ending])
        self.rows, self._new, self._ending = [], [], []

    def _interrupt(self, interrupted: Sequence[Moving]) -> None:
        runs = {id(moving.result): moving.result for moving in interrupted if moving not in self._new}
        self._new = [moving for moving in self._new if moving not in interrupted]
        self.rows = [moving for moving in self.rows if moving not in interrupted]
        still_needed = {id(moving.result) for moving in self.rows}
        for result in (runs[each] for each in runs.keys() - still_needed):
            self._served.shared.interrupt(result)
            self._ending.append(result)

    def _begin_runs(self) -> None:
        """Submit a run for the new images, or for several that one run can make."""
        new, self._new = self._new, []
        for together in self._grouped(new):
            self._submit(together)

    def _grouped(self, new: Sequence[Moving]) -> Iterator[Sequence[Moving]]:
        groups: defaultdict[Hashable, list[Moving]] = defaultdict(list)
        for moving in new:
            row = moving.row
            common = arguments_in_common(row.call) if self._served.takes_several is not False else None
            alike = (common, row.solver, row.is_previewed, row.num_values)
            groups[id(moving) if None in alike[:2] else alike].append(moving)
        for group in groups.values():
            row = group[0].row
            most = min(MAX_IMAGES_OF_RUN, MAX_VALUES_OF_RUN // max(row.num_values, 1))
            if len(group) == 1 or most < 2 or not self._takes_several(row):
                yield from ([moving] for moving in group)
            else:
                yield from (group[first : first + most] for first in range(0, len(group), most))

    def _takes_several(self, row: PipelineRow) -> bool:
        served = self._served
        if served.takes_several is None:
            served.takes_several = takes_several(served.shared, row.call, row.scheduler)
        return served.takes_several

    def _submit(self, together: Sequence[Moving]) -> None:
        rows = [moving.row for moving in together]
        scheduler = rows[0].scheduler()
        call = call_of_several([row.call for row in rows], [row.seed for row in rows])
        result = self._served.shared.submit(Request(call, scheduler, is_previewed=rows[0].is_previewed))
        for index, moving in enumerate(together):
            moving.scheduler, moving.result, moving.index, moving.count = scheduler, result, index, len(together)

    def _begin_again_alone(self) -> None:
        """Give each image of a run that failed with several a run of its own, whose error is then its own."""
        failed = [moving for moving in self.rows if moving.count > 1 and moving.result.error is not None]
        if failed:
            self._served.takes_several = False
            logger.warning("a run of several images failed; each gets its own run: %r", failed[0].result.error)
        for moving in failed:
            self._submit([moving])

    def preview(self, advance: PipelineAdvance, rows: Sequence[int]) -> Tensor | None:
        """What some travelling runs predict, `(len(rows), C, H, W)`; of frames, the one in the middle.

        Returns:
            None where a scheduler does not tell its predictions.

        Raises:
            what the pipeline raises.
        """
        shown: list[Tensor] = []
        outputs: dict[int, Any] = {}  # of each run
        for row in rows:
            moving = advance.travelling[row]
            result = moving.result
            if id(result) not in outputs:
                outputs[id(result)] = result.output if result.is_over else self._served.shared.preview(result)
            output = outputs[id(result)]
            if output is None:
                return None
            image = image_of(output, moving.index, moving.count)
            shown.append(image if image.ndim == 3 else image[len(image) // 2])
        return torch.stack(shown)

    def step(self) -> PipelineAdvance:
        """Move every run on by one call of the network."""
        shared = self._served.shared
        rows, calls = shared.num_rows, shared.num_calls
        self._begin_runs()
        if not all(moving.result.is_over for moving in self.rows):
            shared.step()
            self._ending = [result for result in self._ending if not result.is_over]
            self._begin_again_alone()
            self._count(shared.num_rows - rows, shared.num_calls - calls)
        travelling = list(self.rows)
        images: dict[int, Tensor] = {}
        failed: list[tuple[PipelineRow, Exception]] = []
        for moving in travelling:
            if moving.result.is_over:
                try:
                    images[id(moving)] = self._image(moving)
                except Exception as error:  # Pipelines have errors of their own.
                    failed.append((moving.row, error))
        lost = {row.owner for row, _ in failed}
        self._interrupt([moving for moving in self.rows if moving.row.owner in lost])
        open_owners = {moving.row.owner for moving in self.rows if id(moving) not in images}
        ready = [moving for moving in self.rows if moving.row.owner not in open_owners]
        # Images of one file have one shape. Those of another shape are handed in with the next step.
        done = [each for each in ready if images[id(each)].shape == images[id(ready[0])].shape]
        self.rows = [moving for moving in self.rows if moving not in done]
        stacked = torch.stack([images[id(each)] for each in done]) if done else None
        has_checker = bool(self._served.spec.get("flags_content"))
        flagged = [_is_flagged(each.result.output, each.index) for each in done] if has_checker else []
        return PipelineAdvance([each.row for each in done], stacked, travelling, failed, flagged)

    def _image(self, moving: Moving) -> Tensor:
        """The image of a run that is over, (C, H, W) or (F, C, H, W) in [-1, 1]. Raises: the run's own error."""
        result, call = moving.result, moving.row.call
        takes = self._served.spec["call"]
        strength = call.get("strength", takes.get("strength", {}).get("default"))
        if not result.num_steps and strength is not None:
            problem = f"strength is {strength:g}, which leaves none of {call['num_inference_steps']} steps"
            raise JobRefusedError(f"{problem}; accepted: a larger strength, or more num_steps")
        if result.error is not None:
            error = result.error
            raise error if isinstance(error, Exception) else RuntimeError(str(error))
        return image_of(result.output, moving.index, moving.count)


def image_of(output: Any, index: int = 0, count: int = 1) -> Tensor:
    """An image, or the frames of one, of a pipeline's output of numpy arrays or pictures: channels first, in [-1, 1].

    Args:
        index: which one of the `count` images.

    Raises:
        ValueError: another number of images, or values outside of [0, 1].
    """
    images = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if len(images) != count:
        raise ValueError(f"the pipeline gave {len(images)} images; accepted: {count}")
    pixels = np.asarray(_array(images[index]), dtype=np.float32)
    finite = pixels[np.isfinite(pixels)]
    if finite.size and not (finite.min() >= -TOLERANCE and finite.max() <= 1 + TOLERANCE):
        raise ValueError(f"the pipeline's values are in [{finite.min():g}, {finite.max():g}]; accepted: [0, 1]")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3))) * 2 - 1


def _array(image: Any) -> NDArray[np.float32]:
    """A picture, or a list of pictures, as numbers in [0, 1], (H, W, C) or (F, H, W, C)."""
    if isinstance(image, list):
        return np.stack([_array(each) for each in image])
    if isinstance(image, np.ndarray):
        return image.astype(np.float32, copy=False)
    pixels: NDArray[np.float32] = np.asarray(image, dtype=np.float32) / np.float32(255)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _is_flagged(output: Any, index: int) -> bool:
    """Whether a pipeline's safety checker held an image of its output back."""
    flags = output.get("nsfw_content_detected") if isinstance(output, Mapping) else None
    return bool(flags and flags[index])


def rows_of_pipeline(
    job: SampleJob, request: SampleRequest, served: ServedPipeline, schedule: Schedule | None
) -> list[PipelineRow]:
    """The images that a job asks for, one row each.

    Raises:
        JobRefusedError: a prompt that is too long.
        ValueError: a grid or a schedule that does not fit the pipeline's scheduler.
    """
    call = call_of(request, served)
    call["num_inference_steps"] = request.num_steps
    try:
        check_prompt_lengths(served.pipeline, call)
    except ValueError as error:
        raise JobRefusedError(str(error)) from None
    scheduler = _scheduler_of(request, served.pipeline, schedule)
    solver = (schedule.id if schedule else None, request.sampler, str(request.timesteps))
    num_values = math.prod(output_shape(served.spec, request.height, request.width, request.call))
    return [
        PipelineRow(job.id, request.seed + k, call, scheduler, request.previews, solver, num_values)
        for k in range(job.num_images)
    ]


def call_of(request: Any, served: ServedPipeline) -> dict[str, Any]:
    """The arguments of a pipeline's call that a request for samples or a tuning job gives, and the output's type."""
    takes = served.spec["call"]
    call = decode_images(served.spec, request.call)
    for name in ("prompt", "negative_prompt", "height", "width"):
        if (value := getattr(request, name, None)) is not None:
            call[name] = value
    if "guidance_scale" in takes and (
        takes["guidance_scale"].get("default") is not None or request.guidance_scale != 1
    ):
        call["guidance_scale"] = float(request.guidance_scale)
    if "output_type" in inspect.signature(type(served.pipeline).__call__).parameters:
        # DeepFloyd IF puts its watermark on pictures only.
        has_watermark = getattr(served.pipeline, "watermarker", None) is not None
        call["output_type"] = "pil" if has_watermark else "np"
    return call


def _scheduler_of(request: SampleRequest, pipeline: Any, schedule: Schedule | None) -> Callable[[], Any]:
    """The maker of each run's scheduler: by a schedule, the pipeline's own, or by a sampler of ours."""
    # These import diffusers, which takes seconds. A worker without pipelines does without.
    from timetuner_core.integrations.time_tuner_scheduler import TimeTunerScheduler
    from timetuner_core.pipelines.runs import Solvers

    if schedule is not None:
        names = ("timesteps", "t_ratios", "sampler", "solver_table")
        fields = {name: getattr(schedule, name) for name in names}
        return partial(TimeTunerScheduler.from_schedule, pipeline.scheduler, fields)
    if request.sampler == OWN_SAMPLER:
        return partial(copy.deepcopy, pipeline.scheduler)
    solvers = Solvers(pipeline, get_sampler(request.sampler))
    return solvers.untuned(timesteps_of(request, solvers.noise_schedule)).scheduler
