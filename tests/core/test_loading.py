"""Model folders: what loads, and what is refused, naming the file and what is accepted."""

import json
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

from tests.core.conftest import normals, save_model, tiny_unet
from timetuner_core.models.folder_files import files_of, model_files
from timetuner_core.models.loading import BUILTINS, ModelFormatError, load_builtin, load_folder

CONFIG, WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
SCHEDULER, METADATA, DATA = "scheduler/scheduler_config.json", "timetuner.json", "data.safetensors"
IMAGES = torch.arange(4 * 16, dtype=torch.uint8).reshape(4, 1, 4, 4)
LABELS = torch.tensor([0, 1, 1, 0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small, valid, class-conditional model with data: two classes and the null class."""
    folder = tmp_path_factory.mktemp("saved")
    unet = tiny_unet(num_class_embeds=3)
    save_model(folder, unet, {"null_class_label": 2}, num_train_timesteps=50, prediction_type="v_prediction")
    save_file({"images": IMAGES, "labels": LABELS}, folder / DATA)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy for a test to spoil."""
    return shutil.copytree(saved, tmp_path, dirs_exist_ok=True)


# Folders that load


def test_the_bundled_model_is_a_class_conditional_eps_model_of_the_digits() -> None:
    model = load_builtin("digits8")
    assert (model.sample_shape, model.num_classes, model.null_class_label) == ((1, 8, 8), 10, 10)
    assert (model.model_type, model.noise_schedule.max_num_steps) == ("noise", 1000)
    assert set(model.guidance_types) == {"uncond", "classifier-free"}
    assert model.reference is not None
    digits = load_digits().images / 8 - 1
    np.testing.assert_allclose(model.reference[:, 0], digits, atol=1 / 254)
    t = torch.tensor([1 / 1000, 1.0], dtype=torch.float64)
    scheduler: Any = DDPMScheduler()
    expected = scheduler.alphas_cumprod[[0, -1]].sqrt().double()
    torch.testing.assert_close(model.noise_schedule.marginal_alpha(t), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", BUILTINS)
def test_every_builtin_predicts_from_noise_and_class(name: str) -> None:
    model = load_builtin(name)
    x, labels = normals(2, *model.sample_shape).float(), torch.tensor([0, 1])
    output = model.network(x, torch.tensor([0.5, 0.5]), labels)
    assert output.shape == x.shape
    assert bool(output.isfinite().all())
    assert not torch.equal(output, model.network(x, torch.tensor([0.5, 0.5])))


def test_a_folder_gives_the_network_that_was_saved(folder: Path) -> None:
    model, unet = load_folder(folder), tiny_unet(num_class_embeds=3)
    assert (model.model_type, model.sample_shape, model.num_classes, model.null_class_label) == ("v", (1, 4, 4), 2, 2)
    assert model.num_parameters == sum(parameter.numel() for parameter in unet.parameters())
    assert model.num_bytes == 4 * model.num_parameters
    assert model.noise_schedule.max_num_steps == 50
    x, t_input = normals(4, 1, 4, 4).float(), torch.arange(4.0)
    expected = unet(x, t_input, class_labels=LABELS).sample
    torch.testing.assert_close(model.network(x, t_input, LABELS), expected, atol=1e-6, rtol=0)


def test_the_bytes_of_a_model_are_those_of_all_its_weights() -> None:
    single, half = (load_builtin("digits32-ldm", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert single.num_bytes - half.num_bytes == 2 * single.num_parameters  # the autoencoder stays in float32
    assert single.num_bytes > 4 * single.num_parameters
    assert load_builtin("mixture-ring").num_bytes == 0


def test_no_label_means_the_null_class(folder: Path) -> None:
    model, x = load_folder(folder), normals(4, 1, 4, 4).float()
    unlabelled = model.network(x, torch.arange(4.0))
    assert torch.equal(unlabelled, model.network(x, torch.arange(4.0), torch.full((4,), 2)))


def test_the_network_is_frozen(folder: Path) -> None:
    x = normals(1, 1, 4, 4).float()
    assert not load_folder(folder).network(x, torch.zeros(1)).requires_grad


def test_bytes_become_the_networks_range_and_keep_their_labels(folder: Path) -> None:
    model = load_folder(folder)
    assert model.reference is not None
    assert model.draw_data is not None
    assert torch.equal(model.reference, IMAGES / 127.5 - 1)
    images, labels = model.draw_data(64, torch.Generator().manual_seed(0))
    assert labels is not None
    index = (images[:, None] == model.reference).all(dim=(2, 3, 4)).int().argmax(dim=1)
    assert index.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(images, model.reference[index])
    assert torch.equal(labels, LABELS[index])


def test_floats_are_taken_as_they_are(folder: Path) -> None:
    images = normals(4, 1, 4, 4).float().clamp(-1, 1)
    save_file({"images": images, "labels": LABELS}, folder / DATA)
    reference = load_folder(folder).reference
    assert reference is not None
    assert torch.equal(reference, images)


def test_half_precision_weights_are_widened(folder: Path) -> None:
    weights = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    assert load_folder(folder).network(normals(1, 1, 4, 4).float(), torch.zeros(1)).dtype == torch.float32


@pytest.mark.parametrize("classes", [None, 3])
def test_data_and_metadata_are_optional(tmp_path: Path, classes: int | None) -> None:
    model = load_folder(save_model(tmp_path, tiny_unet(num_class_embeds=classes)))
    assert (model.num_classes, model.null_class_label) == (classes or 0, None)
    assert (model.draw_data, model.reference) == (None, None)
    assert set(model.guidance_types) == ({"uncond"} if classes is None else {"classifier-free"})


WAYS_TO_SAVE: dict[str, dict[str, Any]] = {
    "a variant": {"variant": "fp16"},
    "shards": {"max_shard_size": "5KB"},
    "shards of a variant": {"variant": "fp16", "max_shard_size": "5KB"},
}


@pytest.mark.parametrize("options", WAYS_TO_SAVE.values(), ids=WAYS_TO_SAVE)
def test_weights_are_read_however_diffusers_names_their_files(folder: Path, options: dict[str, Any]) -> None:
    unet = tiny_unet(num_class_embeds=3)
    (folder / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", **options)
    saved = {path.name for path in (folder / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors" not in saved
    assert (len(saved) > 4) == ("max_shard_size" in options)
    x, t_input = normals(4, 1, 4, 4).float(), torch.arange(4.0)
    expected = unet(x, t_input, class_labels=LABELS).sample
    torch.testing.assert_close(load_folder(folder).network(x, t_input, LABELS), expected, atol=1e-6, rtol=0)
    assert {name for name in model_files(files_of(folder)) if name.startswith("unet/")} == {f"unet/{x}" for x in saved}


def test_the_plain_weights_come_before_a_variant(folder: Path) -> None:
    other = tiny_unet(num_class_embeds=3)
    other.conv_in.weight.zero_()
    other.save_pretrained(folder / "unet", variant="ema")
    x, t_input = normals(4, 1, 4, 4).float(), torch.arange(4.0)
    expected = tiny_unet(num_class_embeds=3)(x, t_input, class_labels=LABELS).sample
    torch.testing.assert_close(load_folder(folder).network(x, t_input, LABELS), expected, atol=1e-6, rtol=0)


# Folders that are refused


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(content | changes))

    return edit


def edit_tensors(name: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return edit


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def keep_a_pickle_only(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "unet" / "diffusion_pytorch_model.bin")


def poison(value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors["conv_in.weight"].view(-1)[3:4].fill_(value) and None


def save_in_shards(folder: Path) -> list[Path]:
    (folder / WEIGHTS).unlink()
    tiny_unet(num_class_embeds=3).save_pretrained(folder / "unet", max_shard_size="5KB")
    return sorted((folder / "unet").glob("*-of-*.safetensors"))


def lose_a_shard(folder: Path) -> None:
    save_in_shards(folder)[0].unlink()


def name_a_shard_elsewhere(folder: Path) -> None:
    save_in_shards(folder)
    edit_json(INDEX, weight_map={"conv_in.weight": "../../evil.safetensors"})(folder)


def put_a_tensor_in_two_shards(folder: Path) -> None:
    first, second, *_ = save_in_shards(folder)
    save_file({**load_file(second), **load_file(first)}, second)


def two_variants_only(folder: Path) -> None:
    for variant in ("fp16", "ema"):
        tiny_unet(num_class_embeds=3).save_pretrained(folder / "unet", variant=variant)
    (folder / WEIGHTS).unlink()


INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NOT_WHOLE = "not a whole safetensors file"

MALFORMED: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a shard too few": (lose_a_shard, INDEX, "is missing; accepted: a folder with all of them"),
    "a shard elsewhere": (name_a_shard_elsewhere, INDEX, "evil.safetensors' is missing"),
    "a tensor in two shards": (
        put_a_tensor_in_two_shards,
        "unet/diffusion_pytorch_model-00002-of-00011.safetensors",
        "is in another shard too",
    ),
    "two variants": (two_variants_only, WEIGHTS, "the weights are there as ema, fp16; accepted: one variant"),
    "weights left in Git LFS": (write(WEIGHTS, POINTER), WEIGHTS, "a Git LFS pointer"),
    "data left in Git LFS": (write(DATA, POINTER), DATA, "a Git LFS pointer"),
    "a config left in Git LFS": (write(CONFIG, POINTER), CONFIG, "a Git LFS pointer"),
    "a scheduler left in Git LFS": (write(SCHEDULER, POINTER), SCHEDULER, "a Git LFS pointer"),
    "no config": (remove(CONFIG), CONFIG, "the file is missing"),
    "no weights": (remove(WEIGHTS), WEIGHTS, "accepted as safetensors only"),
    "no scheduler": (remove(SCHEDULER), SCHEDULER, "the file is missing"),
    "a .bin only": (keep_a_pickle_only, WEIGHTS, "accepted as safetensors only"),
    "a pickle by another name": (write(WEIGHTS, pickle.dumps({"conv_in.weight": [1.0]})), WEIGHTS, NOT_WHOLE),
    "empty weights": (write(WEIGHTS, b""), WEIGHTS, NOT_WHOLE),
    "half a header": (truncate(WEIGHTS, 100), WEIGHTS, NOT_WHOLE),
    "half the weights": (truncate(WEIGHTS, 20_000), WEIGHTS, NOT_WHOLE),
    "weights of another size": (edit_json(CONFIG, block_out_channels=[16]), WEIGHTS, "should have shape (16, 1, 3, 3)"),
    "a tensor missing": (
        edit_tensors(WEIGHTS, lambda tensors: tensors.pop("conv_in.bias")),
        WEIGHTS,
        "tensor 'conv_in.bias' should have shape (8,) by unet/config.json, the file has none",
    ),
    "a tensor too many": (
        edit_tensors(WEIGHTS, lambda tensors: tensors.update(extra=torch.zeros(1))),
        WEIGHTS,
        "tensor 'extra' has no place in the model of unet/config.json",
    ),
    "NaN weights": (edit_tensors(WEIGHTS, poison(torch.nan)), WEIGHTS, "'conv_in.weight' has NaN or infinite values"),
    "infinite weights": (edit_tensors(WEIGHTS, poison(torch.inf)), WEIGHTS, "accepted: finite ones"),
    "config is no JSON": (write(CONFIG, b"{"), CONFIG, "not valid JSON"),
    "config is no text": (write(CONFIG, b"\xff\xfe\x00"), CONFIG, "not valid JSON"),
    "config is deep": (write(CONFIG, b"[" * 100_000), CONFIG, "not valid JSON"),
    "config is a list": (write(CONFIG, b"[]"), CONFIG, "accepted: a JSON object"),
    "another class": (edit_json(CONFIG, _class_name="FluxTransformer2DModel"), CONFIG, "'UNet2DModel'"),
    "no class": (edit_json(CONFIG, _class_name=None), CONFIG, "_class_name is None; accepted: 'UNet2DModel'"),
    "unknown blocks": (edit_json(CONFIG, down_block_types=["EvilBlock"]), CONFIG, "no UNet2DModel can be built"),
    "words for numbers": (edit_json(CONFIG, in_channels="one"), CONFIG, "no UNet2DModel can be built"),
    "no size": (edit_json(CONFIG, sample_size=None), CONFIG, "accepted: the images' size in pixels"),
    "scheduler is no JSON": (write(SCHEDULER, b"betas"), SCHEDULER, "not valid JSON"),
    "another scheduler": (edit_json(SCHEDULER, _class_name="EvilScheduler"), SCHEDULER, "accepted: DDIM"),
    "another prediction": (
        edit_json(SCHEDULER, prediction_type="noise"),
        SCHEDULER,
        "prediction_type is 'noise'; accepted: epsilon, sample, v_prediction",
    ),
    "no training steps": (edit_json(SCHEDULER, num_train_timesteps=0), SCHEDULER, "accepted: 1 to 100000"),
    "endless training steps": (edit_json(SCHEDULER, num_train_timesteps=10**12), SCHEDULER, "accepted: 1 to 100000"),
    "unknown betas": (edit_json(SCHEDULER, beta_schedule="evil"), SCHEDULER, "no noise schedule can be built"),
    "negative betas": (edit_json(SCHEDULER, beta_start=-1.0), SCHEDULER, "no noise schedule can be built"),
    "metadata is no JSON": (write(METADATA, b"?"), METADATA, "not valid JSON"),
    "null class in the middle": (edit_json(METADATA, null_class_label=1), METADATA, "accepted: null or 2"),
    "null class beyond": (edit_json(METADATA, null_class_label=3), METADATA, "null_class_label is 3"),
    "null class a word": (edit_json(METADATA, null_class_label="2"), METADATA, "null_class_label is '2'"),
    "null class a truth": (edit_json(METADATA, null_class_label=True), METADATA, "null_class_label is True"),
    "half the data": (truncate(DATA, 150), DATA, NOT_WHOLE),
    "no images": (edit_tensors(DATA, lambda tensors: tensors.pop("images")), DATA, "accepted: shape (P, 1, 4, 4)"),
    "images of another size": (
        edit_tensors(DATA, lambda tensors: tensors.update(images=torch.zeros(4, 1, 8, 8))),
        DATA,
        "shape (4, 1, 8, 8); accepted: shape (P, 1, 4, 4)",
    ),
    "one image": (
        edit_tensors(DATA, lambda tensors: tensors.update(images=IMAGES[:1].clone(), labels=LABELS[:1].clone())),
        DATA,
        "P of 2 or more",
    ),
    "images of another type": (
        edit_tensors(DATA, lambda tensors: tensors.update(images=IMAGES.int())),
        DATA,
        "accepted: uint8, or finite float32",
    ),
    "NaN images": (
        edit_tensors(DATA, lambda tensors: tensors.update(images=IMAGES * torch.nan)),
        DATA,
        "accepted: uint8, or finite float32",
    ),
    "images of 0 to 255 as floats": (
        edit_tensors(DATA, lambda tensors: tensors.update(images=IMAGES.float())),
        DATA,
        "values from 0 to 63; accepted: float32 in -1..1, or uint8",
    ),
    "an image below the range": (
        edit_tensors(DATA, lambda tensors: tensors.update(images=IMAGES / 255 - 1.01)),
        DATA,
        "values from -1.01 to",
    ),
    "no labels": (
        edit_tensors(DATA, lambda tensors: tensors.pop("labels")),
        DATA,
        "tensor 'labels': accepted: int64 of shape (4,)",
    ),
    "too few labels": (
        edit_tensors(DATA, lambda tensors: tensors.update(labels=LABELS[:3].clone())),
        DATA,
        "accepted: int64 of shape (4,)",
    ),
    "labels of another type": (
        edit_tensors(DATA, lambda tensors: tensors.update(labels=LABELS.float())),
        DATA,
        "accepted: int64 of shape (4,)",
    ),
    "labels out of range": (
        edit_tensors(DATA, lambda tensors: tensors.update(labels=LABELS + 1)),
        DATA,
        "accepted: values in 0..1",
    ),
}


@pytest.mark.parametrize(("spoil", "field", "accepted"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_folder_is_refused_naming_the_file_and_what_is_accepted(
    folder: Path, spoil: Callable[[Path], Any], field: str, accepted: str
) -> None:
    spoil(folder)
    with pytest.raises(ModelFormatError) as refusal:
        load_folder(folder)
    assert refusal.value.field == field
    assert accepted in refusal.value.message


def test_a_null_class_needs_classes(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_unet(), {"null_class_label": 0})
    with pytest.raises(ModelFormatError, match="null_class_label is 0; accepted: null"):
        load_folder(tmp_path)


def test_an_unknown_builtin_is_refused_naming_those_there_are() -> None:
    with pytest.raises(ModelFormatError, match=f"accepted: {', '.join(BUILTINS)}"):
        load_builtin("digits9")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "hostile",
    [
        {"block_out_channels": [2**18]},
        {"num_class_embeds": 10**12},
        {"in_channels": 10**9, "out_channels": 10**9},
        {"layers_per_block": 10**9},
        {"sample_size": 10**9},
    ],
    ids="-".join,
)
def test_a_hostile_configuration_allocates_nothing(folder: Path, hostile: dict[str, Any]) -> None:
    edit_json(CONFIG, **hostile)(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelFormatError):
        load_folder(folder)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 64 * 1024
