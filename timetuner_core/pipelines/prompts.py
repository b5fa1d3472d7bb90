"""Prompts that are too long: a pipeline would cut them off, and the image would be another one than was asked for."""

import inspect
from collections.abc import Mapping
from typing import Any

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
MAX_SEQUENCE_LENGTH = "max_sequence_length"


def check_prompt_lengths(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Refuse texts that no text encoder of the pipeline takes whole.

    An encoder takes as many tokens as its tokenizer says, and at most `max_sequence_length` where the call has that.
    Where several encoders get the same text, the longest limit counts: Flux and Stable Diffusion 3 give CLIP the
    beginning of what T5 reads whole.

    Args:
        call: arguments of the pipeline's call.

    Raises:
        ValueError: which text, its tokens, and the limit. The text itself is not repeated.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    most = call.get(MAX_SEQUENCE_LENGTH)
    if most is None and MAX_SEQUENCE_LENGTH in parameters:
        most = parameters[MAX_SEQUENCE_LENGTH].default
    for kind in ("prompt", "negative_prompt"):
        readers: dict[str, list[Any]] = {}  # The tokenizers that read each argument.
        for number, name in enumerate(TOKENIZERS, 1):
            tokenizer = getattr(pipeline, name, None)
            own = kind if number == 1 else f"{kind}_{number}"
            argument = own if call.get(own) is not None else kind
            if hasattr(tokenizer, "model_max_length") and isinstance(call.get(argument), str):
                readers.setdefault(argument, []).append(tokenizer)
        for argument, tokenizers in readers.items():
            _check(argument, call[argument], tokenizers, most if isinstance(most, int) else None)


def _check(argument: str, text: str, tokenizers: list[Any], most: int | None) -> None:
    found = []
    for tokenizer in tokenizers:
        limit = tokenizer.model_max_length if most is None else min(tokenizer.model_max_length, most)
        num_tokens = len(tokenizer(text, truncation=False, verbose=False)["input_ids"])
        if num_tokens <= limit:
            return
        found.append((limit, num_tokens))
    limit, num_tokens = max(found)
    raise ValueError(f"{argument} has {num_tokens} tokens; accepted: up to {limit}, its start and end among them")
