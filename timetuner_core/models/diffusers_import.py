"""Importing diffusers without the parts of other packages that it brings but that networks do not need."""

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any
from unittest import mock

import torch

# Modules that diffusers imports for schedulers and attention kernels which are not used here.
HARDLY_USED = (("scipy", "stats"), ("scipy", "integrate"), ("torch.nn.attention", "flex_attention"))

_lock = threading.RLock()


def diffusers_class(name: str, *, compiler: bool = False) -> Any:
    """A class of diffusers by name. Import all classes by this function.

    A plain `from diffusers import UNet2DModel` also imports `torch._dynamo`, the compiler, `scipy.stats` and more.
    That takes longer than all the rest, and no network needs it. `HARDLY_USED` modules are imported when they are used.

    Args:
        compiler: leave the compiler in, for networks that `torch.compile` will be called on.

    Raises:
        AttributeError: no such class.
    """
    with _lock:
        for package, module in HARDLY_USED:
            _import_when_used(package, module)
        if compiler or "torch._dynamo" in sys.modules:
            return _from_diffusers(name)
        with _no_compiler():
            return _from_diffusers(name)


class _ImportedWhenUsed(ModuleType):
    """Stands in for a module until one of its attributes is asked for.

    The standard library's `LazyLoader` is of no use here: `inspect.getmodule` asks every module for `__file__`.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def _import_when_used(package: str, name: str, path: str | None = None) -> None:
    """Put a stand-in for a submodule into place, unless that is imported already.

    Args:
        path: where the modules of a package are. They are then imported without the package's `__init__`.
    """
    full_name = f"{package}.{name}"
    if full_name in sys.modules:
        return
    module = _ImportedWhenUsed(full_name)
    if path is not None:
        module.__path__ = [path]
    sys.modules[full_name] = module
    setattr(importlib.import_module(package), name, module)


def _from_diffusers(name: str) -> Any:
    """A class of diffusers; of its transformers, of which there are a hundred, only those that the class needs."""
    diffusers = importlib.import_module("diffusers")
    _import_when_used("diffusers.models", "transformers", f"{diffusers.__path__[0]}/models/transformers")
    return getattr(diffusers, name)


class _Hiding(MetaPathFinder):
    """Hides a module from the imports of the thread that made this; other threads may import it meanwhile."""

    def __init__(self, hidden: str) -> None:
        self._hidden = hidden
        self._thread = threading.get_ident()

    def find_spec(self, fullname: str, _path: Any, _target: Any = None) -> None:
        """Raises: ImportError, for the hidden module."""
        if fullname == self._hidden and threading.get_ident() == self._thread:
            raise ImportError(f"{fullname} is hidden", name=fullname)


@contextmanager
def _no_compiler() -> Iterator[None]:
    """Have diffusers take PyTorch for one without a compiler, which it knows how to do without.

    diffusers marks some functions as not to be compiled. A mark changes nothing where nothing is compiled, so the
    decorator gives back the function.
    """
    hiding = _Hiding("torch._dynamo")
    sys.meta_path.insert(0, hiding)
    try:
        with mock.patch.object(torch.compiler, "disable", _unmarked):
            yield
    finally:
        sys.meta_path.remove(hiding)


def _unmarked(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return _unmarked if function is None else function
