"""The processes (ranks) that share one command: usually one; `torchrun` starts more, on one machine or on several.

All ranks run the same code and see the same files; each does its own part of the work. They communicate only through the
collectives here, which cost nothing when there is a single process.
"""

from __future__ import annotations

import atexit
import os
import sys
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
"""How long the ranks wait for the first one, which may have work of its own."""
TIMEOUT = timedelta(minutes=30)
"""A rank that does not answer for this long counts as lost; one whose process ended is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """A group of processes and this process's rank in it. A method that communicates must be called by all of them."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank, which does what is done once."""
        return self.rank == 0

    def part(self, n: int) -> slice:
        """This rank's share of `n` items, split the way `torch.chunk` and DTensor's `Shard` do."""
        step = -(-n // self.size)
        return slice(min(n, self.rank * step), min(n, (self.rank + 1) * step))

    def has(self, index: int) -> bool:
        """Whether this item belongs to this rank when items are dealt out in turn."""
        return index % self.size == self.rank

    def wait(self) -> None:
        """Wait until every rank has arrived."""
        if self.group is None:
            return
        import torch
        from torch.distributed.distributed_c10d import BarrierOptions

        options = BarrierOptions()  # torch.distributed.barrier takes no timeout before torch 2.13
        options.device = torch.device("cpu")
        options.timeout = PATIENCE
        self.group.barrier(options).wait()

    def agree(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        told = [value]
        dist.broadcast_object_list(told, group_src=0, group=self.group)
        return told[0]

    def once(self, work: Callable[[], T]) -> T:
        """Let the first rank do some work, and return its result on every rank."""
        done = [work()] if self.is_first else []
        self.wait()
        return self.agree(done)[0]

    def collect(self, value: T) -> list[T]:
        """Every rank's value, on the first rank; an empty list on the others."""
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
        """For each flag, whether it is true on any rank."""
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
        """The sum of every rank's number; exact for integers."""
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
        """Every rank's 1-D tensor; the lengths may differ."""
        if self.size == 1:
            return [values]
        import torch

        lengths = self.stack(torch.tensor(len(values), device=values.device)).tolist()
        padded = values.new_zeros(max(lengths))
        padded[: len(values)] = values
        return [row[:length] for row, length in zip(self.stack(padded), lengths, strict=True)]


ALONE = Ranks()


def leads() -> bool:
    """Whether this is the first process that `torchrun` started, or the only one, without joining the others."""
    return os.environ.get("RANK", "0") == "0" or "TORCHELASTIC_RUN_ID" not in os.environ


def current() -> Ranks:
    """The processes that `torchrun` started, which join at the first call; a single one without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return ALONE
    import torch.distributed as dist

    if not dist.is_initialized():
        _join()
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def _join() -> None:
    """Form the process group.

    torchrun's own store outlives the processes that it restarts (pytorch issue 135712), and what those left there must not be
    mistaken for new messages. Each restart gets its own prefix, but machines count their restarts separately.
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
                "torchrun cannot restart processes on several machines while they share its store; set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or omit --max-restarts"
            )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)


def leave() -> None:
    """End this process, which has succeeded, if it is one of several ranks; otherwise do nothing.

    At the end of the interpreter, threads of libraries can meet what is gone already and abort the process, and `torchrun`
    would take that for a failure.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or "torch.distributed" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)
