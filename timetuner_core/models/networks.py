"""Building diffusers' networks from a folder, checked, and calling them with one signature."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from timetuner_core.models.diffusers_import import diffusers_class
from timetuner_core.models.folder_files import (
    TRANSFORMER_CONFIG,
    TRANSFORMER_WEIGHTS,
    UNET_CONFIG,
    UNET_WEIGHTS,
    ModelFormatError,
    Shape,
    read_json,
    read_weight_shapes,
)
from timetuner_core.models.tensors import check_finite, read_tensors

UNETS = ("UNet2DModel", "UNet2DConditionModel")
TRANSFORMERS = ("DiTTransformer2DModel",)
BLOCKS = ("block_out_channels", "down_block_types", "up_block_types")  # These have an entry for each block.
LAYERS = ("layers_per_block", "num_layers", "transformer_layers_per_block")  # These say how many layers a block has.
MAX_SAMPLE_SIZE = 4096
MAX_PATCHES = 2**16  # A transformer's position table is no weight, so only this bounds it.
MAX_POSITION_VALUES = 2**28  # The position table has no more values.
MAX_FEATURES = 2**30  # An image's largest feature map has no more values: small weights can make large maps.

# Attention layers saved by older versions of diffusers have these names.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Options:
    """How a network runs; its inputs and outputs keep the dtype and layout they came with.

    Attributes:
        dtype: of weights and activations. channels_last: their memory format. compile: by `torch.compile`.
    """

    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    compile: bool = False

    def apply(self, module: Any, device: torch.device | str) -> Any:
        """`module` on `device`, as asked for; compiling is the caller's."""
        if self.dtype == torch.float64:
            _embed_time_in_float64(module)
        memory_format = torch.channels_last if self.channels_last else torch.preserve_format
        # PyTorch's own function is called: that of diffusers warns of any dtype.
        moved = torch.nn.Module.to(module, device, self.dtype)
        return torch.nn.Module.to(moved, memory_format=memory_format)

    def inputs(self, x: Tensor) -> Tensor:
        return x.to(self.dtype, memory_format=torch.channels_last if self.channels_last else torch.preserve_format)


@dataclass(frozen=True)
class LoadedNetwork:
    """A denoiser.

    Attributes:
        call: `(x (B, *sample_shape), t_input (B,), condition) -> (B, *sample_shape)`.
        num_embeddings: of classes, the null class included; 0 if there is no class condition.
        has_null_class: whether the last embedding always stands for "no class".
        condition_dim: D of conditions `(B, L, D)`; None if there is no tensor condition.
        num_bytes: of weights and buffers.
    """

    call: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    sample_shape: tuple[int, int, int]
    num_embeddings: int
    has_null_class: bool
    condition_dim: int | None
    num_parameters: int
    num_bytes: int


def load_network(path: Path, device: torch.device | str, options: Options) -> LoadedNetwork:
    """The network in `unet/` or `transformer/`. Raises: ModelFormatError."""
    if (path / TRANSFORMER_CONFIG).exists() and (path / UNET_CONFIG).exists():
        raise ModelFormatError(TRANSFORMER_CONFIG, "there is a unet/ too; accepted: one network")
    is_transformer = (path / TRANSFORMER_CONFIG).exists()
    files = (TRANSFORMER_CONFIG, TRANSFORMER_WEIGHTS) if is_transformer else (UNET_CONFIG, UNET_WEIGHTS)
    accepted = TRANSFORMERS if is_transformer else UNETS
    module, class_name = load_module(path, *files, accepted, _check_network, options.compile)
    config = module.config
    height, width = _sample_size(config)
    module = options.apply(module, device)
    is_conditional = class_name == "UNet2DConditionModel"
    num_embeddings = int(config.num_embeds_ada_norm) + 1 if is_transformer else int(config.num_class_embeds or 0)
    return LoadedNetwork(
        call=_caller(module, is_conditional, options),
        sample_shape=(int(config.in_channels), height, width),
        num_embeddings=num_embeddings,
        has_null_class=is_transformer,
        condition_dim=int(config.cross_attention_dim) if is_conditional else None,
        num_parameters=sum(p.numel() for p in module.parameters()),
        num_bytes=size_in_bytes(module),
    )


