"""All settings, read once from the environment."""

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """What the API, the worker and the dispatcher are told by their environment.

    Each field's environment variable is its name in capitals; `home` is TIMETUNER_HOME.
    """

    model_config = SettingsConfigDict(extra="ignore", populate_by_name=True)

    home: Path = Field(Path("timetuner-data"), validation_alias="TIMETUNER_HOME")
    database_url: str = ""  # default: SQLite in home
    artifacts_url: str = ""  # default: a folder in home
    broker_url: str = "redis://127.0.0.1:6379/0"
    auth: Literal["auto", "on", "off"] = "auto"  # whether requests need an API key; auto: once there is one
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of networks; samples stay in float32
    channels_last: bool = False
    compile: bool = False  # networks, by torch.compile

    max_model_bytes: int = Field(8 * 2**30, ge=0)  # of the models a worker keeps loaded, beside the one at work
    warm_models: int = Field(1, ge=0)  # how many of those sampled from last a worker loads when it starts
    sample_batch_size: int = Field(24, ge=1, le=1024)  # images a worker samples at once
    same_bits: bool = True  # images do not depend on what is sampled with them, to the last bit; false: up to rounding

    metrics_port: int = Field(0, ge=0, le=65535)  # of a worker's metrics; 0: none
    dispatcher_metrics_port: int = Field(0, ge=0, le=65535)
    metrics_host: str = "127.0.0.1"
    otel_exporter_otlp_endpoint: str = ""  # of traces, by OTLP over HTTP; none without it
    log_level: Literal["debug", "info", "warning", "error"] = "warning"  # info: also each request and each job's end

    on_demand_queues: list[str] = []  # whose workers `timetuner up` starts once there is a job for them

    lease_seconds: float = Field(15.0, gt=0)  # a worker silent for longer has lost its job
    max_attempts: int = Field(5, ge=1)
    dispatch_interval_seconds: float = Field(0.5, gt=0)
    republish_seconds: float = Field(30.0, gt=0)  # a message to the broker this old, its queue empty, was lost
    drain_seconds: float = Field(20.0, gt=0)  # how long a process that is stopped may go on with what it has begun
    keep_samples_days: float = Field(7.0, ge=0)  # samples and their requests, once they are over; 0: for ever
    save_seconds: float = Field(1.0, gt=0)  # how much of a tuning job a killed worker loses at most

    webhook_secret: str = Field("", pattern=r"^(whsec_[A-Za-z0-9+/]{32,}=*)?$")  # signs webhooks; none without it
    webhook_networks: list[IPv4Network | IPv6Network] = []  # that webhooks may reach, beside all public addresses
    webhook_attempts: int = Field(8, ge=1)
    webhook_retry_seconds: float = Field(5.0, gt=0)  # to the second attempt; each later wait is four times as long

    max_body_bytes: int = Field(2 * 2**30, ge=1)  # model archives are the largest bodies
    max_json_bytes: int = Field(2**20, ge=1)
    body_seconds: float = Field(30.0, gt=0)  # how long a body may keep us waiting
    cors_origins: list[str] = []  # whose pages' scripts may use the API, such as '["https://example.org"]'; none
    max_images: int = Field(256, ge=1)  # per sampling request
    max_pixel_steps: int = Field(2**28, ge=1)  # values x steps x images x network calls per step
    max_tuning_batch_values: int = Field(2**26, ge=1)  # values of one iteration's network batch
    max_tuning_calls: int = Field(2**31 - 1, ge=1)  # samples put through the network by one job
    max_queued_jobs: int = Field(1000, ge=1)  # of each kind
    max_queue_seconds: float = Field(60.0, gt=0)  # how long a request for samples may have to wait for its turn
    max_wait_seconds: float = Field(120.0, gt=0)  # a synchronous sampling request

    def model_post_init(self, _context: object) -> None:
        home = self.home.absolute()
        self.database_url = self.database_url or f"sqlite:///{home / 'registry.sqlite'}"
        self.artifacts_url = self.artifacts_url or f"file://{home / 'artifacts'}"
