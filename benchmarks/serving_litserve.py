"""LitServe with the same model, by the same call, as a process that `serving.py` starts.

    python benchmarks/serving_litserve.py GUIDANCE PORT BATCH_SIZE WAIT_SECONDS [NUM_STEPS ...]

It batches by its own means, is told by each request what our service is told, less the setting, and answers with the
same bytes. It has an endpoint for each number of steps that is given, each with a process of its own.
"""

import sys

import litserve
from fastapi import Response
from rival_servers import run_litserve
from serving_model import Image, Sampler


class Api(litserve.LitAPI):
    def __init__(self, guidance: str, batch_size: int, wait: float, path: str) -> None:
        super().__init__(max_batch_size=batch_size, batch_timeout=wait, api_path=path)
        self.guidance = guidance

    def setup(self, device: str) -> None:
        self.sampler = Sampler(self.guidance)

    def batch(self, inputs: list[Image]) -> list[Image]:
        return inputs

    def predict(self, images: list[Image]) -> list[bytes]:
        return self.sampler.npy(images)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/x-npy")


def main() -> None:
    guidance, port, batch_size, wait, *num_steps = sys.argv[1:]
    paths = [f"/predict/{each}" for each in num_steps] or ["/predict"]
    run_litserve([Api(guidance, int(batch_size), float(wait), path) for path in paths], int(port))


if __name__ == "__main__":
    main()
