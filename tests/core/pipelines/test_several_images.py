"""Several images by one run of a pipeline are those of a run each, or the pipeline is said not to take several."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.core.pipelines.kinds import KINDS
from tests.core.pipelines.run import one_thread
from timetuner_core.pipelines.several_images import arguments_in_common, call_of_several, takes_several
from timetuner_core.pipelines.shared_calls import Request, Result, SharedCalls

pytestmark = pytest.mark.xdist_group("pipelines")

PROMPTS = ("red", "a square on a red table on a red table", "a bad table")
# The prompts of these are as long as the longest of a call, and what pads the others is seen by the network.
PADDED_TOGETHER = ("cogview4", "qwen-image")
WITH_PROMPTS_ALONE = [kind for kind in KINDS if arguments_in_common(kind.call()) is not None]
ALWAYS_TRIED = ("sd15", "sdxl", "flux", "pixart-sigma", "wan", "z-image")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def latents(result: Result) -> Tensor:
    if result.error is not None:
        raise result.error
    return torch.from_numpy(np.asarray(next(iter(result.output.values()))))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.name, marks=() if kind.name in ALWAYS_TRIED else pytest.mark.exhaustive)
        for kind in WITH_PROMPTS_ALONE
        if kind.name not in PADDED_TOGETHER
    ],
)
def test_images_of_one_run_are_those_of_a_run_each(kind: Any) -> None:
    pipeline = kind.build()
    call = {**kind.call(), "num_inference_steps": kind.num_steps}
    shared = SharedCalls(pipeline, refuse_large=False)

    def run(calls: list[dict[str, Any]], seeds: list[int]) -> Tensor:
        (result,) = shared.run([Request(call_of_several(calls, seeds), copy.deepcopy(pipeline.scheduler))])
        return latents(result)

    assert takes_several(shared, call, lambda: copy.deepcopy(pipeline.scheduler))
    calls = [{**call, "prompt": prompt} for prompt in PROMPTS]
    alone = torch.cat([run([each], [seed]) for seed, each in enumerate(calls)])
    torch.testing.assert_close(run(calls, [0, 1, 2]), alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PADDED_TOGETHER)
def test_prompts_that_are_padded_to_the_longest_get_a_run_each(name: str) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    pipeline = kind.build()
    call = {**kind.call(), "num_inference_steps": 2}
    assert not takes_several(SharedCalls(pipeline), call, lambda: copy.deepcopy(pipeline.scheduler))


def test_calls_of_one_run_differ_in_their_prompts_alone() -> None:
    call = {"prompt": "a table", "negative_prompt": "bad", "height": 16, "guidance_scale": 3.0}
    common = arguments_in_common(call)
    assert common == arguments_in_common(call | {"prompt": "a square", "negative_prompt": ""})
    others = ({"height": 8}, {"guidance_scale": 2.0}, {"prompt_2": "red"}, {"negative_prompt": None})
    assert all(arguments_in_common(call | changed) != common for changed in others)
    assert arguments_in_common(call | {"image": torch.zeros(1)}) is None
    assert arguments_in_common({"height": 16}) is None