def size_in_bytes(module: torch.nn.Module) -> int:
    """The size of its weights and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def load_module(
    path: Path,
    config_name: str,
    weights_name: str,
    accepted: tuple[str, ...],
    check: Callable[[Any, str], None] = lambda module, config_name: None,
    compiler: bool = False,
) -> tuple[Any, str]:
    """A frozen diffusers module in float32 on the CPU, and its class's name.

    The weights are checked against the configuration by name and shape before anything of their size is
    allocated, then that they are finite.

    Args:
        accepted: names of diffusers classes. check: `(module without weights, config_name)`, may raise.
        compiler: whether the module is to be compiled.

    Raises:
        ModelFormatError: anything missing, malformed or at odds with the rest.
    """
    config = read_json(path, config_name)
    class_name = config.get("_class_name")
    if class_name not in accepted:
        names = ", ".join(map(repr, accepted))
        raise ModelFormatError(config_name, f"_class_name is {class_name!r}; accepted: {names}")
    shapes_by_file = read_weight_shapes(path, weights_name)
    files = [tensor for tensors in shapes_by_file.values() for tensor in tensors]
    _check_depth(config, config_name, len(files))
    network_class = diffusers_class(class_name, compiler=compiler)
    try:
        # Only shapes are made: a hostile configuration allocates nothing.
        with torch.device("meta"), _Uninitialised():
            module: Any = network_class.from_config(config)
    except Exception as error:  # The constructors of diffusers may raise anything.
        raise ModelFormatError(config_name, f"no {class_name} can be built from it ({error})") from None
    check(module, config_name)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    current = {tensor: _current_name(tensor, expected) for tensor in files}
    found = {current[tensor]: shape for shapes in shapes_by_file.values() for tensor, shape in shapes.items()}
    _check_shapes(found, expected, next(iter(shapes_by_file)), config_name)
    state: dict[str, Tensor] = {}
    for name in shapes_by_file:
        tensors = read_tensors(path, name)
        check_finite(name, tensors)
        state |= {current[tensor]: value.float() for tensor, value in tensors.items()}
    module.load_state_dict(state, assign=True)
    _fill_buffers(module, config)
    return module.requires_grad_(False).eval(), class_name


class _Uninitialised(TorchFunctionMode):
    """Leaves tensors without values as they are where a network would draw its first weights.

    PyTorch would look up how to draw normal numbers of no values, for which it imports its compiler: a second.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draws = function in (Tensor.normal_, Tensor.uniform_) or getattr(function, "__module__", "") == "torch.nn.init"
        options = kwargs or {}
        tensor = args[0] if args else options.get("tensor")
        return tensor if draws and isinstance(tensor, Tensor) and tensor.is_meta else function(*args, **options)


def _check_depth(config: dict[str, Any], config_name: str, num_tensors: int) -> None:
    """Building takes time by the number of layers, each of which has tensors in the file."""
    numbers = {key: max((n for n in _flat(config.get(key)) if isinstance(n, int)), default=1) for key in LAYERS}
    lists = [value for key in BLOCKS if isinstance(value := config.get(key), list)]
    num_layers = max(map(len, lists), default=1) * math.prod(max(number, 1) for number in numbers.values())
    if num_layers > num_tensors:
        given = ", ".join(f"{key} is {config[key]!r}"[:100] for key in (*LAYERS, *BLOCKS) if key in config)
        message = f"{given}: up to {num_layers} layers, but the weights are {num_tensors} tensors only"
        raise ModelFormatError(config_name, message)


def _flat(value: Any) -> list[Any]:
    return [number for item in value for number in _flat(item)] if isinstance(value, list) else [value]


def check_features(channels: Any, height: int, width: int, config_name: str) -> None:
    """Refuse a network whose feature maps for one image would fill a device. Raises: ModelFormatError."""
    values = height * width * channels
    if values > MAX_FEATURES:
        message = f"{channels} channels of {height} x {width} are {values} values for one image"
        raise ModelFormatError(config_name, f"{message}; accepted: up to {MAX_FEATURES}")


def _check_network(module: Any, config_name: str) -> None:
    """Check that `_caller` can call the network, and that its size is known."""
    config = module.config
    if config.get("sample_size") is None:
        raise ModelFormatError(config_name, "sample_size is null; accepted: the images' size in pixels")
    sizes = _sample_size(config)
    if not all(isinstance(size, int) and 1 <= size <= MAX_SAMPLE_SIZE for size in sizes):
        raise ModelFormatError(config_name, f"sample_size is {config.sample_size!r}; accepted: 1 to {MAX_SAMPLE_SIZE}")
    for key, accepted in _ACCEPTED[type(module).__name__].items():
        if config.get(key) not in accepted:
            raise ModelFormatError(
                config_name, f"{key} is {config.get(key)!r}; accepted: {', '.join(map(str, accepted))}"
            )
    _check_out_channels(config, config_name)
    if type(module).__name__ == "UNet2DModel":
        _check_divisible(module, sizes, config_name)
    if "patch_size" in config:
        _check_transformer(config, config_name, sizes)
    elif "cross_attention_dim" in config and not isinstance(config.cross_attention_dim, int):
        raise ModelFormatError(config_name, "cross_attention_dim: accepted: one number for all blocks")
    else:
        check_features(config.block_out_channels[0], *sizes, config_name)


# Other settings of each network want other inputs than x, time and one condition, or integer times, or cannot run.
_ACCEPTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "UNet2DModel": {"time_embedding_type": ("positional",), "class_embed_type": (None,)},
    "UNet2DConditionModel": {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "encoder_hid_dim": (None,),
        "time_cond_proj_dim": (None,),
        "attention_type": ("default",),
        "dual_cross_attention": (False,),
        "class_embeddings_concat": (False,),
    },
    "DiTTransformer2DModel": {},
}


