"""LitServe with the same model, by the same call, as a process that `serving.py` starts.

    python benchmarks/serving_litserve.py GUIDANCE PORT BATCH_SIZE WAIT_SECONDS

It batches by its own means, is told by each request what our service is told, less the setting, and answers with the
same bytes.
"""

import os
import signal
import sys

import litserve
from fastapi import Response
from serving_model import Image, Sampler


class Api(litserve.LitAPI):
    def __init__(self, guidance: str, batch_size: int, wait: float) -> None:
        super().__init__(max_batch_size=batch_size, batch_timeout=wait)
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
    guidance, port, batch_size, wait = sys.argv[1:]
    us = os.getpid()

    def interrupt(*_: object) -> None:
        if os.getpid() == us:  # and not in a child, which LitServe stops
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    api = Api(guidance, int(batch_size), float(wait))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run("127.0.0.1", int(port), num_api_servers=1, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
