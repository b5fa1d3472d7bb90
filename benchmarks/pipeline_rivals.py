"""LitServe, Ray Serve or BentoML with a pipeline, as a process that `pipeline_serving.py` starts.

    python benchmarks/pipeline_rivals.py NAME FOLDER PORT BATCH_SIZE WAIT_SECONDS

Each batches by its own means. A batch's requests of equal steps are one call of the pipeline. Answers are .npy files.
"""

import asyncio
import io
import os
import sys
from collections import defaultdict
from typing import Any

import numpy as np
from rival_servers import run_litserve, run_ray

# The rivals import this file in processes of their own, whose arguments are others.
os.environ.setdefault("RIVAL", " ".join(sys.argv[1:]))
NAME, FOLDER, PORT, BATCH_SIZE, WAIT = os.environ["RIVAL"].split()


class Pipeline:
    """The pipeline of a folder, with its own scheduler."""

    def __init__(self) -> None:
        import torch
        from diffusers import DiffusionPipeline

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._pipeline: Any = DiffusionPipeline.from_pretrained(FOLDER)
        self._pipeline.set_progress_bar_config(disable=True)

    def images(self, requests: list[dict[str, Any]]) -> list[bytes]:
        """The image of each request, as a .npy file."""
        import torch

        groups = defaultdict(list)
        for index, request in enumerate(requests):
            groups[request["num_steps"]].append(index)
        answers = [b""] * len(requests)
        for num_steps, members in groups.items():
            images = self._pipeline(
                [requests[index]["prompt"] for index in members],
                num_inference_steps=num_steps,
                generator=[torch.Generator().manual_seed(requests[index]["seed"]) for index in members],
                output_type="np",
            ).images
            for index, image in zip(members, images, strict=True):
                file = io.BytesIO()
                np.save(file, image)
                answers[index] = file.getvalue()
        return answers


if NAME == "litserve":
    import litserve
    from fastapi import Response

    class Api(litserve.LitAPI):
        def setup(self, device: str) -> None:
            self.pipeline = Pipeline()

        def batch(self, inputs: list[Any]) -> list[Any]:
            return inputs

        def predict(self, requests: list[Any]) -> list[bytes]:
            return self.pipeline.images(requests)

        def unbatch(self, output: list[bytes]) -> list[bytes]:
            return output

        def encode_response(self, output: bytes) -> Response:
            return Response(output, media_type="application/x-npy")


if NAME == "bentoml" and __name__ != "__main__":
    import bentoml

    @bentoml.service(workers=1, traffic={"timeout": 600, "max_concurrency": 64})
    class Bento:
        def __init__(self) -> None:
            self.pipeline = Pipeline()

        @bentoml.api(  # type: ignore[untyped-decorator]
            route="/predict", batchable=True, max_batch_size=int(BATCH_SIZE), max_latency_ms=600_000
        )
        def predict(self, requests: list[dict[str, Any]]) -> list[str]:
            import base64

            return [base64.b64encode(image).decode() for image in self.pipeline.images(requests)]


def ray_application() -> Any:
    from fastapi import Request, Response
    from ray import serve

    @serve.deployment(max_ongoing_requests=8 * int(BATCH_SIZE))
    class Api:
        def __init__(self) -> None:
            self.pipeline = Pipeline()

        @serve.batch(max_batch_size=int(BATCH_SIZE), batch_wait_timeout_s=float(WAIT))
        async def images(self, requests: list[Any]) -> list[bytes]:
            # A thread samples, so that the next batch's requests are received meanwhile.
            return await asyncio.to_thread(self.pipeline.images, requests)

        async def __call__(self, request: Request) -> Response:
            return Response(await self.images(await request.json()), media_type="application/x-npy")

    return Api.bind()


def run_bentoml() -> None:
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-m", "bentoml", "serve", "pipeline_rivals:Bento", "--port", PORT, "--host", "127.0.0.1"]
    os.execv(sys.executable, command)  # noqa: S606 (the signals that stop this process are for it)


if __name__ == "__main__":
    if NAME == "litserve":
        run_litserve(Api(max_batch_size=int(BATCH_SIZE), batch_timeout=float(WAIT)), int(PORT))
    elif NAME == "ray":
        run_ray(ray_application(), int(PORT))
    else:
        run_bentoml()
