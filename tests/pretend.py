"""A pretend accelerator: tensors on a device of their own whose numbers are in ordinary memory, for machines without a GPU.
Where there is one, the same tests use it.

Within `accelerator()`, factories and `.to(device)` make such tensors. They compute what the CPU computes, and refuse what CUDA
refuses: to meet a tensor of the CPU other than a single number, to become an array of numpy, or to index a tensor of the CPU.

    with accelerator() as device:
        crosscoder.to(device).sparse_code(x.to(device))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch cannot have a device that is written in Python", allow_module_level=True)

NAME = "pretend"
aten = torch.ops.aten
ACROSS = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
"""Operations whose tensors may be on different devices."""
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations `op(self, indices, ...)` whose indices may be on the CPU while `self` is on the device."""


class _Module(backend_registration._DummyBackendModule):  # type: ignore[no-untyped-call]
    """What torch asks about the device; it is found by `auto` only within `accelerator()`."""

    found = False

    def is_available(self) -> bool:
        return self.found


class OnDevice(torch.Tensor):
    """A tensor on the pretend device; `inner` has its numbers."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.inner!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Makes what is created on the device, or moved to it, an `OnDevice`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _strangers(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of an operation that keep it from running on one device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    plain = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    wrapped = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    if func in ACROSS or not plain or not wrapped:
        return []
    if func in INDEXED:
        given = [value for value in args[2:3] if isinstance(value, torch.Tensor) and value.ndim]
        own = isinstance(args[0], OnDevice)
        indices = [] if own else [index for index in args[1] if isinstance(index, OnDevice)]
        return indices + [value for value in given if isinstance(value, OnDevice) != own]
    if func._schema.is_mutable and not isinstance(args[0], OnDevice):
        return wrapped
    return [tensor for tensor in plain if tensor.ndim]


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers, and give the result the device that CUDA would give it."""
    if _strangers(func, args, kwargs):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, in {func}")
    device = kwargs.get("device")
    if device is not None:
        on_device = torch.device(device).type == NAME
    elif func in ACROSS or func in INDEXED:
        on_device = isinstance(args[0], OnDevice)
    else:
        on_device = any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))
    own_args, own_kwargs = tree_map_only(OnDevice, lambda tensor: tensor.inner, (args, kwargs))
    out = func(*own_args, **(own_kwargs if device is None else own_kwargs | {"device": torch.device("cpu")}))
    if not on_device:
        return out
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, OnDevice, out))


@cache
def _module() -> _Module:
    """Make the device known to torch, which cannot forget it again."""
    module = _Module()
    backend_registration._setup_privateuseone_for_python_backend(NAME, module)
    return module


@contextmanager
def accelerator() -> Iterator[torch.device]:
    """Within the block, there is one accelerator, the device that this yields: a GPU if there is one, else the pretend one."""
    if torch.cuda.is_available():
        # The encoder multiplies in float32, so that results can be compared with those of the CPU.
        with patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor):
            yield torch.device("cuda", 0)
        return
    module = _module()
    before = torch._C._only_lift_cpu_tensors()
    module.found = True
    torch._C._set_only_lift_cpu_tensors(True)  # what `torch.tensor` makes passes through the mode on its way to a device
    try:
        # The engine of autograd has no thread of its own for the device.
        with torch.autograd.set_multithreading_enabled(False), _Mode():
            yield torch.device(NAME, 0)
    finally:
        module.found = False
        torch._C._set_only_lift_cpu_tensors(before)
