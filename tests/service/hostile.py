"""Requests that mean harm, made by code: each with the answers that are right."""

import base64
import gzip
import io
import json
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler

from tests.service.networks import small_unet
from timetuner_core.models.loading import BUILTIN_FOLDERS

CONFIG, WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
SCHEDULER, METADATA, DATA = "scheduler/scheduler_config.json", "timetuner.json", "data.safetensors"
TRANSFORMER, TRANSFORMER_WEIGHTS = "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"
VAE, VAE_WEIGHTS = "vae/config.json", "vae/diffusion_pytorch_model.safetensors"
BOUNDARY = "boundary"
MODEL = "MODEL-ID"  # The id of a registered model takes its place.
MIB = 2**20

Files = dict[str, bytes]


@dataclass(frozen=True)
class Hostile:
    """A request, and the statuses that refuse it. `content` may be large: it is made when it is sent."""

    statuses: tuple[int, ...]
    method: str = "POST"
    path: str = "/v1/models"
    headers: dict[str, str] = field(default_factory=dict)
    content: Callable[[], bytes] = bytes


@lru_cache
def model_files() -> Files:
    """A small model, of which nothing is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        small_unet().save_pretrained(Path(folder) / "unet")
        DDPMScheduler(num_train_timesteps=20).save_pretrained(Path(folder) / "scheduler")  # type: ignore[no-untyped-call]
        return {name: (Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS, SCHEDULER)}


def folder_files(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Uploads


def upload(make: Callable[[], bytes], *statuses: int) -> Hostile:
    def content() -> bytes:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="archive"; filename="m.zip"\r\n\r\n'
        return head.encode() + make() + f"\r\n--{BOUNDARY}--\r\n".encode()

    return form(content, *(statuses or (422,)))


def form(content: Callable[[], bytes], *statuses: int) -> Hostile:
    return Hostile(statuses, headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}, content=content)


def zipped(files: Files, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def zip_with(name: str, content: bytes = b"x", **attributes: Any) -> bytes:
    """The model, and one more entry."""
    buffer = io.BytesIO(zipped(model_files()))
    info = zipfile.ZipInfo("placeholder")
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    with zipfile.ZipFile(buffer, "a") as archive:
        info.filename = name
        archive.writestr(info, content, attributes.get("compress_type"))
    return buffer.getvalue()


def flagged(flag: int) -> bytes:
    """The model as a zip whose directory sets a flag for its first entry."""
    content = bytearray(zipped(model_files()))
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= flag
    return bytes(content)


def lying(offset: int, value: int) -> bytes:
    """The model as a zip whose directory says something else of its first entry: 16 CRC, 20 packed, 24 unpacked."""
    content = bytearray(zipped(model_files()))
    at = content.index(b"PK\x01\x02")
    content[at + offset : at + offset + 4] = struct.pack("<I", value)
    return bytes(content)


def overlapping() -> bytes:
    """Two files of the model at one place."""
    content = zipped({**model_files(), METADATA: model_files()[CONFIG]})
    at = content.rindex(b"PK\x01\x02")
    return content[: at + 42] + struct.pack("<I", 0) + content[at + 46 :]


def huge_directory() -> bytes:
    """A zip of nothing but 40,000 names."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    directory = entry * 40_000
    return directory + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 40_000, 40_000, len(directory), 0, 0)


def tarred(members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w", format: int = tarfile.GNU_FORMAT) -> bytes:
    """The model, after these."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as archive:  # type: ignore[call-overload]
        for info, content in members:
            info.size = info.size or len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, content in model_files().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar_with(name: str, content: bytes = b"x", **attributes: Any) -> bytes:
    info = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return tarred([(info, content)])


def tar_header(name: bytes, size: bytes, kind: bytes) -> bytes:
    """One block, as hostile as you like, with the right checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124:136], block[156:157] = b"0000644\0", size, kind
    block[257:265] = b"ustar  \0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return tar_header(b"pax", octal(len(records)), kind) + records + bytes(-len(records) % 512)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


