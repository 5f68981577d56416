"""Copies between the host and an accelerator that neither of them waits for.

With CUDA (or ROCm, which torch calls the same) they go through pinned memory, on streams of their own, so that they overlap
with what the device computes. On other devices they are ordinary copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from crossdiff.shapes import Tensor

CPU = torch.device("cpu")


def is_asynchronous(device: torch.device) -> bool:
    """Whether the device computes while the host continues, and can copy meanwhile."""
    return device.type == "cuda"


@cache
def _stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, in the order of its other work; the host does not wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if is_asynchronous(device) else tensor.to(device)


class ToHost:
    """Tensors of one device on their way to the host. Their copies begin when what computes them is finished."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._sent = tensors  # their memory must not be used again before they are copied
        self._done: torch.cuda.Event | None = None
        device = tensors[0].device
        if not is_asynchronous(device):
            self._received = [tensor.cpu() for tensor in tensors]
            return
        stream = _stream(device, "to the host")
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._received = [
                torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True) for tensor in tensors
            ]
            self._done = stream.record_event()

    def wait(self) -> list[Tensor]:
        """The copies, once they are complete."""
        if self._done is not None:
            self._done.synchronize()
        self._sent = ()
        return self._received


class ToDevice:
    """A tensor on its way to a device."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._done: torch.cuda.Event | None = None
        if not is_asynchronous(device):
            self._received = tensor.to(device)
            return
        stream = _stream(device, "to the device")
        with torch.cuda.stream(stream):
            self._received = tensor.pin_memory().to(device, non_blocking=True)
            self._done = stream.record_event()

    def wait(self) -> Tensor:
        """The copy, which the device's later work waits for, and the host does not."""
        if self._done is not None:
            current = torch.cuda.current_stream(self._received.device)
            current.wait_event(self._done)
            self._received.record_stream(current)  # its memory belongs to the other stream
        return self._received
