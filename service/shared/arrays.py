"""Arrays in JSON: a `.npy` file in base64."""

import base64
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def decode_array(text: str) -> NDArray[Any]:
    """The array of a base64-encoded `.npy` file.

    Raises:
        ValueError: not base64, not a whole `.npy` file, or one that would need a pickle.
    """
    content = base64.b64decode(text, validate=True)
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = read_header[version](file)
    except Exception as error:  # NumPy's parser of headers lets errors of many types through.
        raise ValueError(f"not a .npy file ({error})") from None
    # The header may claim any size, so the actual size is compared before anything is allocated.
    data = content[file.tell() :]
    if dtype.hasobject or dtype.itemsize == 0 or min(shape, default=1) < 0:
        raise ValueError(f"a .npy file of {dtype} and shape {shape}")
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a .npy file of {len(data)} bytes for shape {shape}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C").copy()


def encode_array(array: NDArray[Any]) -> str:
    """The inverse of `decode_array`."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()
