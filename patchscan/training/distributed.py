"""Coordinate the processes of one training run, and keep signals from those that load its images."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from patchscan.common.console import STOP_SIGNALS
from patchscan.common.errors import UserError
from patchscan.detector.device import DeviceError, check_device

# How long the other processes wait while the first works alone: it builds an index, which takes hours for millions of
# files, validates, or saves a checkpoint in a bucket. If the first process dies, the others stop waiting at once.
ALONE_TIMEOUT = timedelta(days=1)

# What torchrun sets for each process besides RANK.
LAUNCHED = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's rank among the `world` processes that torchrun started; rank 0 of 1 without torchrun."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: str | None) -> "Ranks":
        """Join the process group: nccl on GPUs, gloo on CPUs. `device` is cpu or cuda; None takes a GPU if there is
        one. Raises DeviceError where the device cannot be used."""
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(kind)
        if "RANK" not in os.environ:
            return cls(0, 1, torch.device(kind))
        _check_environment(kind)
        # A Python signal handler would not run while torch waits for the other processes, so SIGTERM ends this process
        # directly until there is something to save.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=ALONE_TIMEOUT)
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return cls(dist.get_rank(), dist.get_world_size(), torch.device(kind))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process. Every process must call this at the same step."""
        return self.mean(float(flag)) > 0

    def rank_zero_first(self, read: Callable[[], T]) -> T:
        """Call `read` in the first process and then in the others, so that what it builds is built only once.

        A UserError in the first process is raised in all of them.
        """
        if self.world == 1:
            return read()
        group = dist.new_group(backend="gloo", timeout=ALONE_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)  # every process is a member
        failure: list[UserError | None] = [None]
        if not self.rank:
            try:
                result = read()
            except UserError as error:
                failure = [error]
        dist.broadcast_object_list(failure, src=0, group=group)
        if failure[0]:
            raise failure[0]
        return read() if self.rank else result

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in rank order. Every process must call this at the same step."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def mean(self, value: float) -> float:
        """Return the mean over all processes. Every process must call this at the same step."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / self.world


def _check_environment(kind: str) -> None:
    """Raise DeviceError where this process of several cannot join the others, or has no GPU."""
    if missing := [name for name in LAUNCHED if name not in os.environ]:
        raise DeviceError(
            f"RANK is set, but not {', '.join(missing)}: start several processes with `python -m "
            "patchscan.training.launch`, or unset RANK for one"
        )
    if kind == "cuda" and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise DeviceError(
            f"this machine has {torch.cuda.device_count()} GPUs, too few for process {os.environ['LOCAL_RANK']} (from "
            "0): lower --nproc-per-node"
        )


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block SIGTERM and Ctrl-C until the end of the block. Processes and threads started inside it inherit the blocked
    signals and never unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
