"""Several images by one run of a pipeline, which takes lists of prompts and generators in place of one of each.

A run has work of its own beside the network: it encodes, steps its scheduler and decodes. One run does that once for
all its images.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from timetuner_core.pipelines.joining import PLAIN, Leaf, NetworkCall, content_of
from timetuner_core.pipelines.shared_calls import Request, SharedCalls, differ_by_rounding, has_state

PROMPTS = ("prompt", "negative_prompt")
# Prompts of different lengths show whether a pipeline pads the shorter one, and hides the padding from the network.
TRIED_PROMPTS = ("a", "a red square on a table, and a blue circle beside it")


def arguments_in_common(call: Mapping[str, Any]) -> Hashable | None:
    """The arguments that have to agree between calls that one run may make: all but their prompts.

    Returns:
        None for a call without a prompt, or with images and other values that are not plain: it has a run of its own.
    """
    others = {name: value for name, value in call.items() if not _is_prompt(name, value)}
    if len(others) == len(call) or not all(isinstance(value, PLAIN) for value in others.values()):
        return None
    return (*sorted(others.items(), key=lambda item: item[0]), *sorted(call.keys() - others.keys()))


def call_of_several(calls: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """The call of one run that makes the images of several calls, whose `arguments_in_common` are equal."""
    first, *others = calls
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if not others:
        return {**first, "generator": generators[0]}
    prompts = {name: [call[name] for call in calls] for name, value in first.items() if _is_prompt(name, value)}
    return {**first, **prompts, "generator": generators}


def takes_several(shared: SharedCalls, call: Mapping[str, Any], new_scheduler: Callable[[], Any]) -> bool:
    """Whether a run of two images asks the network for what two runs ask it for, with prompts of different lengths.

    Each of the three runs ends at its first call of the network, which is not made.

    Args:
        call: arguments of a run, with a prompt.
    """
    if any(map(has_state, shared.networks.values())):
        return False
    calls = [
        {name: prompt if _is_prompt(name, call[name]) else call[name] for name in call} for prompt in TRIED_PROMPTS
    ]
    seeds = range(len(calls))
    try:
        alone = [
            shared.first_call(Request(call_of_several([each], [seed]), new_scheduler()))
            for each, seed in zip(calls, seeds, strict=True)
        ]
        together = shared.first_call(Request(call_of_several(calls, seeds), new_scheduler()))
    except Exception:  # Pipelines have errors of their own for lists that they do not take.
        return False
    return _are_same_rows(together, alone)


def _is_prompt(name: str, value: Any) -> bool:
    return isinstance(value, str) and name.startswith(PROMPTS)


def _are_same_rows(together: NetworkCall, alone: Sequence[NetworkCall]) -> bool:
    """Whether a call has the rows of several calls in the order that guidance has: all unguided ones come first."""
    first = alone[0]
    if first.rows is None or together.rows != sum(call.rows or 0 for call in alone):
        return False
    if any(call.arguments != together.arguments or call.positional != together.positional for call in alone):
        return False
    return all(
        _is_same_leaf(together.leaves[index], [call.leaves[index] for call in alone], first.rows)
        for index in range(len(together.leaves))
    )


def _is_same_leaf(together: Leaf, alone: Sequence[Leaf], rows: int) -> bool:
    if any(leaf.role != together.role for leaf in alone):
        return False
    values = [leaf.value for leaf in alone]
    if together.role != "rows":
        return all(content_of(value) == content_of(together.value) for value in values)
    if isinstance(together.value, list):
        expected: Any = [value[row] for row in range(rows) for value in values]
        return len(expected) == len(together.value) and all(
            _is_close(each, own) for each, own in zip(expected, together.value, strict=True)
        )
    if len({value.shape for value in values}) > 1:
        return False
    expected = torch.stack([value.reshape(rows, -1, *value.shape[1:]) for value in values], dim=1).flatten(0, 2)
    return _is_close(expected, together.value)


def _is_close(expected: Any, value: Any) -> bool:
    """Whether tensors differ by rounding alone, as encoders' answers do by the batch they are in."""
    if not isinstance(expected, Tensor) or not isinstance(value, Tensor):
        return content_of(expected) == content_of(value)
    if expected.shape != value.shape or expected.dtype != value.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, value)
    return differ_by_rounding(expected, value, value.dtype)
