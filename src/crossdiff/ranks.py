"""The processes that share one command: one is the usual case, `torchrun` starts more, on one machine or on many.

All of them go through the same code and see the same files. What differs is which part of the work is theirs; what they have
to know of each other goes through the collectives here, which cost nothing where there is one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from crossdiff.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from crossdiff.shapes import Tensor

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long the ranks wait for the first, which may have work of its own."""
TIMEOUT = timedelta(minutes=30)
"""After so long without an answer a rank is taken for lost; one whose process ended is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """Some processes and which of them this one is. A method that speaks to the others is to be called by all of them."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes what is written once."""
        return self.rank == 0

    def part(self, n: int) -> slice:
        """This rank's share of `n` things in a row, as `torch.chunk` and DTensor's `Shard` cut."""
        step = -(-n // self.size)
        return slice(min(n, self.rank * step), min(n, (self.rank + 1) * step))

    def has(self, index: int) -> bool:
        """Whether the thing of this number is this rank's, where they are dealt out in turn."""
        return index % self.size == self.rank

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier(self.group, timeout=PATIENCE)

    def agree(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        told = [value]
        dist.broadcast_object_list(told, group_src=0, group=self.group)
        return told[0]

    def once(self, work: Callable[[], T]) -> T:
        """The result of what the first rank alone does, on every rank."""
        done = [work()] if self.is_first else []
        self.wait()
        return self.agree(done)[0]

    def collect(self, value: T) -> list[T]:
        """Every rank's value, on the first one; nothing on the others."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, found, group_dst=0, group=self.group)
        return found or []

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, self.group)
        return found

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Each flag, true where it is on one rank."""
        if self.size == 1:
            return list(flags)
        import torch

        return [bool(flag) for flag in self.maximum(torch.tensor(flags, dtype=torch.int8)).tolist()]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, group=self.group)
        return tensor

    def total(self, number: float | int) -> float:
        """The sum of every rank's number; exact for whole ones."""
        if self.size == 1:
            return float(number)
        import torch

        return float(self.sum(torch.tensor(number, dtype=torch.float64)))

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks, in place."""
        return self.sum(tensor).div_(self.size) if self.size > 1 else tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """The largest over the ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, dist.ReduceOp.MAX, self.group)
        return tensor

    def stack(self, tensor: Tensor) -> Tensor:
        """`[rank, ...]`: every rank's tensor, all of the same shape."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        import torch.distributed as dist

        out = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(out.unbind()), tensor.contiguous(), self.group)
        return out

    def lists(self, values: Tensor) -> list[Tensor]:
        """Every rank's 1-D tensor, whatever its length."""
        if self.size == 1:
            return [values]
        import torch

        lengths = self.stack(torch.tensor(len(values), device=values.device)).tolist()
        padded = values.new_zeros(max(lengths))
        padded[: len(values)] = values
        return [row[:length] for row, length in zip(self.stack(padded), lengths, strict=True)]


ALONE = Ranks()


def leads() -> bool:
    """Whether this is the first process that `torchrun` started, or the only one; known without joining the others."""
    return os.environ.get("RANK", "0") == "0" or "TORCHELASTIC_RUN_ID" not in os.environ


def current() -> Ranks:
    """The processes that `torchrun` started, joined the first time this is asked; one alone without it.

    Raises:
        UserError: they could not join again after a restart.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return ALONE
    import torch.distributed as dist

    if not dist.is_initialized():
        _join()
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def _join() -> None:
    """Form the process group.

    torchrun's own store outlives the processes that it restarts (pytorch issue 135712), and what those have left there must not
    be taken for news. Each restart gets a prefix of its own; but several machines count their restarts each for itself.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        elif os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            raise UserError(
                "torchrun on several machines can restart nothing while its processes share its store; set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it, or leave --max-restarts away"
            )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