def _check_out_channels(config: Any, config_name: str) -> None:
    out_channels = config.out_channels or config.in_channels
    if out_channels not in (config.in_channels, 2 * config.in_channels):
        message = f"out_channels is {out_channels}; accepted: in_channels, {config.in_channels}, or twice that"
        raise ModelFormatError(config_name, f"{message} if the variance is learned")


def _check_divisible(module: Any, sizes: tuple[int, int], config_name: str) -> None:
    """Refuse sizes that a `UNet2DModel` would halve to fractions: what it doubles again would not fit."""
    factor = 2 ** sum(getattr(block, "downsamplers", None) is not None for block in module.down_blocks)
    if any(size % factor for size in sizes):
        message = f"sample_size is {module.config.sample_size!r}; accepted: multiples of {factor}"
        raise ModelFormatError(config_name, f"{message}, as the network halves it {factor.bit_length() - 1} times")


def _check_transformer(config: Any, config_name: str, sizes: tuple[int, int]) -> None:
    if sizes[0] != sizes[1] or sizes[0] % config.patch_size:
        raise ModelFormatError(config_name, "sample_size: accepted: one number, a multiple of patch_size")
    if (sizes[0] // config.patch_size) ** 2 > MAX_PATCHES:
        raise ModelFormatError(config_name, f"sample_size: accepted: up to {MAX_PATCHES} patches")
    width = config.num_attention_heads * config.attention_head_dim
    if (sizes[0] // config.patch_size) ** 2 * width > MAX_POSITION_VALUES:
        message = f"{width} values per patch, by num_attention_heads and attention_head_dim"
        raise ModelFormatError(config_name, f"{message}; accepted: up to {MAX_POSITION_VALUES} for all patches")


def _sample_size(config: Any) -> tuple[int, int]:
    size = config.sample_size
    return (size[0], size[1]) if isinstance(size, list | tuple) and len(size) == 2 else (size, size)


def _current_name(name: str, expected: dict[str, Shape]) -> str:
    """A tensor's name in today's diffusers."""
    parts = name.split(".")
    if name in expected or len(parts) < 2 or parts[-2] not in OLD_NAMES:
        return name
    return ".".join([*parts[:-2], OLD_NAMES[parts[-2]], parts[-1]])


def _check_shapes(found: dict[str, Shape], expected: dict[str, Shape], weights_name: str, config_name: str) -> None:
    for name, shape in expected.items():
        if found.get(name) != shape:
            given = f"shape {found[name]}" if name in found else "none"
            message = f"tensor {name!r} should have shape {shape} by {config_name}, the file has {given}"
            raise ModelFormatError(weights_name, message)
    if extra := sorted(set(found) - set(expected)):
        raise ModelFormatError(weights_name, f"tensor {extra[0]!r} has no place in the model of {config_name}")


def _fill_buffers(module: Any, config: dict[str, Any]) -> None:
    """Give buffers that are no weights (a transformer's positions, say) the values that the constructor does."""
    missing = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if missing:
        buffers = dict(type(module).from_config(config).named_buffers())
        for name in missing:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, buffers[name])


def _caller(module: Any, is_conditional: bool, options: Options) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    condition_name = "encoder_hidden_states" if is_conditional else "class_labels"
    compiled = torch.compile(module) if options.compile else module

    def run(network: Any, x: Tensor, t_input: Tensor, condition: Tensor | None) -> Tensor:
        if condition is not None and condition.is_floating_point():
            condition = condition.to(options.dtype)
        output: Tensor = network(options.inputs(x), t_input, **{condition_name: condition}).sample
        return output[:, : x.shape[1]].to(x.dtype).contiguous()

    def call(x: Tensor, t_input: Tensor, condition: Tensor | None = None) -> Tensor:
        if not _has_tangent(x) and not _has_tangent(t_input):
            return run(compiled, x, t_input, condition)
        # Fused attention has no forward-mode derivative, and the compiler does not know of dual numbers.
        with sdpa_kernel(SDPBackend.MATH):
            return run(module, x, t_input, condition)

    return call


def _has_tangent(x: Tensor) -> bool:
    """Whether a forward-mode derivative is being taken through `x`."""
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


class _Float64Timesteps(torch.nn.Module):
    """diffusers' sinusoidal embedding of times `(B,)`, which rounds to float32, without that rounding."""

    frequencies: Tensor

    def __init__(self, timesteps: Any) -> None:
        super().__init__()
        half = timesteps.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - timesteps.downscale_freq_shift)
        self.register_buffer("frequencies", timesteps.scale * torch.exp(exponent).double(), persistent=False)
        self.flip_sin_to_cos = timesteps.flip_sin_to_cos
        self.padding = timesteps.num_channels % 2

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps.double()[:, None] * self.frequencies
        sin_cos = [torch.sin(angles), torch.cos(angles)]
        embedding = torch.cat(sin_cos[::-1] if self.flip_sin_to_cos else sin_cos, dim=-1)
        return torch.nn.functional.pad(embedding, (0, self.padding))


def _embed_time_in_float64(module: Any) -> None:
    from diffusers.models.embeddings import Timesteps

    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Timesteps):
                setattr(parent, name, _Float64Timesteps(child))
