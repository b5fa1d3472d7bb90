"""Registering, listing and deleting models over HTTP."""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from service.http.errors import InvalidError
from service.models.archive import unpack
from service.models.logic import folder_hash
from tests.service.networks import small_unet
from tests.service.problems import assert_problem
from tests.stack import QUICK, Stack, wait_until

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small diffusers-format folder: unconditional, RGB, 20 training steps."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    small_unet().save_pretrained(folder / "unet")
    DDPMScheduler(num_train_timesteps=20, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    return folder


def zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return buffer.getvalue()


def tarred(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, arcname="my-model")
    return buffer.getvalue()


def upload(client: httpx.Client, content: bytes, name: str = "archive") -> httpx.Response:
    return client.post("/v1/models", files={name: ("my-model.zip", content)})


def kept(stack: Stack) -> tuple[set[str], list[str]]:
    """All that registering may leave behind: files, and models."""
    items = stack.client.get("/v1/models", params={"limit": 200}).json()["items"]
    return stack.files(), [item["id"] for item in items]


def assert_nothing_was_left(stack: Stack, before: tuple[set[str], list[str]]) -> None:
    """A worker removes refused files just after the answer, so `before` may hold some of an earlier test's."""
    files, model_ids = before

    def nothing_was_left() -> bool:
        files_now, model_ids_now = kept(stack)
        return files_now <= files and model_ids_now == model_ids

    wait_until(nothing_was_left, "state without leftovers", seconds=10)


@pytest.mark.parametrize(
    ("builtin", "expected"),
    [
        (
            "digits8",
            {
                "sample_shape": [1, 8, 8],
                "num_train_timesteps": 1000,
                "num_classes": 10,
                "null_class_label": 10,
                "guidance_types": ["uncond", "classifier-free"],
                "has_data": True,
            },
        ),
        (
            "mixture-ring",
            {
                "sample_shape": [2],
                "num_train_timesteps": None,
                "num_classes": 4,
                "guidance_types": ["uncond", "classifier", "classifier-free"],
            },
        ),
    ],
)
def test_a_builtin_is_registered_once_and_described(
    client: httpx.Client, builtin: str, expected: dict[str, Any]
) -> None:
    first = client.post("/v1/models", json={"builtin": builtin})
    second = client.post("/v1/models", json={"builtin": builtin})
    assert second.status_code == 200
    assert second.json()["id"] == first.json()["id"]
    assert first.headers["location"] == f"/v1/models/{first.json()['id']}"
    spec = client.get(first.headers["location"]).json()["spec"]
    assert {name: spec[name] for name in expected} == expected


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_an_uploaded_diffusers_folder_is_sampled_like_diffusers_own(
    stack: Stack, model_folder: Path, pack: Callable[[Path], bytes]
) -> None:
    response = upload(stack.client, pack(model_folder))
    assert response.status_code in (200, 201), response.text  # 200: the other archive was first
    model = response.json()
    assert model["spec"]["model_type"] == "v"
    assert model["spec"]["guidance_types"] == ["uncond"]
    assert model["spec"]["num_train_timesteps"] == 20
    body = {"model": model["id"], "num_steps": 20, "num_images": 2, "seed": 5}  # The model was trained on as many.
    answer = stack.client.post("/v1/samples", json=body, headers={"Accept": "application/x-npy"})
    assert np.load(io.BytesIO(answer.content)).shape == (2, 3, 8, 8)


def test_the_same_content_is_kept_once_and_deleted_with_its_model(stack: Stack, model_folder: Path) -> None:
    model_id = upload(stack.client, zipped(model_folder)).json()["id"]
    before = kept(stack)
    again = upload(stack.client, tarred(model_folder))
    assert (again.status_code, again.json()["id"]) == (200, model_id)
    assert_nothing_was_left(stack, before)

    changed = model_folder.parent / "changed"
    shutil.copytree(model_folder, changed)
    config = json.loads((changed / "scheduler/scheduler_config.json").read_text())
    (changed / "scheduler/scheduler_config.json").write_text(json.dumps({**config, "num_train_timesteps": 30}))
    other_id = upload(stack.client, zipped(changed)).json()["id"]
    assert other_id != model_id
    assert stack.client.delete(f"/v1/models/{other_id}").status_code == 204
    assert_problem(stack.client.get(f"/v1/models/{other_id}"), 404)
    assert_nothing_was_left(stack, before)
    shutil.rmtree(changed)


def test_a_model_in_use_is_not_deleted(stack: Stack) -> None:
    model = stack.register("mixture-ring")
    job = stack.submit(model, num_steps=3, **QUICK)
    assert_problem(stack.client.delete(f"/v1/models/{model}"), 409, accepted="a model whose jobs are over")
    assert stack.client.get(f"/v1/models/{model}").status_code == 200
    stack.finished(job)


@pytest.mark.both_engines
def test_models_are_listed_in_pages_without_gaps(stack: Stack) -> None:
    ids = {stack.register(builtin) for builtin in ("digits8", "mixture-ring", "mixture-gratings")}
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = stack.client.get("/v1/models", params={"limit": 1, **cursor}).json()
        seen += [item["id"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert seen == sorted(set(seen), reverse=True)
    assert ids <= set(seen)


def edit_json(name: str, **changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return edit


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit_file(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit_file


def poison(value: float) -> Callable[[Path], object]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["conv_in.weight"][0, 0, 0, 0] = value

    return edit_weights(edit)


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def pickle_under_a_false_name(folder: Path) -> None:
    torch.save({"conv_in.weight": torch.zeros(1)}, folder / WEIGHTS)


def pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"conv_in.weight": torch.zeros(1)}, folder / "unet/diffusion_pytorch_model.bin")


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "weights of another size": (edit_json("unet/config.json", block_out_channels=[8, 16]), WEIGHTS, "shape"),
    "a missing tensor": (edit_weights(lambda tensors: tensors.pop("conv_in.bias")), WEIGHTS, "conv_in.bias"),
    "NaN": (poison(float("nan")), WEIGHTS, "accepted: finite"),
    "infinity": (poison(float("inf")), WEIGHTS, "accepted: finite"),
    "truncated safetensors": (truncate, WEIGHTS, "not a whole safetensors file"),
    "a pickle called safetensors": (pickle_under_a_false_name, WEIGHTS, "not a whole safetensors file"),
    "a pickle": (pickle, "archive", ".safetensors only"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS, "missing"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler_config.json", "missing"),
    "no unet": (lambda folder: shutil.rmtree(folder / "unet"), "archive", "unet/config.json"),
    "another class": (edit_json("unet/config.json", _class_name="os.system"), "unet/config.json", "UNet2DModel"),
    "a huge layer": (edit_json("unet/config.json", block_out_channels=[10**8, 8]), "unet/", ""),
    "broken JSON": (lambda folder: (folder / "unet/config.json").write_text("{"), "unet/config.json", "JSON"),
    "an unknown prediction": (
        edit_json("scheduler/scheduler_config.json", prediction_type="magic"),
        "scheduler_config.json",
        "epsilon",
    ),
    "no training steps": (
        edit_json("scheduler/scheduler_config.json", num_train_timesteps=0),
        "scheduler_config.json",
        "1 to 100000",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_and_leaves_nothing(
    stack: Stack, model_folder: Path, tmp_path: Path, name: str
) -> None:
    spoil, field, accepted = BAD_FOLDERS[name]
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    spoil(folder)
    before = kept(stack)
    assert_problem(upload(stack.client, zipped(folder)), 422, field, accepted)
    assert_nothing_was_left(stack, before)


def add_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def unpacked(folder: Path, destination: Path, archive: Callable[[Path], bytes]) -> tuple[list[str], set[str]]:
    """The files that `unpack` says it ignored, and the files that it wrote."""
    _, ignored = unpack(io.BytesIO(archive(folder)), destination, max_bytes=10**8)
    return ignored, {path.relative_to(destination).as_posix() for path in destination.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("archive", "prefix"), [(zipped, ""), (tarred, "my-model/")])
def test_files_that_nothing_reads_are_ignored_and_named(
    archive: Callable[[Path], bytes], prefix: str, model_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    add_files(folder, "safety_checker/pytorch_model.bin", "text_encoder/model.pt", "README.md", "model_index.json")
    ignored, written = unpacked(folder, tmp_path / "out", archive)
    names = ("README.md", "safety_checker/pytorch_model.bin", "text_encoder/model.pt")
    assert ignored == [f"{prefix}{name}" for name in names]
    assert written == {"unet/config.json", WEIGHTS, "scheduler/scheduler_config.json", "model_index.json"}


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "vae/x.pt", "scheduler/x.pkl", "model.ckpt"])
def test_pickles_where_a_model_is_read_are_refused_even_beside_safetensors(
    name: str, model_folder: Path, tmp_path: Path
) -> None:
    folder = add_files(Path(shutil.copytree(model_folder, tmp_path / "model")), name)
    with pytest.raises(InvalidError, match="safetensors only"):
        unpacked(folder, tmp_path / "out", zipped)
    assert not (tmp_path / "out").exists()


def test_of_variants_and_shards_only_those_that_are_read_are_unpacked(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    add_files(folder, "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.msgpack")
    _, written = unpacked(folder, tmp_path / "plain", zipped)
    assert {name for name in written if name.startswith("unet/")} == {"unet/config.json", WEIGHTS}
    (folder / WEIGHTS).unlink()
    shards = [f"unet/diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    add_files(folder, index, *shards)
    _, written = unpacked(folder, tmp_path / "sharded", zipped)
    assert {name for name in written if name.startswith("unet/")} == {"unet/config.json", index, *shards}
    assert folder_hash(tmp_path / "sharded") != folder_hash(tmp_path / "plain")
    hash_of_all = folder_hash(tmp_path / "sharded")
    (tmp_path / "sharded" / shards[1]).write_bytes(b"y")
    assert folder_hash(tmp_path / "sharded") != hash_of_all


def archive_with(add: Callable[[zipfile.ZipFile], object]) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        buffer = io.BytesIO(zipped(folder))
        with zipfile.ZipFile(buffer, "a") as archive:
            add(archive)
        return buffer.getvalue()

    return make


def zip_with_link(folder: Path) -> bytes:
    def add(archive: zipfile.ZipFile) -> None:
        info = zipfile.ZipInfo("unet/link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")

    return archive_with(add)(folder)


def tar_with_link(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("timetuner.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
        archive.add(folder, arcname=".")
    return buffer.getvalue()


def repeated(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, arcname=".")
        archive.add(folder / WEIGHTS, arcname=WEIGHTS)
    return buffer.getvalue()


BAD_ARCHIVES: dict[str, tuple[Callable[[Path], bytes], int, str]] = {
    "not an archive": (lambda _: b"hello", 422, "accepted: a whole zip, tar or tar.gz"),
    "an empty file": (lambda _: b"", 422, "accepted: a whole zip, tar or tar.gz"),
    "a truncated zip": (lambda folder: zipped(folder)[:-100], 422, "accepted: a whole zip"),
    "a truncated tar": (lambda folder: tarred(folder)[:-100], 422, "accepted: a whole zip"),
    "a name that leads out": (archive_with(lambda a: a.writestr("../../evil", "x")), 422, "without '..'"),
    "an absolute name": (archive_with(lambda a: a.writestr("/tmp/evil", "x")), 422, "relative names"),
    "a link in a zip": (zip_with_link, 422, "plain files"),
    "a link in a tar": (tar_with_link, 422, "plain files"),
    "a file twice": (repeated, 422, "twice"),
    "too many files": (
        archive_with(lambda a: [a.writestr(f"x/{k}", "") for k in range(1001)]),
        413,
        "up to 1000",
    ),
    "a bomb": (
        archive_with(
            lambda a: a.writestr(zipfile.ZipInfo("data.safetensors"), bytes(11_000_000), zipfile.ZIP_DEFLATED)
        ),
        413,
        "accepted: up to 10000000",
    ),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_an_unsafe_archive_is_refused_and_leaves_nothing(stack: Stack, model_folder: Path, name: str) -> None:
    make, status, accepted = BAD_ARCHIVES[name]
    before = kept(stack)
    assert_problem(upload(stack.client, make(model_folder)), status, "archive", accepted)
    assert_nothing_was_left(stack, before)


@pytest.mark.parametrize(
    ("request_", "status", "field"),
    [
        ({"json": {"builtin": "nonsense"}}, 422, "builtin"),
        ({"json": {}}, 422, "builtin"),
        ({"json": {"builtin": "digits8", "nmae": "x"}}, 422, "nmae"),
        ({"json": ["digits8"]}, 422, "body"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 422, "body"),
        ({"files": {"wrong": ("a.zip", b"x")}}, 422, "archive"),
        ({"files": {"archive": ("a.zip", b"x")}, "data": {"nmae": "x"}}, 422, "nmae"),
        ({"data": {"builtin": "digits8"}}, 415, "Content-Type"),
        ({"content": b"x" * 6_000_000, "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 413, None),
        ({"content": b"nonsense", "headers": {"Content-Type": "multipart/form-data"}}, 400, None),
    ],
)
def test_a_malformed_registration_is_refused_and_leaves_nothing(
    stack: Stack, request_: dict[str, Any], status: int, field: str | None
) -> None:
    before = kept(stack)
    assert_problem(stack.client.post("/v1/models", **request_), status, field)
    assert_nothing_was_left(stack, before)


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 1000}, {"cursor": "no such; thing"}])
def test_a_bad_page_is_refused(client: httpx.Client, query: dict[str, Any]) -> None:
    assert_problem(client.get("/v1/models", params=query), 422, next(iter(query)))
