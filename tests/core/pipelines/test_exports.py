"""Exports against diffusers' own schedulers, a fresh process, and a stand-in for ComfyUI's interface."""

import io
import json
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests.core.pipelines.kinds import KINDS, Kind
from tests.core.pipelines.run import one_thread, run
from timetuner_core.exports.__main__ import export
from timetuner_core.exports.formats import Exported, ExportError
from timetuner_core.integrations.diffusers import TimeTunerScheduler
from timetuner_core.samplers import get_sampler
from timetuner_core.samplers.solver_table import SolverTable

pytestmark = pytest.mark.xdist_group("pipelines")

Json = dict[str, Any]
MODEL: Json = {"name": "tiny", "content_hash": "sha256:0", "spec": {}, "source": {}}
MAX_DIFFERENCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def schedule(**changes: Any) -> Json:
    given: Json = {"id": "sch_1", "version": 1, "status": "accepted", "sampler": "ddim", "num_steps": 3}
    given |= {"guidance_type": "uncond", "guidance_scale": 1.0, "eta": 0.0, "clipping": None, "solver_table": None}
    given |= {"timesteps": [1.0, 0.6, 0.25, 0.0], "t_ratios": [1.0] * 3, "provenance": {}, "evaluation": None}
    return given | changes


def kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def config_of(scheduler: Any) -> Json:
    """The configuration as a file has it."""
    config: Json = json.loads(scheduler.to_json_string())
    return config


def exported(format: str, config: Json, given: Json, lossy: bool = False) -> Exported:
    return export(format, given, MODEL, config, lossy)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_the_list_of_sigmas_gives_the_librarys_image_by_diffusers_own_scheduler(name: str) -> None:
    kind = kind_of(name)
    pipeline = kind.build()
    own, given = pipeline.scheduler, schedule()
    config = config_of(own)
    content = json.loads(exported("sigmas", config, given).content)
    assert len(content["sigmas"]) == (3 if name in ("sd3", "flux") else 4)
    assert content["not_carried"] == []

    pipeline.scheduler = TimeTunerScheduler.from_schedule(own, given)
    expected = run(kind, pipeline)
    # This is what the export's `usage` says.
    pipeline.scheduler = getattr(diffusers, content["scheduler"]).from_config(own.config, **content["changes"])
    generator = torch.Generator().manual_seed(0)
    outputs = pipeline(sigmas=content["sigmas"], num_inference_steps=3, generator=generator, **kind.call())
    found = torch.as_tensor(next(iter(outputs.values())))
    torch.testing.assert_close(found, expected, atol=MAX_DIFFERENCE, rtol=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"t_ratios": [1.0, 0.9, 1.0]}, "t_ratios are not carried"),
        ({"solver_table": {"a": [0.5] * 3, "b": [[0.5], [0.1, 0.4], [0.1, 0.1, 0.3]]}}, "solver_table is not carried"),
        ({"sampler": "deis"}, "the sampler deis is not carried"),
        ({"eta": 0.5}, "eta=0.5 is not carried"),
        ({"clipping": "clip_sample_range=1"}, "clipping is not carried"),
    ],
)
@pytest.mark.parametrize("format", ["sigmas", "comfyui", "sdcpp"])
def test_what_is_more_than_a_grid_is_refused_by_name_unless_it_may_be_lost(
    format: str, changes: Json, reason: str
) -> None:
    config = config_of(diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"))
    given = schedule(**changes)
    with pytest.raises(ExportError, match=f"{reason}.*accepted: lossy=true"):
        exported(format, config, given)
    lossy = exported(format, config, given, lossy=True)
    assert any(reason in sentence for sentence in lossy.not_carried)
    # The file names what is lost, too.
    assert reason in lossy.content.decode()


def test_a_grid_that_ends_with_noise_says_that_diffusers_flow_scheduler_ends_without() -> None:
    config = config_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    with pytest.raises(ExportError, match="the end of the grid is not carried"):
        exported("sigmas", config, schedule(timesteps=[1.0, 0.6, 0.25, 0.1]))


def test_lists_for_other_programs_have_no_exponents_and_one_value_more_than_steps() -> None:
    config = config_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    given = schedule(timesteps=[1.0, 0.5, 1e-5, 0.0])
    first_line = exported("comfyui", config, given).content.decode().splitlines()[0]
    assert first_line == "1, 0.75, 0.000029999, 0"
    arguments = exported("sdcpp", config, given).content.decode().splitlines()[0]
    assert arguments == '--sigmas "1,0.75,0.000029999,0" --steps 3 --sampling-method euler'


def test_the_diffusers_zip_gives_the_librarys_image_in_a_fresh_process(tmp_path: Path) -> None:
    kind = kind_of("sd15")
    pipeline = kind.build()
    table = {"a": [0.8, 0.7, 0.1], "b": [[0.3], [0.1, 0.4], [-0.1, 0.2, 0.9]]}
    given = schedule(t_ratios=[0.9, 0.8, 1.0], solver_table=table)
    config = config_of(pipeline.scheduler)
    with zipfile.ZipFile(io.BytesIO(exported("diffusers", config, given).content)) as archive:
        assert sorted(archive.namelist()) == ["README.md", "scheduler/scheduler_config.json"]
        archive.extractall(tmp_path / "export")
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.scheduler = TimeTunerScheduler.from_schedule(pipeline.scheduler, given)
    expected = run(kind, pipeline)
    # The four lines of the card, with what stands for "this-folder" and "...".
    program = """
import sys
import timetuner_core
from diffusers import StableDiffusionPipeline
from timetuner_core.integrations.diffusers import TimeTunerScheduler
import torch
from tests.core.pipelines.kinds import KINDS
from tests.core.pipelines.run import one_thread, run
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1] + "/pipeline")
pipeline.scheduler = TimeTunerScheduler.from_pretrained(sys.argv[1] + "/export", subfolder="scheduler")
with one_thread():
    torch.save(run(next(kind for kind in KINDS if kind.name == "sd15"), pipeline), sys.argv[1] + "/image.pt")
"""
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "image.pt"), expected, atol=1e-5, rtol=0)


