"""A job for many images is split into parts that workers take by themselves."""

from typing import Any

from service.registry.tables import JobState, SampleJob
from service.shared.arrays import decode_array, encode_array
from service.shared.job_requests import SampleRequest


def split_into_parts(job: SampleJob, most: int) -> list[SampleJob]:
    """Split a job for more than `most` images, which is what a worker samples at once. Empty if it needs no parts."""
    if job.num_images <= most or job.state == JobState.SUCCEEDED:
        return []
    request, starts = SampleRequest.stored(job.request), range(0, job.num_images, most)
    job.num_parts = len(starts)
    return [
        SampleJob(
            owner=job.owner,
            model_id=job.model_id,
            schedule_id=job.schedule_id,
            request=_part_of(request, first, min(most, job.num_images - first)).model_dump(mode="json"),
            request_hash="",  # Parts are never reused for other requests.
            dtype=job.dtype,
            num_images=min(most, job.num_images - first),
            priority=job.priority,
            deadline_at=job.deadline_at,
            parent_id=job.id,
            first_image=first,
            traceparent=job.traceparent,
            request_id=job.request_id,
        )
        for first in starts
    ]


def _part_of(request: SampleRequest, first: int, count: int) -> SampleRequest:
    """The request for images `first` to `first + count - 1` of another one."""
    rows = slice(first, first + count)
    changed: dict[str, Any] = {"num_images": count, "seed": request.seed + first}
    if isinstance(request.class_labels, list):
        changed["class_labels"] = request.class_labels[rows]
    if request.condition is not None:
        condition = decode_array(request.condition)
        changed["condition"] = encode_array(condition if len(condition) == 1 else condition[rows])
    return request.model_copy(update=changed)
