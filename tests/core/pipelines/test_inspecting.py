"""Refusals of a saved pipeline before its weights are loaded, and findings of a trial call."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file

from tests.core.pipelines import parts
from tests.core.pipelines.kinds import KINDS
from tests.core.pipelines.run import one_thread
from timetuner_core.models.folder_files import ModelFormatError
from timetuner_core.pipelines.files import fingerprint, pipeline_hash
from timetuner_core.pipelines.inspecting import Limits, inspect_in_child, inspect_pipeline
from timetuner_core.pipelines.loading import load_pipeline
from timetuner_core.pipelines.trial import try_pipeline

pytestmark = pytest.mark.xdist_group("pipelines")

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion with a safety checker, whose weights are in float16."""
    folder = tmp_path_factory.mktemp("pipeline")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vision = {**size, "projection_dim": 8, "image_size": 16, "patch_size": 4}
    clip = transformers.CLIPConfig(vision_config=vision, text_config={**size, "vocab_size": 32}, projection_dim=8)
    checker = {
        "safety_checker": parts.seeded(StableDiffusionSafetyChecker, clip),
        "feature_extractor": transformers.CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
    }
    components = kind("sd15").parts() | checker | {"requires_safety_checker": True}
    diffusers.StableDiffusionPipeline(**components).save_pretrained(folder)
    pipeline = load_pipeline(folder, dtype=torch.float16)  # The parts themselves are shared between tests.
    pipeline.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n# A card\n")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def kind(name: str) -> Any:
    return next(kind for kind in KINDS if kind.name == name)


def image(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(
        pipeline("a red square", num_inference_steps=2, generator=generator, output_type="np").images
    )


def test_a_pipeline_is_described_and_tried(saved: Path) -> None:
    spec = inspect_pipeline(saved)
    assert spec["licence"] == {"name": "openrail++", "source": "README.md"}
    assert (spec["dtype"], spec["flags_content"], spec["tunable"]) == ("float16", True, None)
    pipeline = load_pipeline(saved, dtype=torch.float16)
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert spec["num_bytes"] == sum(2 * p.numel() for network in networks for p in network.parameters())
    assert spec["num_parameters"] == sum(p.numel() for p in pipeline.unet.parameters())
    tried = try_pipeline(pipeline, spec)
    facts = {"output": "images", "image_shape": [3, 16, 16], "sample_shape": [4, 8, 8], "size_multiple": 8}
    assert {name: tried[name] for name in facts} == facts
    assert tried["call"]["guidance_scale"] == {"type": "number", "default": 7.5, "required": False}
    unserved = ("generator", "latents", "num_inference_steps", "sigmas", "cross_attention_kwargs", "prompt_embeds")
    assert not [name for name in unserved if name in tried["call"]]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("dit", {}, {"required": ["class_labels"], "image_shape": [3, 16, 16], "size_multiple": 1}),
        ("sd15-inpaint", {}, {"required": ["prompt", "image", "mask_image"], "image_shape": [3, 16, 16]}),
        (
            "wan",
            {"height": 32, "width": 16, "num_frames": 5},
            {"required": ["prompt"], "output": "frames", "image_shape": [5, 3, 32, 16], "size_multiple": 16},
        ),
        (
            "flux",
            {"height": 16, "width": 8},
            {"required": ["prompt"], "image_shape": [3, 16, 8], "sample_shape": [32, 4]},
        ),
    ],
)
def test_a_trial_finds_shapes_and_required_arguments(
    name: str, given: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = kind(name).build()
    pipeline.save_pretrained(tmp_path)
    spec = try_pipeline(pipeline, inspect_pipeline(tmp_path), **given)
    spec["required"] = [argument for argument, facts in spec["call"].items() if facts["required"]]
    assert {field: spec[field] for field in expected} == expected


def test_a_pipeline_whose_call_fails_is_refused(folder: Path) -> None:
    """Classifier-free guidance needs one width of embeddings, and this network another."""
    write_json(folder / "unet/config.json", sample_size=7)
    with pytest.raises(ModelFormatError, match=r"its call with default arguments fails \(.*divisible by 8"):
        try_pipeline(load_pipeline(folder), inspect_pipeline(folder))


def test_values_that_are_not_finite_are_refused(folder: Path) -> None:
    change_weight(folder / UNET_WEIGHTS, "conv_out.bias", lambda weight: torch.full_like(weight, 6e4).cumsum(0))
    with pytest.raises(ModelFormatError, match="in float16, it gives values that are not finite"):
        try_pipeline(load_pipeline(folder, dtype=torch.float16), inspect_pipeline(folder))


@pytest.mark.parametrize("options", [{"max_shard_size": "10KB"}, {"variant": "fp16"}], ids=["sharded", "variant"])
def test_sharded_and_variant_weights_are_read(saved: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    pipeline = load_pipeline(saved)
    pipeline.save_pretrained(tmp_path, **options)
    assert not (tmp_path / UNET_WEIGHTS).exists()
    assert inspect_pipeline(tmp_path)["dtype"] == "float32"
    torch.testing.assert_close(image(load_pipeline(tmp_path)), image(pipeline))


def test_weights_under_names_of_older_versions_are_read(folder: Path) -> None:
    expected = image(load_pipeline(folder))
    path = folder / "text_encoder/model.safetensors"
    weights = {f"text_model.{name}": weight for name, weight in load_file(path).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, path, {"format": "pt"})
    inspect_pipeline(folder)
    torch.testing.assert_close(image(load_pipeline(folder)), expected)


def test_only_the_chosen_variant_is_loaded(folder: Path) -> None:
    """A second set of weights beside the checked one is neither checked nor hashed."""
    expected, before = image(load_pipeline(folder)), pipeline_hash(folder, "float16")
    other = folder / "unet/diffusion_pytorch_model.other.safetensors"
    shutil.copy(folder / UNET_WEIGHTS, other)
    change_weight(other, "conv_out.bias", lambda weight: weight + 1)
    for name in ("vae/diffusion_pytorch_model", "text_encoder/model", "safety_checker/model"):
        (folder / f"{name}.safetensors").rename(folder / f"{name}.other.safetensors")
    inspect_pipeline(folder)
    torch.testing.assert_close(image(load_pipeline(folder)), expected)
    assert pipeline_hash(folder, "float16") != before  # The other components have new names.
    changed = pipeline_hash(folder, "float16")
    change_weight(other, "conv_out.bias", lambda weight: weight + 1)
    assert pipeline_hash(folder, "float16") == changed


def test_a_change_of_a_file_changes_fingerprint_and_hash(folder: Path) -> None:
    before = fingerprint(folder), pipeline_hash(folder, "float16")
    assert pipeline_hash(folder, "float32") != before[1]
    (folder / "vae/notes.md").write_text("Nothing reads it.")
    assert (fingerprint(folder), pipeline_hash(folder, "float16")) == before
    change_weight(folder / "vae/diffusion_pytorch_model.safetensors", "quant_conv.bias", lambda weight: weight + 1)
    assert fingerprint(folder) != before[0]
    assert pipeline_hash(folder, "float16") != before[1]


def write_json(path: Path, *removed: str, **changed: Any) -> None:
    content = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in removed}))


