"""Memory of tuning a pipeline beside that of sampling it, with as many rows in a call.

python benchmarks/pipeline_memory.py

The pipeline is Stable Diffusion 1.5 in small: latents of 32 x 32, and random weights. PyTorch's profiler counts what is
allocated in all threads.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from small_pipelines import small_stable_diffusion
from torch.profiler import ProfilerActivity, profile

from timetuner_core.pipelines.tuning import tune_pipeline

SIZE = 64  # The tiny VAE halves it.


def peak(work: Callable[[], object]) -> float:
    """The most MiB that PyTorch had allocated during some work."""
    with TemporaryDirectory() as folder, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
        profiler.stop()
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = [event["args"] for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    return max(event["Total Allocated"] for event in events) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="above 1 an image has two rows")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args()
    pipeline = small_stable_diffusion(options.channels, SIZE // 2, norm_num_groups=8)
    call = {"guidance_scale": options.guidance_scale, "height": SIZE, "width": SIZE}
    rows = options.images * (2 if options.guidance_scale > 1 else 1)
    prompts = [f"{number} red squares on a table" for number in range(8)]

    def sample() -> None:
        pipeline(prompts[:1] * options.images, num_inference_steps=3, output_type="latent", **call)

    def tune() -> None:
        least = {"teacher_num_steps": 4, "total_iters": 1, "num_samples": 2, "num_held_out": 2}
        tune_pipeline(pipeline, prompts, num_steps=3, max_batch=rows, **least, **call)

    sample()
    sampling, tuning = peak(sample), peak(tune)
    print(f"{rows} rows: sampling {sampling:.1f} MiB, tuning {tuning:.1f} MiB, {tuning / sampling:.2f} x")


if __name__ == "__main__":
    main()
