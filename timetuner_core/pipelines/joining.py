"""Several calls of a network as one: their inputs are concatenated along the batch, and the answer is split."""

import hashlib
import inspect
import secrets
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from timetuner_core.pipelines.kinds import ARGUMENTS_WITH_MORE_ROWS, ARGUMENTS_WITHOUT_ROWS, TIME_ARGUMENTS

# Values whose text tells all of them.
PLAIN = (str, int, float, type(None), torch.dtype, torch.device)


class NotSeparableError(Exception):
    """An answer whose rows cannot be told apart."""


class Leaf(NamedTuple):
    """One value among a call's arguments.

    Attributes:
        role: `rows` are concatenated; a `time` is one number for all rows; the `same` have to agree between calls.
    """

    role: Literal["rows", "time", "same"]
    value: Any


@dataclass(frozen=True)
class NetworkCall:
    """One call of a network.

    Attributes:
        rows: the length of the batch; None where the first argument is no batch. Such a call is made alone.
        has_lists: whether the batch is a list with one tensor for each row, as Z-Image has.
        positional: the names of the arguments that are passed by position.
        arguments: the names of all arguments, each with the structure of its leaves; None where it is one leaf itself.
    """

    rows: int | None
    has_lists: bool
    positional: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    arguments: tuple[tuple[str, TreeSpec | None], ...]

    @classmethod
    def of(cls, network: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "NetworkCall":
        positional = _argument_names(type(network).forward)[: len(args)]
        arguments = {**dict(zip(positional, args, strict=True)), **kwargs}
        first = next((value for name, value in arguments.items() if name not in TIME_ARGUMENTS), None)
        lists = isinstance(first, list)
        rows = len(first) if isinstance(first, list) or (isinstance(first, Tensor) and first.ndim) else None

        def is_list_of_rows(value: Any) -> bool:
            if not isinstance(value, list) or len(value) != rows:
                return False
            return lists or not any(isinstance(each, Tensor) for each in value)

        leaves: list[Leaf] = []
        structures: list[tuple[str, TreeSpec | None]] = []
        for name, value in sorted(arguments.items()):
            # Most arguments are one leaf, and a tree's code is slow beside a step's other work.
            if isinstance(value, (Tensor, *PLAIN)) or is_list_of_rows(value):
                parts, structure = [value], None
            else:
                parts, structure = tree_flatten(value, is_leaf=is_list_of_rows)
            leaves += [Leaf(_role(name, part, rows), part) for part in parts]
            structures.append((name, structure))
        return cls(rows, lists, positional, tuple(leaves), tuple(structures))

    @cached_property
    def content(self) -> bytes:
        """A digest of the whole input. Calls that have the same are answered alike."""
        return content_of([str(self.arguments), *[leaf.value for leaf in self.leaves]])

    @cached_property
    def kind(self) -> Hashable:
        """All that has to agree between calls that are made as one."""
        parts: list[Hashable] = [self.positional]
        parts += [(name, structure and str(structure)) for name, structure in self.arguments]
        for role, value in self.leaves:
            if role == "same":
                parts.append(repr(value) if isinstance(value, PLAIN) else content_of(value))
            elif role == "rows":
                parts.append(_shapes_without_batch(value, self.rows or 1))
            else:
                parts.append(str(value.dtype) if isinstance(value, Tensor) else type(value).__name__)
        return tuple(parts)

    @property
    def device(self) -> torch.device:
        tensors = [leaf.value for leaf in self.leaves if isinstance(leaf.value, Tensor) and leaf.value.ndim]
        return tensors[0].device

    def on(self, network: Any) -> Any:
        """The network's answer to the call."""
        values = iter([leaf.value for leaf in self.leaves])
        arguments = {
            name: next(values) if structure is None else tree_unflatten(islice(values, structure.num_leaves), structure)
            for name, structure in self.arguments
        }
        return network(*[arguments.pop(name) for name in self.positional], **arguments)


def join(calls: Sequence[NetworkCall]) -> NetworkCall:
    """One call in place of several of one `kind`."""
    leaves = [Leaf(first.role, _joined(calls, index)) for index, first in enumerate(calls[0].leaves)]
    return replace(calls[0], rows=sum(sizes_of(calls)), leaves=tuple(leaves))


def split(answer: Any, calls: Sequence[NetworkCall]) -> list[Any]:
    """An answer for each of the calls that were made as one.

    Raises:
        NotSeparableError: a part of the answer has another number of rows.
    """
    sizes = sizes_of(calls)
    total = sum(sizes)

    def is_list_of_rows(value: Any) -> bool:
        return calls[0].has_lists and isinstance(value, list) and len(value) == total

    def part(value: Any, own: slice) -> Any:
        if is_list_of_rows(value):
            return [each.clone() for each in value[own]]
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 0 or len(value) != total:
            raise NotSeparableError(f"the answer to {total} rows has a part of shape {tuple(value.shape)}")
        return value[own].clone()

    ends = torch.tensor(sizes).cumsum(0).tolist()
    slices = [slice(end - count, end) for end, count in zip(ends, sizes, strict=True)]
    return [tree_map(partial(part, own=own), answer, is_leaf=is_list_of_rows) for own in slices]


def batches(calls: Sequence[NetworkCall], max_rows: int) -> list[list[NetworkCall]]:
    """The calls in groups of at most `max_rows` rows, or of one call that has more. A call without rows is alone."""
    groups: list[list[NetworkCall]] = []
    for call in calls:
        fits = groups and sum(sizes_of([*groups[-1], call])) <= max_rows
        if call.rows is not None and fits:
            groups[-1].append(call)
        else:
            groups.append([call])
    return groups


def copied(answer: Any) -> Any:
    """An answer with tensors of its own, which its receiver may change."""
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, answer)


