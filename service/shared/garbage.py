"""Garbage collection, held back while modules are imported and models are loaded."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Collect no garbage until the context ends.

    Importing makes many objects that stay. Each collection meanwhile walks through all of them and frees nothing, which
    is a quarter of the time that PyTorch and diffusers take.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