ZIPS: dict[str, Callable[[], bytes]] = {
    "no archive": lambda: b"hello",
    "an empty file": bytes,
    "zeros": lambda: bytes(100_000),
    "a truncated zip": lambda: zipped(model_files())[:-50],
    "half a zip": lambda: zipped(model_files())[:2000],
    "a zip of nothing": lambda: zipped({}),
    "a zip in a zip": lambda: zipped({"model.zip": zipped(model_files())}),
    "two models": lambda: zipped(model_files() | {f"other/{name}": text for name, text in model_files().items()}),
    "a model too deep": lambda: zipped({f"a/b/{name}": text for name, text in model_files().items()}),
    "an encrypted entry": partial(flagged, 1),
    "a strongly encrypted entry": partial(flagged, 0x41),
    "a zip entry twice": lambda: zip_with(CONFIG),
    "a zip entry twice but for case": lambda: zip_with("UNet/Config.JSON"),
    "a zip entry twice but for a dot": lambda: zip_with("./unet/config.json"),
    "a zip entry twice but for composition": lambda: zipped({**model_files(), "\u00e9": b"", "e\u0301": b""}),
    "a link in a zip": lambda: zip_with("unet/link", b"/etc/passwd", external_attr=0o120777 << 16),
    "a device in a zip": lambda: zip_with("unet/device", external_attr=0o020666 << 16),
    "a fifo in a zip": lambda: zip_with("unet/fifo", external_attr=0o010666 << 16),
    "bzip2 in a zip": lambda: zip_with("notes", compress_type=zipfile.ZIP_BZIP2),
    "LZMA in a zip": lambda: zip_with("notes", compress_type=zipfile.ZIP_LZMA),
    "a checksum that lies": partial(lying, 16, 1),
    "a packed size that lies": partial(lying, 20, 3),
    "a size that is too small": partial(lying, 24, 3),
    "a size that is too large": partial(lying, 24, 9_000),
    "a size beyond the limit": partial(lying, 24, 2**32 - 2),
    "entries that overlap": overlapping,
    "a huge directory": huge_directory,
    "too many entries": lambda: zipped({**model_files(), **{f"x/{k}": b"" for k in range(1001)}}),
    "a bomb": lambda: zipped({**model_files(), DATA: bytes(50 * MIB)}, zipfile.ZIP_DEFLATED),
    **{
        f"a zip with {suffix}": partial(zip_with, f"unet/model{suffix}")
        for suffix in (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".PTH")
    },
}
NAMES = {
    "parents": "../../evil",
    "hidden parents": "unet/../../evil",
    "root": "/tmp/evil",
    "a backslash": "..\\evil",
    "a drive": "C:evil",
    "a newline": "unet/a\nb",
    "an escape": "unet/\x1b[2J",
    "a reversal": "unet/\u202egnp.exe",
    "a name without end": "x" * 5000,
}
TARS: dict[str, Callable[[], bytes]] = {
    "a symbolic link": lambda: tar_with(METADATA, b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": lambda: tar_with(METADATA, b"", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a character device": lambda: tar_with("tty", b"", type=tarfile.CHRTYPE),
    "a block device": lambda: tar_with("disk", b"", type=tarfile.BLKTYPE),
    "a fifo": lambda: tar_with("pipe", b"", type=tarfile.FIFOTYPE),
    "a sparse file": lambda: tar_header(b"data.safetensors", octal(512), b"S") + tarred([]),
    "a file twice": lambda: tar_with(CONFIG),
    "a file twice but for case": lambda: tar_with(CONFIG.upper()),
    "a truncated tar": lambda: tarred([])[:3000],
    "a truncated tar.gz": lambda: tarred([], "w:gz")[:-300],
    "a tar.gz whose checksum lies": lambda: tarred([], "w:gz")[:-8] + bytes(8),
    "a tar.gz in a gz": lambda: gzip.compress(tarred([], "w:gz")),
    "a tar.bz2": lambda: tarred([], "w:bz2"),
    "a tar.xz": lambda: tarred([], "w:xz"),
    "a gz of zeros": lambda: gzip.compress(bytes(64 * MIB)),
    "a bomb of gz": lambda: gzip.compress(tar_with("x", bytes(100 * MIB))),
    "a size below zero": lambda: tar_header(b"x", b"\xff" * 12, b"0") + tarred([]),
    "a size beyond all": lambda: tar_header(b"x", b"\x80" + b"\x7f" * 11, b"0") + tarred([]),
    "a size in words": lambda: tar_header(b"x", b"very large\0\0", b"0") + tarred([]),
    "a long name of 64 MiB": lambda: gzip.compress(
        tar_header(b"././@LongLink", octal(64 * MIB), b"L") + bytes(64 * MIB) + tarred([])
    ),
    "long names without end": lambda: (
        (tar_header(b"././@LongLink", octal(2), b"L") + b"x".ljust(512, b"\0")) * 5000 + tarred([])
    ),
    "a pax header of 64 MiB": lambda: gzip.compress(pax(record("comment", "x" * 64 * MIB)) + tarred([])),
    "a pax header of many keys": lambda: pax(b"".join(record(f"k{k}", "") for k in range(2000))) + tarred([]),
    "global pax headers without end": lambda: pax(record("k", "x" * 60_000), b"g") * 300 + tarred([]),
    "a pax size below zero": lambda: pax(record("size", "-512")) + tar_header(b"x", octal(0), b"0") + tarred([]),
    "a pax name that leads out": lambda: pax(record("path", "../x")) + tar_header(b"x", octal(0), b"0") + tarred([]),
    "too many files": lambda: tarred([(tarfile.TarInfo(f"x/{k}"), b"") for k in range(1001)]),
    "a tar with a pickle": lambda: tar_with("unet/model.bin"),
}
TOO_LARGE = (413, 422)  # A large request may be found too large before or after it is found wrong.


def archives() -> Iterator[tuple[str, Hostile]]:
    for name, make in (ZIPS | TARS).items():
        yield name, upload(make, *TOO_LARGE)
    for name, path in NAMES.items():
        yield f"a zip with {name} in a name", upload(partial(zip_with, path))
        yield f"a tar with {name} in a name", upload(partial(tar_with, path))


# Models


def changed(name: str, content: bytes) -> Callable[[], bytes]:
    """The model, one file replaced."""
    return lambda: zipped({**model_files(), name: content})


def config(name: str = CONFIG, **changes: Any) -> Callable[[], bytes]:
    """The model, its configuration changed."""

    def make() -> bytes:
        files = model_files()
        return zipped({**files, name: json.dumps({**json.loads(files.get(name, b"{}")), **changes}).encode()})

    return make


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def weights(change: Callable[[dict[str, Any], bytearray], Any]) -> Callable[[], bytes]:
    """The model, header and bytes of its weights changed."""

    def make() -> bytes:
        content = model_files()[WEIGHTS]
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
        change(header, data)
        return changed(WEIGHTS, safetensors(header, bytes(data)))()

    return make


def value(number: float) -> Callable[[], bytes]:
    return weights(lambda _, data: data.__setitem__(slice(400, 404), struct.pack("<f", number)))


def all_as(dtype: str, size: int) -> Callable[[], bytes]:
    """The weights as another type, rightly declared."""

    def change(header: dict[str, Any], data: bytearray) -> None:
        for entry in header.values():
            if "data_offsets" in entry:
                entry["dtype"] = dtype
                entry["data_offsets"] = [at * size // 4 for at in entry["data_offsets"]]
        del data[len(data) * size // 4 :]
        data.extend(bytes(max(0, len(data) * size // 4 - len(data))))

    return weights(change)


FIRST = "conv_in.bias"
NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
WEIGHT_FILES: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header without end": safetensors({}, length=2**64 - 1),
    "a header beyond the file": safetensors({}, length=1000),
    "a header of 5 MiB": safetensors(b"{" + b" " * 5 * MIB + b"}"),
    "a header of no bytes": safetensors(b""),
    "a header that is a list": safetensors([]),
    "a header that is no JSON": safetensors(b"\x80\x04pickle"),
    "a header nested deeply": safetensors(NESTED),
    "a header that is cut off": safetensors({"a": tensor("F32", [1], 0, 4)}, bytes(4), length=20),
    "a product that overflows": safetensors({"a": tensor("F32", [2**32, 2**32, 2**32], 0, 4)}, bytes(4)),
    "a size below zero": safetensors({"a": tensor("F32", [-1], 0, 4)}, bytes(4)),
    "a fractional size": safetensors({"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}}, bytes(6)),
    "offsets out of order": safetensors({"a": tensor("F32", [1], 4, 0)}, bytes(4)),
    "offsets below zero": safetensors({"a": tensor("F32", [1], -4, 0)}, bytes(4)),
    "offsets out of range": safetensors({"a": tensor("F32", [1], 0, 400)}, bytes(4)),
    "offsets that overlap": safetensors({"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, bytes(12)),
    "offsets with a gap": safetensors({"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 8, 12)}, bytes(12)),
    "bytes behind the end": safetensors({"a": tensor("F32", [1], 0, 4)}, bytes(8)),
    "a type that lies": safetensors({"a": tensor("F64", [1], 0, 4)}, bytes(4)),
    "an unknown type": safetensors({"a": tensor("PICKLE", [1], 0, 4)}, bytes(4)),
    "metadata that is none": safetensors({"__metadata__": {"a": [1]}, "a": tensor("F32", [1], 0, 4)}, bytes(4)),
    "a tensor of other fields": safetensors({"a": {"exec": "os.system"}}),
    "too many tensors": safetensors({f"t{k}": tensor("F32", [0], 0, 0) for k in range(20_001)}),
    "another model's tensors": safetensors({"a": tensor("F32", [1], 0, 4)}, bytes(4)),
    "a huge tensor of nothing": safetensors({"a": tensor("F32", [0, 2**62], 0, 0)}),
}
WEIGHTS_CHANGED: dict[str, Callable[[], bytes]] = {
    "NaN": value(float("nan")),
    "infinity": value(float("inf")),
    "negative infinity": value(float("-inf")),
    "truncated": weights(lambda _, data: data.__delitem__(slice(len(data) // 2, None))),
    "a tensor missing": weights(lambda header, _: header.pop(FIRST)),
    "a tensor more": weights(lambda header, _: header.update(extra=tensor("F32", [0], 0, 0))),
    "a shape turned": weights(lambda header, _: header["conv_in.weight"]["shape"].reverse()),
    "integers": all_as("I32", 4),
    "bytes": all_as("U8", 1),
    "truths": all_as("BOOL", 1),
    "eight-bit floats": all_as("F8_E4M3", 1),
    "other eight-bit floats": all_as("F8_E5M2", 1),
    "complex numbers": all_as("C64", 8),
}
JSON_FILES: dict[str, bytes] = {
    "nothing": b"",
    "half a file": b'{"_class_name": "UNet2D',
    "a list": b"[]",
    "a number": b"1",
    "no text": b"\xff\xfe\x00\x01",
    "a list without end": b"[" * 100_000,
    "an object without end": NESTED,
    "500 levels": b'{"a":' * 500 + b"1" + b"}" * 500,
    "two MiB": b'{"a": "' + b"x" * 2 * MIB + b'"}',
    "a key twice": b'{"_class_name": "UNet2DModel", "_class_name": "DDPMScheduler"}',
    "a number of 10,000 digits": b'{"a": ' + b"9" * 10_000 + b"}",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "another class": {"_class_name": "os.system"},
    "a list for a class": {"_class_name": ["UNet2DModel"]},
    "a class with a path": {"_class_name": "models.UNet2DModel"},
    "a billion layers": {"layers_per_block": 10**9},
    "layers nested deeply": {"layers_per_block": json.loads("[" * 15 + str(10**9) + "]" * 15)},
    "as many layers as tensors": {"layers_per_block": 60},
    "ten thousand blocks": {
        "down_block_types": ["DownBlock2D"] * 10_000,
        "up_block_types": ["UpBlock2D"] * 10_000,
        "block_out_channels": [8] * 10_000,
    },
    "a billion channels": {"block_out_channels": [10**9, 8]},
    "channels that overflow": {"block_out_channels": [2**62, 8]},
    "channels below zero": {"block_out_channels": [-8, 8]},
    "no channels": {"block_out_channels": [0, 0]},
    "no blocks": {"block_out_channels": [], "down_block_types": [], "up_block_types": []},
    "words for channels": {"block_out_channels": "many"},
    "input channels without end": {"in_channels": 10**12, "out_channels": 10**12},
    "input channels below zero": {"in_channels": -3, "out_channels": -3},
    "output channels of its own": {"out_channels": 4},
    "classes without end": {"num_class_embeds": 10**15},
    "classes below zero": {"num_class_embeds": -5},
    "images without end": {"sample_size": 10**9},
    "images below zero": {"sample_size": -8},
    "images of no size": {"sample_size": 0},
    "images of a fractional size": {"sample_size": 8.5},
    "images of a size in words": {"sample_size": "8"},
    "images of three sizes": {"sample_size": [8, 8, 8]},
    "images of an object's size": {"sample_size": {"height": 8}},
    "an unknown block": {"down_block_types": ["os.system", "DownBlock2D"]},
    "an unknown activation": {"act_fn": "os.system"},
    "no groups": {"norm_num_groups": 0},
    "groups without end": {"norm_num_groups": 10**9},
    "an unknown time embedding": {"time_embedding_type": "fourier"},
    "a class embedding": {"class_embed_type": "timestep"},
    "heads of no size": {"attention_head_dim": 0, "down_block_types": ["AttnDownBlock2D", "DownBlock2D"]},
}
DIT = {"_class_name": "DiTTransformer2DModel", "in_channels": 4, "sample_size": 8, "num_layers": 1, "patch_size": 2}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "a billion layers": {"num_layers": 10**9},
    "layers below zero": {"num_layers": -1},
    "images without end": {"sample_size": 10**7},
    "patches of no size": {"patch_size": 0},
    "patches below zero": {"patch_size": -2},
    "heads without end": {"num_attention_heads": 10**9},
    "classes without end": {"num_embeds_ada_norm": 10**15},
    "another class": {"_class_name": "FluxTransformer2DModel"},
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "another class": {"_class_name": "subprocess.Popen"},
    "an object for a class": {"_class_name": {}},
    "no steps": {"num_train_timesteps": 0},
    "steps below zero": {"num_train_timesteps": -1},
    "steps without end": {"num_train_timesteps": 10**12},
    "steps in words": {"num_train_timesteps": "1000"},
    "steps that are a truth": {"num_train_timesteps": True},
    "betas below zero": {"beta_start": -1.0},
    "betas above one": {"beta_end": 2.0},
    "betas of NaN": {"beta_start": float("nan")},
    "betas of infinity": {"beta_end": float("inf")},
    "betas in words": {"trained_betas": ["a", "b"]},
    "betas of an object": {"trained_betas": {"a": 1}},
    "an unknown beta schedule": {"beta_schedule": "evil"},
    "an unknown prediction": {"prediction_type": "magic"},
    "a list for a prediction": {"prediction_type": ["epsilon"]},
    "a shift of NaN": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": float("nan")},
    "a shift below zero": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -1},
    "noise upside down": {"_class_name": "EDMEulerScheduler", "sigma_min": 80, "sigma_max": 1},
    "noise without end": {"_class_name": "EDMEulerScheduler", "sigma_max": 1e999},
    "nothing inside": {"_class_name": "TimeTunerScheduler", "base_scheduler": {"_class_name": "TimeTunerScheduler"}},
}
IMAGES = tensor("U8", [2, 3, 8, 8], 0, 384)
DATA_FILES: dict[str, bytes] = {
    "no images": safetensors({"other": tensor("U8", [1], 0, 1)}, bytes(1)),
    "one image": safetensors({"images": tensor("U8", [1, 3, 8, 8], 0, 192)}, bytes(192)),
    "images of no shape": safetensors({"images": tensor("U8", [], 0, 1)}, bytes(1)),
    "images of another shape": safetensors({"images": tensor("U8", [2, 192], 0, 384)}, bytes(384)),
    "images of another type": safetensors({"images": tensor("I8", [2, 3, 8, 8], 0, 384)}, bytes(384)),
    "images of NaN": safetensors({"images": tensor("F32", [2, 3, 8, 8], 0, 1536)}, b"\xff" * 1536),
    "images of eight-bit floats": safetensors({"images": tensor("F8_E4M3", [2, 3, 8, 8], 0, 384)}, bytes(384)),
    "a truncated file": safetensors({"images": IMAGES}, bytes(100)),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}
NULL_CLASSES = [0, -1, 10**30, "0", True, [], {}, 0.5]


@lru_cache
def latent_files() -> Files:
    """A latent-diffusion model, of which nothing is wrong."""
    return folder_files(BUILTIN_FOLDERS["digits32-ldm"])


def vae(**changes: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        files = latent_files()
        return zipped({**files, VAE: json.dumps({**json.loads(files[VAE]), **changes}).encode()})

    return make


VAES: dict[str, dict[str, Any]] = {
    "another class": {"_class_name": "VQModel"},
    "a scale of NaN": {"scaling_factor": float("nan")},
    "a scale of nothing": {"scaling_factor": 0},
    "a scale below zero": {"scaling_factor": -1},
    "a scale in words": {"scaling_factor": "1"},
    "a mean of too many": {"latents_mean": [0.0] * 100, "latents_std": [1.0] * 100},
    "latent channels without end": {"latent_channels": 10**9},
    "a billion layers": {"layers_per_block": 10**9},
}


def models() -> Iterator[tuple[str, Hostile]]:
    for name, content in WEIGHT_FILES.items():
        yield f"weights: {name}", upload(changed(WEIGHTS, content))
    for name, make in WEIGHTS_CHANGED.items():
        yield f"weights: all is {name}" if "all_as" in repr(make) else f"weights with {name}", upload(make)
    for name, content in JSON_FILES.items():
        for file in (CONFIG, SCHEDULER):
            yield f"{file}: {name}", upload(changed(file, content))
    for name, changes in CONFIGS.items():
        yield f"a network with {name}", upload(config(**changes))
    for name, changes in TRANSFORMERS.items():
        files = {TRANSFORMER: json.dumps(DIT | changes).encode(), SCHEDULER: model_files()[SCHEDULER]}
        files[TRANSFORMER_WEIGHTS] = safetensors({f"t{k}": tensor("F32", [0], 0, 0) for k in range(50)})
        yield f"a transformer with {name}", upload(partial(zipped, files))
    for name, changes in SCHEDULERS.items():
        yield f"a scheduler with {name}", upload(config(SCHEDULER, **changes))
    for name, content in DATA_FILES.items():
        yield f"data: {name}", upload(changed(DATA, content))
    for label in NULL_CLASSES:
        yield f"a null class of {label!r}", upload(changed(METADATA, json.dumps({"null_class_label": label}).encode()))
    for name, changes in VAES.items():
        yield f"an autoencoder with {name}", upload(vae(**changes))


# Forms


def part(headers: str, content: str = "x") -> bytes:
    return f"--{BOUNDARY}\r\n{headers}\r\n\r\n{content}\r\n".encode()


END = f"--{BOUNDARY}--\r\n".encode()
FIELD = 'Content-Disposition: form-data; name="{}"'
FILE = FIELD + '; filename="{}"'
FORMS: dict[str, Callable[[], bytes]] = {
    "nothing": bytes,
    "no boundary": lambda: b"x" * 1000,
    "no end": lambda: part(FIELD.format("archive")),
    "no name": lambda: part("Content-Disposition: form-data") + END,
    "no headers": lambda: part("") + END,
    "a field for the archive": lambda: part(FIELD.format("archive")) + END,
    "two archives": lambda: part(FILE.format("archive", "a")) * 2 + END,
    "a thousand fields": lambda: part(FIELD.format("x")) * 1000 + END,
    "a thousand files": lambda: part(FILE.format("x", "x")) * 1000 + END,
    "a field of 2 MiB": lambda: part(FIELD.format("name"), "x" * 2 * MIB) + END,
    "a header of 1 MiB": lambda: part(FIELD.format("x" * MIB)) + END,
    "a header without end": lambda: f"--{BOUNDARY}\r\nX: ".encode() + b"x" * MIB,
    "a thousand headers": lambda: part("\r\n".join(f"X-{k}: x" for k in range(1000))) + END,
    "a header of control characters": lambda: part("X\x00: \x01") + END,
    "a preamble of 1 MiB": lambda: b"\r\n" * (MIB // 2) + part(FIELD.format("x")) + END,
    "a name of 300": lambda: part(FIELD.format("name"), "x" * 300) + part(FILE.format("archive", "a")) + END,
    "a name with a newline at its end": lambda: (
        part(FIELD.format("name"), "x\n") + part(FILE.format("archive", "a")) + END
    ),
    "a file name with control characters": lambda: part(FILE.format("archive", "\x1b[2J")) + END,
}


def forms() -> Iterator[tuple[str, Hostile]]:
    for name, make in FORMS.items():
        yield f"a form with {name}", form(make, 400, 422)
    for kind in ("multipart/form-data", f"multipart/form-data; boundary={'x' * 500}", "multipart/mixed; boundary=b"):
        yield f"a form of {kind[:40]}", Hostile((400, 415, 422), headers={"Content-Type": kind}, content=lambda: b"x")


# JSON bodies

JSON = {"Content-Type": "application/json"}
NO_JSON: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a word": b'"x"',
    "half an object": b'{"model": ',
    "a key without quotes": b"{model: 1}",
    "bytes that are no text": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": 1}'.encode("utf-16"),
    "a list without end": b"[" * 50_000,
    "an object without end": b'{"a":' * 15_000 + b"1" + b"}" * 15_000,
    "numbers that are none": b'{"model": NaN, "num_steps": Infinity, "builtin": NaN, "schedule": -Infinity}',
    "a number of 90,000 digits": b'{"model": ' + b"9" * 90_000 + b"}",
    "an exponent without end": b'{"model": 1e999999999, "num_steps": 1e999999999}',
    "a zero byte": b'{"model": "\\u0000", "builtin": "\\u0000", "schedule": "\\u0000", "num_steps": 5}',
    "half a surrogate pair": b'{"model": "\\ud800", "builtin": "\\ud800", "schedule": "\\ud800", "num_steps": 5}',
    "ten thousand keys": json.dumps({f"k{k}": k for k in range(7_000)}).encode(),
}
BODY_PATHS = ("/v1/models", "/v1/tuning-jobs", "/v1/tuning-groups", "/v1/schedules", "/v1/samples")
SETTINGS: dict[str, Any] = {
    "model": ["x" * 65, "../../etc/passwd", "' OR 1=1 --", "mdl_\u0000", 7, [], {}],
    "num_steps": [0, -1, 10**30, 1.5, "five", [5], True and "true", 10**6],
    "sampler": ["__import__", "", 7, "x" * 10_000],
    "guidance_type": ["evil", 1],
    "guidance_scale": [-1, 1e308, "NaN", "Infinity", 1.23456789, 10**40],
    "eta": [2, -1, "x"],
    "seed": [-1, 2**63, 1.5],
    "timesteps": [[], [1], [1, 2, 3], [1e308, 0], "evil", [0.5] * 6, [[1]]],
    "surprise": [1],
    "webhook_url": ["file:///etc/passwd", "http://169.254.169.254/", "http://a@b/", "gopher://x", "http://[", 7],
}
OWN: dict[str, dict[str, Any]] = {
    "/v1/tuning-jobs": {
        "tuner": [
            {"objective": "evil"},
            {"objective": ["end_to_end"]},
            {"batch_size": 10**9},
            {"lr": -1},
            {"total_iters": 10**9},
            {"__class__": "x"},
            [],
        ],
        "evaluation": [{"num_samples": 10**9}, {"num_samples": 0}, {"teacher_num_steps": 10**9}],
    },
    "/v1/samples": {
        "num_images": [0, -1, 10**9, 10**5, 1.5],
        "class_labels": [-1, 10**30, "cat", [[0]], [0] * 1000],
        "condition": [
            "x",
            "AAAA",
            base64.b64encode(b"\x93NUMPY\x01\x00v\x00{'descr': '|O'").decode(),
            "=" * 9000,
            "\ud800",
        ],
        "uncond_condition": ["x", "\ud800"],
        "schedule": ["no such", "x" * 65, 7, "sch_none"],
        "deadline_seconds": [0, -1, 1e300, "soon"],
        "previews": ["maybe", 7],
    },
    "/v1/schedules": {"t_ratios": [[], [-1] * 5, [1e308] * 5, ["a"] * 5], "provenance": [[], "x", {"a": {"b": 1e400}}]},
}
VALID: dict[str, dict[str, Any]] = {
    "/v1/tuning-jobs": {"model": MODEL, "num_steps": 5},
    "/v1/samples": {"model": MODEL, "num_steps": 5},
    "/v1/schedules": {
        "model": MODEL,
        "num_steps": 5,
        "timesteps": [1.0, 0.8, 0.6, 0.4, 0.2, 0.001],
        "t_ratios": [1.0] * 5,
    },
}


def bodies() -> Iterator[tuple[str, Hostile]]:
    for path in BODY_PATHS:
        for name, content in NO_JSON.items():
            yield f"{path}: {name}", Hostile((400, 413, 422), path=path, headers=JSON, content=partial(bytes, content))
        yield f"{path}: more than fits", Hostile((413,), path=path, headers=JSON, content=lambda: b" " * 200_000)
    for path, valid in VALID.items():
        for name, values in (SETTINGS | OWN[path]).items():
            if path == "/v1/schedules" and name in ("seed", "webhook_url"):
                continue
            for k, given in enumerate(values):
                content = json.dumps({**valid, name: given}).encode()
                refusals = (400, 413, 422)
                yield (
                    f"{path}: {name} #{k}",
                    Hostile(refusals, path=path, headers=JSON, content=partial(bytes, content)),
                )


TUNING = VALID["/v1/tuning-jobs"]
GROUPS: dict[str, Any] = {
    "no jobs": {"jobs": []},
    "jobs that are none": {"jobs": [None, 7, "x", []]},
    "an object of jobs": {"jobs": {"0": TUNING}},
    "a job for all": {"jobs": TUNING},
    "51 jobs": {"jobs": [TUNING] * 51},
    "10,000 jobs that are none": {"jobs": [1] * 10_000},
    "a job that is a group": {"jobs": [{"jobs": [TUNING]}]},
    "a job of steps without end after one that is right": {"jobs": [TUNING, TUNING | {"num_steps": 10**30}]},
    "a job of a model that is nobody's after one that is right": {"jobs": [TUNING, TUNING | {"model": "mdl_none"}]},
    "a job of a batch that is too large after one that is right": {
        "jobs": [TUNING, TUNING | {"tuner": {"total_iters": 10_000, "batch_size": 4096}}]
    },
    "a dry run of maybe": {"jobs": [TUNING], "dry_run": "maybe"},
    "a surprise": {"jobs": [TUNING], "surprise": 1},
}


def groups() -> Iterator[tuple[str, Hostile]]:
    for name, body in GROUPS.items():
        content = partial(bytes, json.dumps(body).encode())
        yield f"a group of {name}", Hostile((404, 413, 422), path="/v1/tuning-groups", headers=JSON, content=content)


# Ids, queries and headers

IDS = {
    "a zero byte": "%00",
    "a space": "a%20b",
    "a quote": "%27%20OR%201=1--",
    "a smile": "%F0%9F%98%80",
    "bytes that are no text": "%FF%FE",
    "parents": "..%2F..%2Fetc%2Fpasswd",
    "10,000 letters": "x" * 10_000,
    "a template": "%7B%7B7*7%7D%7D",
    "nobody": "none_01JD3K5V8Q2M4N6P7R9S0T1V2W",
}
ID_PATHS = (
    ("GET", "/v1/models/{}"),
    ("DELETE", "/v1/models/{}"),
    ("GET", "/v1/tuning-jobs/{}/events"),
    ("POST", "/v1/tuning-jobs/{}/cancel"),
    ("GET", "/v1/schedules/{}"),
    ("GET", "/v1/samples/{}/content"),
)
QUERIES = {
    "/v1/usage": ["since=%00", "until=99999-01-01", "since=2026-13-01", "key=" + "x" * 100, "surprise=1", "model=%27"],
    "/v1/models": [
        "sort=evil",
        "search=%00",
        "search=" + "x" * 300,
        "limit=0",
        "limit=-1",
        "limit=1e9",
        "limit=" + "9" * 5000,
        "cursor=%00",
        "cursor=" + "x" * 9000,
    ],
    "/v1/tuning-jobs": ["state=evil", "limit=NaN", "cursor=%27"],
    "/v1/schedules": [
        "num_steps=-1",
        "guidance_scale=NaN",
        "eta=1e999",
        "status=%FF",
        "surprise=1",
        "sampler=__init__",
    ],
    "/v1/schedules/resolve": ["", "model=%00&num_steps=5", "model=none&num_steps=5", f"model={MODEL}&num_steps=0"],
}


def others() -> Iterator[tuple[str, Hostile]]:
    for method, path in ID_PATHS:
        for name, identifier in IDS.items():
            yield f"{method} {path} of {name}", Hostile((404, 405, 422), method, path.format(identifier))
    for path, queries in QUERIES.items():
        for query in queries:
            yield f"{path}?{query[:30]}", Hostile((422,), "GET", f"{path}?{query}")
    for kind in ("text/plain", "application/json-evil", "x" * 5000, "application/x-www-form-urlencoded", "\x80"):
        yield f"a body of {kind[:20]!r}", Hostile((415,), headers={"Content-Type": kind}, content=lambda: b"{}")
    for accept in ("text/html", "image/png;q=0", "image/png;q=nan", "x" * 20_000, ",".join(["a/b;q=1e99999"] * 900)):
        body = partial(bytes, json.dumps(VALID["/v1/samples"]).encode())
        yield (
            f"Accept: {accept[:20]}",
            Hostile((406,), path="/v1/samples", headers={**JSON, "Accept": accept}, content=body),
        )
    many = {f"X-{k}": "x" for k in range(200)}
    yield "200 headers", Hostile((431,), "GET", headers=many)
    yield "a header of 100 kB", Hostile((431,), "GET", headers={"X": "x" * 100_000})
    yield "a method of its own", Hostile((400, 405), "PROPFIND")
    yield "an unknown method", Hostile((400,), "EVIL")


@lru_cache
def corpus() -> dict[str, Hostile]:
    """All of them, by name."""
    found: dict[str, Hostile] = {}
    for group in (archives, models, forms, bodies, groups, others):
        for name, request in group():
            assert name not in found, name
            found[name] = request
    return found


# Bytes that are no HTTP, or an unusual one; with the status of the answer, or None where hanging up is enough.
HEAD = b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
RAW: dict[str, bytes] = {
    "nonsense": b"\x00\x01\x02\x03" * 100 + b"\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "no version": b"GET /v1/models\r\n\r\n",
    "another protocol": b"GET / GOPHER/1.0\r\n\r\n",
    "a target of bytes": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "a space in a header's name": b"GET / HTTP/1.1\r\nHo st: x\r\n\r\n",
    "a zero byte in a header": b"GET / HTTP/1.1\r\nHost: \x00\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 20\r\n\r\n{}",
    "a length below zero": HEAD + b"Content-Length: -1\r\n\r\n{}",
    "a length in words": HEAD + b"Content-Length: two\r\n\r\n{}",
    "a length without end": HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n{}",
    "a length and chunks": HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks twice": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "an unknown encoding": HEAD + b"Transfer-Encoding: evil\r\n\r\n{}",
    "a chunk without a size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a chunk beyond all": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n{}\r\n0\r\n\r\n",
    "chunks of 200 kB": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"400\r\n" + b" " * 1024 + b"\r\n") * 200,
    "an extension of 1 MiB": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * MIB + b"\r\n{\r\n0\r\n\r\n",
    "a trailer of 1 MiB": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: " + b"x" * MIB + b"\r\n\r\n",
    "a header of 1 MiB": b"GET / HTTP/1.1\r\nX: " + b"x" * MIB + b"\r\n\r\n",
    "ten thousand headers": b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 10_000 + b"\r\n",
    "a target of 1 MiB": b"GET /" + b"x" * MIB + b" HTTP/1.1\r\nHost: x\r\n\r\n",
}

# No keys exist for these: whoever reads them must refuse them or look away, and never fall.
AUTHORIZATIONS: dict[str, str] = {
    "nothing": "",
    "a scheme alone": "Bearer",
    "an unknown scheme": "Evil abc",
    "bad base64": "Basic !!!!",
    "Basic without a colon": "Basic " + base64.b64encode(b"nobody").decode(),
    "Basic of bytes": "Basic " + base64.b64encode(b"\xff\xfe:\x00").decode(),
    "a token of nobody's": "Bearer tt_" + "x" * 40,
    "a token without end": "Bearer " + "x" * 50_000,
    "a token of bytes": "Bearer \xff\xfe\x80",
    "a token with a quote": "Bearer ' OR 1=1 --",
    "a token with format": "Bearer %s%n{0}${jndi:ldap://x}",
    "an unsigned JWT": "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.",
    "two tokens": "Bearer a, Bearer b",
}
