"""Arrays in JSON: a `.npy` file in base64."""

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray


def decode_array(text: str) -> NDArray[Any]:
    """The array of a base64-encoded `.npy` file.

    Raises:
        ValueError: not base64, not a whole `.npy` file, or one that would need a pickle.
    """
    file = io.BytesIO(base64.b64decode(text, validate=True))
    try:
        array: NDArray[Any] = np.load(file, allow_pickle=False)
    except (EOFError, OSError, SyntaxError) as error:
        raise ValueError(f"not a .npy file ({error})") from None
    if not isinstance(array, np.ndarray):
        raise ValueError("not a .npy file, but an archive")
    return array


def encode_array(array: NDArray[Any]) -> str:
    """The inverse of `decode_array`."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()
