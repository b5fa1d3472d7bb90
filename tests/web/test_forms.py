"""The form for tuning, as requests for jobs."""

from typing import Any

import pytest
from pydantic import ValidationError

from service.web.forms import TuningForm


def asked(sizes: str) -> list[tuple[Any, Any, Any]]:
    form = TuningForm.model_validate({"model": "m", "num_steps": ["4, 6"], "sizes": sizes})
    return [(request.height, request.width, request.sizes) for request in form.requests()]


def test_one_size_is_a_height_and_a_width_and_several_are_sizes() -> None:
    assert asked("") == [(None, None, None)] * 2
    assert asked(" 768 x 1024 ") == [(768, 1024, None)] * 2
    assert asked("768x1024, 1024×768") == [(None, None, [[768, 1024], [1024, 768]])] * 2


@pytest.mark.parametrize("sizes", ["768", "768x", "x1", "768x1024;1x2", "0x8", "-8x8", "768x1024x3"])
def test_what_is_no_size_is_refused(sizes: str) -> None:
    with pytest.raises(ValidationError, match="sizes"):
        asked(sizes)
