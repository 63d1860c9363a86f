"""This training process among the others, and how it is asked to stop."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from patchscan.common.console import end_at_once
from patchscan.common.errors import UserError

# How long the others wait for what the first builds: the index of millions of files takes hours, and a first process
# that died ends the wait at once.
BUILDING_TIMEOUT = timedelta(days=1)

STOPPING = (signal.SIGTERM, signal.SIGINT)

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; one of one without torchrun."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: str | None) -> "Ranks":
        """Join the others: nccl on GPUs, gloo on CPUs."""
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if "RANK" not in os.environ:
            return cls(0, 1, torch.device(kind))
        # Until there is something to save: a Python handler would not run while torch waits for the other processes.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return cls(dist.get_rank(), dist.get_world_size(), torch.device(kind))

    def any(self, flag: bool) -> bool:
        """Whether any process says so; every process must ask at the same step."""
        return self.mean(float(flag)) > 0

    def first_then_all(self, read: Callable[[], T]) -> T:
        """`read()`, by the first process before the others, so that what it builds is built once. A UserError of the
        first is raised in all."""
        if self.world == 1:
            return read()
        group = dist.new_group(backend="gloo", timeout=BUILDING_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)  # every process is a member
        refused: list[UserError | None] = [None]
        if not self.rank:
            try:
                result = read()
            except UserError as error:
                refused = [error]
        dist.broadcast_object_list(refused, src=0, group=group)
        if refused[0]:
            raise refused[0]
        return read() if self.rank else result

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks; every process must ask at the same step."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def mean(self, value: float) -> float:
        """The mean over all processes; every process must ask at the same step."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / self.world


class Interrupt:
    """Remembers SIGTERM and Ctrl-C until the step is over; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in STOPPING:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            end_at_once(number, frame)
        self.asked = True


@contextmanager
def stopping_held() -> Iterator[None]:
    """SIGTERM and Ctrl-C wait until the end of this; in processes and threads that are begun meanwhile, for ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