def change_weight(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    weights = load_file(path)
    changed = change(weights.pop(name))
    save_file(weights if changed is None else weights | {name: changed}, path, {"format": "pt"})


def index(folder: Path, *removed: str, **changed: Any) -> None:
    write_json(folder / "model_index.json", *removed, **changed)


def large_vocabulary(folder: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens([f"word{number}" for number in range(40)])
    tokenizer.save_pretrained(folder / "tokenizer")


def missing_shard(folder: Path) -> None:
    weights = load_file(folder / UNET_WEIGHTS)
    (folder / UNET_WEIGHTS).rename(folder / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    shards = dict.fromkeys(weights, "diffusion_pytorch_model-00001-of-00002.safetensors")
    shards |= {"conv_in.weight": "diffusion_pytorch_model-00002-of-00002.safetensors"}
    (folder / f"{UNET_WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))


def without(folder: Path, file: str, name: str) -> None:
    change_weight(folder / file, name, lambda _: None)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file with code": (
        lambda folder: (folder / "unet/my_unet.py").write_text("print()"),
        "unet/my_unet.py: it is code, which is never run; accepted: ",
    ),
    "a pipeline of its own": (
        lambda folder: index(folder, _class_name=["pipeline", "Mine"]),
        r"model_index.json: _class_name is \"\['pipeline', 'Mine'\]\"; accepted: ",
    ),
    "a pipeline that diffusers lacks": (
        lambda folder: index(folder, _class_name="MyPipeline"),
        "model_index.json: _class_name is 'MyPipeline'; accepted: ",
    ),
    "a model that brings its code": (
        lambda folder: write_json(folder / "text_encoder/config.json", auto_map={"AutoModel": "them/theirs--code.M"}),
        "text_encoder/config.json: auto_map is .*; accepted: ",
    ),
    "attention that is downloaded": (
        lambda folder: write_json(folder / "text_encoder/config.json", _attn_implementation="them/kernel"),
        "text_encoder/config.json: _attn_implementation is them/kernel; accepted: ",
    ),
    "a class from elsewhere": (
        lambda folder: index(folder, unet=["os", "system"]),
        "model_index.json: 'unet' is os.system; accepted: ",
    ),
    "a class that is no component": (
        lambda folder: index(folder, unet=["diffusers", "DiffusionPipeline"]),
        "model_index.json: 'unet' is diffusers.DiffusionPipeline; accepted: ",
    ),
    "an index without a component": (
        lambda folder: index(folder, "vae"),
        "model_index.json: component 'vae' is missing; accepted: ",
    ),
    "a component without files": (
        lambda folder: shutil.rmtree(folder / "vae"),
        "model_index.json: it names 'vae', but there is no folder vae/; accepted: ",
    ),
    "a tokenizer that does not fit": (
        large_vocabulary,
        "tokenizer: its vocabulary goes up to .*, but text_encoder has 32 embeddings; accepted: up to 31",
    ),
    "a network of another size": (
        lambda folder: write_json(folder / "unet/config.json", cross_attention_dim=12),
        r"unet/.*: tensor .* has shape \(8, 8\); accepted, by unet/config.json: \(8, 12\)",
    ),
    "an encoder of another size": (
        lambda folder: write_json(folder / "text_encoder/config.json", intermediate_size=20),
        r"text_encoder/.*: tensor .*fc1.bias' has shape \(16,\); accepted, by text_encoder/config.json: \(20,\)",
    ),
    "a network without a weight": (
        lambda folder: without(folder, UNET_WEIGHTS, "conv_in.bias"),
        "unet/diffusion_pytorch_model.safetensors: tensor 'conv_in.bias' is missing; accepted: ",
    ),
    "an encoder without a weight": (
        lambda folder: without(folder, "text_encoder/model.safetensors", "final_layer_norm.bias"),
        "text_encoder/model.safetensors: tensor 'final_layer_norm.bias' is missing; accepted: ",
    ),
    "a weight without a place": (
        lambda folder: (
            change_weight(folder / UNET_WEIGHTS, "conv_in.bias", lambda _: None)
            or save_file(
                load_file(folder / UNET_WEIGHTS) | {"conv_in.bias": torch.zeros(4), "more": torch.zeros(1)},
                folder / UNET_WEIGHTS,
            )
        ),
        "unet/.*: tensor 'more' has no place in the model of unet/config.json; accepted: ",
    ),
    "pickles only": (
        lambda folder: (folder / UNET_WEIGHTS).rename(folder / "unet/diffusion_pytorch_model.bin"),
        "unet/diffusion_pytorch_model.bin: it may be a pickle; accepted: weights as .safetensors only",
    ),
    "a missing shard": (
        missing_shard,
        "unet/.*index.json: its shard 'unet/diffusion_pytorch_model-00002-of-00002.safetensors' is missing; accepted: ",
    ),
    "quantised weights": (
        lambda folder: write_json(folder / "unet/config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "unet/config.json: quantization_config is .*; accepted: ",
    ),
    "a scheduler that cannot be built": (
        lambda folder: write_json(folder / "scheduler/scheduler_config.json", beta_schedule="mine"),
        "scheduler/scheduler_config.json: no DDIMScheduler can be built from it .*; accepted: ",
    ),
    "a pointer in place of a file": (
        lambda folder: (folder / "tokenizer/tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1"),
        "tokenizer/tokenizer.json: a Git LFS pointer",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_used_is_refused_by_name(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelFormatError, match=message):
        inspect_pipeline(folder)


def test_a_call_that_no_request_can_make_is_refused(tmp_path: Path) -> None:
    kind("kandinsky22").build().save_pretrained(tmp_path)
    with pytest.raises(ModelFormatError, match="a call of KandinskyV22Pipeline needs 'image_embeds', which no request"):
        inspect_pipeline(tmp_path)


def test_a_pipeline_of_sound_is_refused_by_its_output(tmp_path: Path) -> None:
    unet = diffusers.UNet1DModel(
        sample_size=512,
        sample_rate=16_000,
        extra_in_channels=16,
        time_embedding_dim=16,
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        time_embedding_type="fourier",
        mid_block_type="UNetMidBlock1D",
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    ).eval()
    pipeline = diffusers.DanceDiffusionPipeline(unet, diffusers.IPNDMScheduler())
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ModelFormatError, match="its output is 'audios'; accepted: images, or frames of a video"):
        try_pipeline(pipeline, inspect_pipeline(tmp_path), audio_length_in_s=0.04)


def test_pipelines_for_few_steps_say_why_they_cannot_be_tuned(tmp_path: Path) -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler(sigma_max=80.0)
    pipeline = diffusers.ConsistencyModelPipeline(unet=parts.unet(), scheduler=scheduler)
    pipeline.save_pretrained(tmp_path)
    spec = inspect_pipeline(tmp_path)
    assert "ConsistencyModelPipeline, trained for few steps; accepted: " in spec["tunable"]
    assert (spec["model_type"], spec["T"], spec["t_start"]) == ("x_start", 1.0, None)
    assert try_pipeline(pipeline, spec)["image_shape"] == [3, 8, 8]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(seconds=0.2), "took longer than 0.2 seconds to build; accepted: less"),
        (Limits(memory_bytes=2**29), "could not be built: .*; accepted: what takes up to .* 536870912 bytes of memory"),
        (Limits(cpu_seconds=1), "could not be built: the process ended with -9 .*; accepted: .* 1 seconds of CPU"),
    ],
    ids=["time", "memory", "processor"],
)
def test_a_child_that_takes_too_much_is_ended(saved: Path, limits: Limits, message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        inspect_in_child(saved, limits=limits)
