"""The words that requests and results choose among. Commands need these for their help, before anything else."""

from typing import Literal, TypeAlias

GuidanceType: TypeAlias = Literal["uncond", "classifier", "classifier-free"]
ScheduleStatus: TypeAlias = Literal["accepted", "rejected", "imported"]
ModelState: TypeAlias = Literal["ready", "queued", "running", "refused"]
ModelSort: TypeAlias = Literal["newest", "oldest", "name"]
ScheduleSort: TypeAlias = Literal["newest", "score"]
ModelKind: TypeAlias = Literal["auto", "network", "pipeline"]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
UnreadyState: TypeAlias = Literal["queued", "running", "refused"]
JobState: TypeAlias = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ExportFormat: TypeAlias = Literal["json", "card", "diffusers", "sigmas", "comfyui", "comfyui-node", "sdcpp"]
Phase: TypeAlias = Literal["teacher", "start", "tuning", "evaluation"]
