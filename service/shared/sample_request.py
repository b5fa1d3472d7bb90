"""The request for samples, as it is accepted, stored and read by workers."""

from pydantic import ConfigDict, Field, FiniteFloat

from service.shared.fields import Identifier, Seed
from service.shared.sampling_setting import SamplingSetting, Timesteps
from service.shared.webhook_url import WEBHOOK_URL, WebhookUrl


class SampleRequest(SamplingSetting):
    """Sample images."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "model": "mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W",
                    "num_steps": 10,
                    "num_images": 4,
                    "guidance_type": "classifier-free",
                    "guidance_scale": 2.0,
                    "class_labels": [0, 1, 2, 3],
                    "seed": 7,
                }
            ]
        },
    )

    timesteps: Timesteps = Field(
        "default", description="The grid of untuned sampling, a name or num_steps + 1 times; a schedule has its own."
    )
    schedule: Identifier = Field(
        "auto",
        description="`auto`: the best accepted one for this setting, else untuned; `none`: untuned; an id; an alias.",
    )
    num_images: int = Field(1, ge=1, le=100_000)
    seed: Seed = Field(0, description="Image k is drawn from seed + k, whatever the number of images.")
    condition: str | None = Field(
        None,
        description="Tensor conditions, if the model takes any: base64 .npy file of float32 `(1 or num_images, L, D)`.",
    )
    uncond_condition: str | None = Field(
        None,
        description="The condition that stands for none, `(1, L, D)`. The default is the one that came with the model.",
    )
    class_labels: int | list[int] | None = Field(
        None, description="One label for all images, or one for each. Only guided requests have labels."
    )
    deadline_seconds: FiniteFloat | None = Field(
        None,
        gt=0,
        le=86_400,
        description="A job that has not begun by then is dropped, and a request that waits for it gets 504.",
    )
    webhook_url: WebhookUrl | None = WEBHOOK_URL
    previews: bool = Field(False, description="The event stream shows what each step predicts.")
