"""All settings, read once from the environment."""

import os
import re
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableError

from service.shared.settings_error import SettingsError

DEVICE = r"auto|cpu|(cuda|xpu)(:\d+)?"  # Times are in float64, which mps does not have.
DATABASE_URL = r"(sqlite|postgres|postgresql)(\+\w+)?://.*"
BROKER_URL = r"(redis|rediss|redis\+socket|rediss\+socket|unix)://.*"
# Accepted values, for settings whose pattern says little to people.
ACCEPTED = {
    "database_url": "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE",
    "broker_url": "redis://HOST:PORT/NUMBER or redis+socket://FILE",
    "sample_batch_size": "auto, or 1 to 1024",
    "device": "auto, cpu, cuda, cuda:0, cuda:1, ...",
    "webhook_secret": "whsec_ and at least 32 characters of base64",
}
# Workers begin with this many images at once, and split requests for more, where no number is set.
DEFAULT_BATCH_SIZE = 24
SECRETS = ("webhook_secret",)
PASSWORD = re.compile(r"(?<=://)[^/@]*:[^/]*@")


class Settings(BaseSettings):
    """The settings of the API, the workers and the dispatcher, read from their environment.

    Each field's environment variable is its name in capitals. No field may be named as a variable that shells
    and systems set for themselves, such as HOME.
    """

    model_config = SettingsConfigDict(extra="ignore")

    timetuner_home: Path = Path("timetuner-data")
    database_url: str = Field("", pattern=f"^({DATABASE_URL})?$")  # The default is SQLite in the home.
    database_lock_seconds: float = Field(10.0, gt=0)  # The API waits this long for a lock, and then answers 503.
    database_statement_seconds: float = Field(30.0, gt=0)  # The API lets PostgreSQL work this long on one statement.
    artifacts_url: str = ""  # The default is a folder in the home.
    broker_url: str = Field("redis://127.0.0.1:6379/0", pattern=f"^{BROKER_URL}$")
    auth: Literal["auto", "on", "off"] = "auto"  # `auto` needs API keys once there is one.
    forwarded_allow_ips: str = (
        "127.0.0.1"  # Proxies whose headers say who asks: addresses and networks by commas, or *.
    )
    device: str = Field("auto", pattern=f"^({DEVICE})$")
    # A network's tuned schedule is tried in this precision, too, and sampled in it if it is accepted so; all else is in
    # float32. `auto` is bfloat16 on a CUDA device that has it, else float32; with `float32`, all is.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    channels_last: bool = False
    compile: bool = False  # Networks are compiled by torch.compile.
    cuda_graphs: bool = False  # On CUDA, sampling repeats recorded calls of networks that are not compiled.

    models_dir: Annotated[Path | None, BeforeValidator(lambda path: path or None)] = (
        None  # Pipelines below this folder may be registered by their paths.
    )
    allow_downloads: bool = False  # Workers may download pipelines that the Hugging Face cache does not have.
    # A pipeline is on the worker's `device` as a whole, or there part by part (`offload`), or over all devices
    # (`balanced`). `auto` offloads one that the device's free memory does not hold.
    pipeline_placement: Literal["auto", "device", "offload", "balanced"] = "auto"

    # A worker keeps models loaded up to this size together, beside the one that it is using.
    max_model_bytes: int = Field(8 * 2**30, ge=0)
    warm_models: int = Field(1, ge=0)  # A starting worker loads this many of the models that were sampled last.
    # A worker samples this many images at once. `auto` finds the number for each model, by timing the network.
    sample_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    batch_step_seconds: float = Field(0.25, gt=0)  # A step of a batch whose size was found takes about this at most.
    # Images have the same bits whatever is sampled with them. If false, they may differ by rounding.
    same_bits: bool = False

    metrics_port: int = Field(0, ge=0, le=65535)  # The port of a worker's metrics; 0 serves none.
    dispatcher_metrics_port: int = Field(0, ge=0, le=65535)
    metrics_host: str = "127.0.0.1"
    otel_exporter_otlp_endpoint: str = ""  # Traces go there by OTLP over HTTP. Without it there are none.
    log_level: Literal["debug", "info", "warning", "error"] = "warning"  # `info` has each request and end of a job.

    on_demand_queues: list[str] = []  # `timetuner up` starts the workers of these queues with their first job.

    lease_seconds: float = Field(15.0, gt=0)  # A worker loses a job whose lease it does not renew for this long.
    # A step that takes longer, and ten times as long as any before it, hangs: the worker ends and loses its jobs.
    step_seconds: float = Field(300.0, gt=0)
    max_step_seconds: float = Field(1800.0, gt=0)  # The limit of every step. The first one has it: it may compile.
    max_attempts: int = Field(5, ge=1)
    dispatch_interval_seconds: float = Field(0.5, gt=0)
    republish_seconds: float = Field(30.0, gt=0)  # A message this old whose queue is empty was lost.
    drain_seconds: float = Field(20.0, gt=0)  # A process that is stopped may finish its work for this long.
    keep_samples_days: float = Field(7.0, ge=0)  # Samples and their requests are deleted after that; 0 keeps them.
    # Events of tuning jobs, schedules that were rejected, and the audit log are deleted after that; 0 keeps them.
    keep_events_days: float = Field(0.0, ge=0)
    keep_rejected_days: float = Field(0.0, ge=0)
    keep_audit_days: float = Field(0.0, ge=0)
    # Models and samples may have so many bytes together; 0 sets no limit. While most of it is taken, the oldest samples
    # are deleted before their time, unless they are kept for ever.
    max_stored_bytes: int = Field(0, ge=0)
    save_seconds: float = Field(1.0, gt=0)  # A killed worker loses at most this much of a tuning job.

    webhook_secret: str = Field("", pattern=r"^(whsec_[A-Za-z0-9+/]{32,}=*)?$")  # Webhooks are signed with it.
    webhook_networks: list[IPv4Network | IPv6Network] = []  # Webhooks may reach these beside public addresses.
    webhook_attempts: int = Field(8, ge=1)
    webhook_retry_seconds: float = Field(5.0, gt=0)  # The wait before the second attempt. Later ones grow fourfold.

    max_body_bytes: int = Field(2 * 2**30, ge=1)  # Model archives are the largest bodies.
    max_json_bytes: int = Field(2**20, ge=1)
    body_seconds: float = Field(30.0, gt=0)  # A body may pause for this long.
    cors_origins: list[str] = []  # Scripts of these sites may use the API, such as '["https://example.org"]'.
    max_images: int = Field(256, ge=1)  # The limit of one sampling request.
    max_pixel_steps: int = Field(2**28, ge=1)  # The limit of values x steps x images x network calls per step.
    # The limit of values of samples in one iteration's network batch. A network's activations are not counted.
    max_tuning_batch_values: int = Field(2**26, ge=1)
    max_tuning_calls: int = Field(2**31 - 1, ge=1)  # The limit of samples that one job puts through the network.
    max_queued_jobs: int = Field(1000, ge=1)  # Each kind of jobs has this limit.
    max_queue_seconds: float = Field(60.0, gt=0)  # Requests for samples that would wait longer are refused.
    max_wait_seconds: float = Field(120.0, gt=0)  # A synchronous sampling request waits this long at most.

    def __init__(self, **given: Any) -> None:
        """Raises: SettingsError, naming each variable that cannot be used."""
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise SettingsError(list(dict.fromkeys(_lines(error)))) from None
        except UnreadableError as error:
            raise SettingsError([_unreadable(error)]) from None

    @property
    def part_size(self) -> int:
        """A request for more images is split into parts of so many. Workers that find their sizes begin with it."""
        return DEFAULT_BATCH_SIZE if self.sample_batch_size == "auto" else self.sample_batch_size

    def model_post_init(self, _context: object) -> None:
        home = self.timetuner_home.absolute()
        self.database_url = self.database_url or f"sqlite:///{home / 'registry.sqlite'}"
        self.artifacts_url = self.artifacts_url or f"file://{home / 'artifacts'}"


def _lines(error: ValidationError) -> Iterator[str]:
    """A line for each variable: its name, its value and what is accepted."""
    for fault in error.errors(include_url=False, include_context=False):
        name = str(fault["loc"][0])
        accepted = ACCEPTED.get(name) or fault["msg"].removeprefix("Input should be ")
        value = "not as expected" if name in SECRETS else repr(PASSWORD.sub("***@", str(fault["input"])))
        yield f"{name.upper()} is {value}; accepted: {accepted}"


def _unreadable(error: UnreadableError) -> str:
    """A line for a variable that is to hold a list, and is no JSON."""
    match = re.search(r'field "(\w+)"', str(error))
    name = match[1].upper() if match else "a setting"
    return f"{name} is {os.environ.get(name, '')!r}; accepted: a JSON list, such as '[\"VALUE\"]'"