def relative_difference(first: Any, second: Any) -> float:
    """The largest difference of two answers' tensors, as a share of their largest value."""
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    shares = [
        float((a - b).abs().max()) / max(float(a.abs().max()), 1e-12)
        for a, b in pairs
        if isinstance(a, Tensor) and a.numel()
    ]
    return max(shares, default=0.0)


def content_of(value: Any) -> bytes:
    """A digest of a value. With an object that is neither a tensor nor a plain value, no two digests are equal."""
    digest = hashlib.blake2b(digest_size=16)
    leaves, structure = tree_flatten(value)
    for each in (str(structure), *leaves):
        if isinstance(each, Tensor):
            digest.update(f"{each.dtype} {tuple(each.shape)} {each.device} ".encode())
            values = torch.empty(each.numel(), dtype=each.dtype).copy_(each.detach().reshape(-1))
            digest.update(values.view(torch.uint8).numpy().tobytes())
        elif isinstance(each, PLAIN):
            digest.update(f"{each!r} ".encode())
        else:
            digest.update(secrets.token_bytes(16))
    return digest.digest()


@cache
def _argument_names(forward: Hashable) -> tuple[str, ...]:
    """The arguments of a network's `forward` without `self`."""
    assert callable(forward)
    return tuple(inspect.signature(forward).parameters)[1:]


def _role(name: str, value: Any, rows: int | None) -> Literal["rows", "time", "same"]:
    if rows is None or name in ARGUMENTS_WITHOUT_ROWS:
        return "same"
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        return "rows"
    if isinstance(value, list) and len(value) == rows:
        return "rows"
    is_number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    if name in TIME_ARGUMENTS and is_number:
        return "time"
    if name in ARGUMENTS_WITH_MORE_ROWS and isinstance(value, Tensor) and value.ndim and len(value) % rows == 0:
        return "rows"
    return "same"


def _shapes_without_batch(value: Any, rows: int) -> Hashable:
    """The shapes that batches of one kind have in common; a list of rows may hold several."""
    if isinstance(value, Tensor):
        return (value.dtype, value.device, len(value) // rows, *value.shape[1:])
    shapes = [str(_shapes_without_batch(each[None], 1) if isinstance(each, Tensor) else each) for each in value]
    distinct = frozenset(shapes)
    # A list of several plain values may be of another kind of parts, such as the scales of two ControlNets, in a call
    # that happens to have as many rows. Those of another call must not stand in for it.
    is_ambiguous = len(distinct) > 1 and not any(isinstance(each, Tensor) for each in value)
    return tuple(shapes) if is_ambiguous else distinct


def _joined(calls: Sequence[NetworkCall], index: int) -> Any:
    role, first = calls[0].leaves[index]
    values = [call.leaves[index].value for call in calls]
    if role == "same":
        return first
    if role == "time":
        device = first.device if isinstance(first, Tensor) else calls[0].device
        times = [torch.as_tensor(time, device=device).reshape(1) for time in values]
        return torch.cat([time.expand(call.rows or 1) for time, call in zip(times, calls, strict=True)])
    return torch.cat(values) if isinstance(first, Tensor) else [row for value in values for row in value]


def sizes_of(calls: Iterable[NetworkCall]) -> list[int]:
    """The rows of each call."""
    return [call.rows or 1 for call in calls]
