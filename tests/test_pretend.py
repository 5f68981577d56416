"""The pretend accelerator refuses what CUDA refuses, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from crossdiff.models.loading import choose_device
from pretend import accelerator

HOST = torch.arange(12.0).view(3, 4)
ROW, WHICH = torch.tensor([0, 2]), torch.tensor([True, False, True])
REFUSED: dict[str, Callable[[torch.Tensor, torch.device], object]] = {
    "a sum of two devices": lambda own, device: own + HOST,
    "an array of numpy": lambda own, device: own.numpy(),
    "an index on the device of a tensor on the host": lambda own, device: HOST[ROW.to(device)],
    "rows of the host written into the device": lambda own, device: own.index_put_((ROW,), HOST[:2]),
    "an accumulator on the host": lambda own, device: torch.zeros(4).index_add_(0, ROW.to(device), own[0, :2]),
    "a number of the device added to the host": lambda own, device: HOST.clone().add_(own.sum()),
    "index_select with an index on the host": lambda own, device: own.index_select(0, ROW),
    "a mask on the host of where": lambda own, device: torch.where(HOST > 1, own, 0.0),
}
ALLOWED: dict[str, Callable[[torch.Tensor, torch.device], torch.Tensor]] = {
    "a number of the host": lambda own, device: own * torch.tensor(2.0),
    "an index on the host": lambda own, device: own[ROW],
    "a mask on the host": lambda own, device: own[WHICH],
    "a list as an index": lambda own, device: own[[1, 1]],
    "copying from the host": lambda own, device: own.clone().copy_(HOST + 1),
    "rows by index_fill": lambda own, device: own.clone().index_fill_(0, ROW.to(device), 7.0),
    "factories": lambda own, device: torch.full((2,), 3.0, device=device) + own.new_zeros(2),
    "a tensor from numbers": lambda own, device: torch.tensor([1.0, 2.0, 3.0, 4.0], device=device) + own,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(name: str) -> None:
    refusal = r"on the same device|should be either on cpu|numpy"
    with accelerator() as device, pytest.raises((RuntimeError, TypeError), match=refusal):
        REFUSED[name](HOST.to(device), device)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_gives_what_the_cpu_gives(name: str) -> None:
    with accelerator() as device:
        found = ALLOWED[name](HOST.to(device), device)
        assert found.device == device
        torch.testing.assert_close(found.cpu(), ALLOWED[name](HOST, torch.device("cpu")))


def test_gradients_flow_on_the_device_and_back_to_the_host() -> None:
    with accelerator() as device:
        weight = HOST.clone().requires_grad_()
        loss = (weight.to(device) @ HOST.T.to(device)).square().sum()
        loss.backward()
    (expected,) = torch.autograd.grad((other := HOST.clone().requires_grad_()).matmul(HOST.T).square().sum(), other)
    assert weight.grad is not None and torch.equal(weight.grad, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is always there")
def test_the_device_is_there_only_within_the_block() -> None:
    with accelerator() as device:
        assert choose_device("auto").type == device.type
    assert choose_device("auto") == torch.device("cpu")
