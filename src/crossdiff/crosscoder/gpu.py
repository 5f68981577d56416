"""Whether tensors are on a GPU that Triton compiles for, and the kernels if they are."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

from crossdiff.shapes import Tensor


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_kernels(tensor: Tensor) -> bool:
    """Whether there are kernels for the tensor's device. Without them, torch's own operations do the same work."""
    return tensor.is_cuda and _has_triton()


def kernels() -> ModuleType:
    """The kernels; Triton is imported with the first use."""
    from crossdiff.crosscoder import triton_kernels

    return triton_kernels
