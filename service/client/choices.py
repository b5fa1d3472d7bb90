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

# Help texts and completion name these. A service knows the samplers of packages that are installed there, too.
SAMPLERS: tuple[str, ...] = (
    "ddim",
    "ddpm",
    "euler",
    "heun",
    "dpm_1",
    "dpm_2",
    "dpm_3",
    "dpmpp_2s",
    "dpmpp_2m",
    "dpmpp_3m",
)
SAMPLERS += ("dpmpp_2m_sde", "unipc_2", "unipc_3", "ipndm", "deis")
OBJECTIVES = (
    "end_to_end",
    "solver",
    "next_eps",
    "teacher_step",
    "ays",
    "ays_list",
    "gits",
    "oss",
    "dc_solver",
    "dmn",
    "grid",
    "pipeline",
)
GRIDS = ("default", "uniform", "quadratic", "log_snr", "edm")
BUILTINS = ("digits8", "digits32-ldm", "fashion32", "mixture-ring", "mixture-gratings")