# ComfyUI's interface, as far as a sampler sees it: a guided model that gives x0 in ComfyUI's variable, whose network is
# told what `model_sampling.timestep` makes of the noise level.


def network(x: Tensor, told: Tensor) -> Tensor:
    """Something smooth that depends on both."""
    told = told.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x * torch.cos(told)) + 0.3 * torch.sin(3 * told)


class Discrete(torch.nn.Module):
    """Variance preserving models: x / alpha, predictions of eps, and whole training steps."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
        self.sigma_max = self.sigmas[-1]

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(dim=0).view(sigma.shape)

    def predict(self, x: Tensor, sigma: Tensor) -> Tensor:
        scale = (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
        return x - sigma.reshape(-1, 1, 1, 1) * network(x / scale, self.timestep(sigma).float() / 1000)

    def noise_scaling(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return noise * (1 + sigma**2).sqrt()

    def inverse_noise_scaling(self, _sigma: Tensor, latent: Tensor) -> Tensor:
        return latent


class Flow(torch.nn.Module):
    """Models of flow matching: predictions of velocity."""

    sigma_max = torch.tensor(1.0)

    def timestep(self, sigma: Tensor) -> Tensor:
        return 1000 * sigma

    def predict(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma.reshape(-1, 1, 1, 1) * network(x, self.timestep(sigma) / 1000)

    def noise_scaling(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return sigma * noise

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent / (1 - sigma)


class GuidedModel:
    """What ComfyUI calls a sampler with: `model.inner_model.inner_model` is the network's model."""

    def __init__(self, model_sampling: Any) -> None:
        self.model_sampling = model_sampling
        self.inner_model = types.SimpleNamespace(inner_model=types.SimpleNamespace(model_sampling=model_sampling))

    def __call__(self, x: Tensor, sigma: Tensor, **_extra_args: Any) -> Tensor:
        return self.model_sampling.predict(x, sigma)  # type: ignore[no-any-return]


