"""Ray Serve with the same model, by the same call, as a process that `serving.py` starts.

    python benchmarks/serving_ray.py GUIDANCE PORT BATCH_SIZE WAIT_SECONDS

It batches by its own means, is told by each request what our service is told, less the setting, and answers with the
same bytes.
"""

import asyncio
import sys
from typing import Any

from fastapi import Request, Response
from ray import serve
from rival_servers import run_ray
from serving_model import Image, Sampler


def application(guidance: str, batch_size: int, wait: float) -> Any:
    @serve.deployment(max_ongoing_requests=8 * batch_size)
    class Api:
        def __init__(self) -> None:
            self.sampler = Sampler(guidance)

        @serve.batch(max_batch_size=batch_size, batch_wait_timeout_s=wait)
        async def npy(self, images: list[Image]) -> list[bytes]:
            # A thread samples, so that the next batch's requests are received meanwhile.
            return await asyncio.to_thread(self.sampler.npy, images)

        async def __call__(self, request: Request) -> Response:
            return Response(await self.npy(await request.json()), media_type="application/x-npy")

    return Api.bind()


def main() -> None:
    guidance, port, batch_size, wait = sys.argv[1:]
    run_ray(application(guidance, int(batch_size), float(wait)), int(port))


if __name__ == "__main__":
    main()