class KSAMPLER:
    """How ComfyUI runs a sampler's function, from noise."""

    def __init__(self, sampler_function: Any) -> None:
        self.sampler_function = sampler_function

    def sample(self, model: Any, sigmas: Tensor, noise: Tensor) -> Tensor:
        x = model.model_sampling.noise_scaling(sigmas[0], noise)
        seen: list[Any] = []
        x = self.sampler_function(model, x, sigmas, extra_args={"seed": 0}, callback=seen.append, disable=True)
        assert [each["i"] for each in seen] == list(range(len(sigmas) - 1))
        return model.model_sampling.inverse_noise_scaling(sigmas[-1], x)  # type: ignore[no-any-return]


def load_node(monkeypatch: pytest.MonkeyPatch, code: str) -> tuple[Any, Tensor]:
    """The outputs of the node of a file, which is run as ComfyUI runs it."""
    samplers = types.ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSAMPLER  # type: ignore[attr-defined]
    comfy = types.ModuleType("comfy")
    comfy.samplers = samplers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)
    module: Json = {"__name__": "node"}
    exec(compile(code, "node.py", "exec"), module)
    (node,) = module["NODE_CLASS_MAPPINGS"].values()
    assert node.RETURN_TYPES == ("SAMPLER", "SIGMAS")
    outputs: tuple[Any, Tensor] = getattr(node(), node.FUNCTION)()
    return outputs


def library_sample(base: Any, given: Json, noise: Tensor) -> Tensor:
    scheduler = TimeTunerScheduler.from_schedule(base, given)
    x = scheduler.init_noise_sigma * noise
    for told in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, told), torch.full((len(x),), float(told) / 1000))
        x = scheduler.step(output, told, x).prev_sample
    return x


VP = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize(
    ("base", "end", "sampler", "learned"),
    [
        *((*case, "dpmpp_2m", learned) for case in ((VP, 0.0), (VP, 0.001), (FLOW, 0.0)) for learned in (False, True)),
        (FLOW, 0.05, "dpmpp_2m", True),
        (FLOW, 0.05, "dpmpp_2s", False),
        (VP, 0.0, "heun", True),
    ],
)
def test_the_comfyui_node_gives_the_librarys_latents(
    base: Any, end: float, sampler: str, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = schedule(timesteps=[1.0, 0.613, 0.25, end], t_ratios=[0.93, 1.1, 0.87], sampler=sampler)
    config = config_of(base)
    if learned:
        noise_schedule = TimeTunerScheduler.from_schedule(base, given).noise_schedule
        grid = torch.tensor(given["timesteps"], dtype=torch.float64)
        own = SolverTable.of_sampler(get_sampler(sampler), noise_schedule, grid)
        offsets = 0.05 * torch.ones(own.num_calls, own.num_calls + 1, dtype=torch.float64)
        given["solver_table"] = own.plus(offsets).to_dict()
    node, sigmas = load_node(monkeypatch, exported("comfyui-node", config, given).content.decode())
    model_sampling = Flow() if base is FLOW else Discrete(VP.alphas_cumprod)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = node.sample(GuidedModel(model_sampling), sigmas, noise)
    expected = library_sample(base, given, noise)
    torch.testing.assert_close(found, expected, atol=MAX_DIFFERENCE, rtol=0)
    # The model is told its own times again, by whoever uses it next.
    assert "timestep" not in vars(model_sampling)
    untold = library_sample(base, given | {"t_ratios": [1.0] * 3}, noise)
    assert float((untold - expected).abs().max()) > 20 * MAX_DIFFERENCE


def test_the_comfyui_node_refuses_other_sigmas_and_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, sigmas = load_node(monkeypatch, exported("comfyui-node", config_of(VP), schedule()).content.decode())
    model, noise = GuidedModel(Discrete(VP.alphas_cumprod)), torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="accepted: all of the node's own"):
        sampler.sample(model, sigmas[1:], noise)
    with pytest.raises(ValueError, match=r"the model's largest sigma is 1; accepted: 14\.6"):
        sampler.sample(GuidedModel(Flow()), sigmas, noise)


def test_a_schedule_with_added_noise_is_refused_for_comfyui() -> None:
    with pytest.raises(ExportError, match=r"eta is 0\.5; accepted for ComfyUI: 0"):
        exported("comfyui-node", config_of(VP), schedule(eta=0.5))
    with pytest.raises(ExportError, match="'ddpm'; accepted"):
        exported("comfyui-node", config_of(VP), schedule(sampler="ddpm"))
