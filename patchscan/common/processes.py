"""Map a function over many items in several processes, with few items in flight, yielding results as they come; and
say how many CPUs there are."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from patchscan.common.cgroups import control_groups
from patchscan.common.errors import UserError

# Items handed to a process at once.
CHUNK = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None
) -> Generator[tuple[Item, Result]]:
    """Yield pairs of item and `function(item)`, in no particular order. `workers` None starts one process for each
    core; closing the generator ends the processes.

    `function` must be defined at the top level of a module (or be a partial of such a function), so that it can be
    pickled. With one worker, or no more than CHUNK items, everything runs in this process. Raises what `function`
    raises, and UserError where a worker process dies.
    """
    workers = workers or available_cpus()
    if workers == 1 or len(items) <= CHUNK:
        yield from ((item, function(item)) for item in items)
        return
    chunks = iter([items[start : start + CHUNK] for start in range(0, len(items), CHUNK)])
    # Spawned, not forked: a fork copies the locks that other threads of this process hold, and nobody releases them.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_init_worker) as pool:
        running: dict[Future[list[Result]], Sequence[Item]] = {}
        try:
            while True:
                while len(running) < 2 * workers and (chunk := next(chunks, None)) is not None:
                    running[pool.submit(_run, function, chunk)] = chunk
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield from zip(running.pop(future), future.result(), strict=True)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died (out of memory, or killed): finished work is kept; "
                "run the same command again, with fewer --workers if memory was short"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _init_worker() -> None:
    """Leave Ctrl-C to the parent process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Have this process, which multiprocessing started, exit when its parent exits, even where that was killed with
    SIGKILL, or before this call."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_exit() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def _run(function: Callable[[Item], Result], chunk: Sequence[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def available_cpus() -> int:
    """Return how many CPUs this process may use: the smallest of its affinity and its control groups' quotas, at least
    1."""
    quotas = [quota for quota in map(_quota, control_groups("cpu")) if quota is not None]
    return min([len(os.sched_getaffinity(0)), *quotas])


def _quota(group: Path) -> int | None:
    """The whole CPUs, at least 1, that a group may use, of version 2 or 1; None where it states no limit."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            limit, period = " ".join((group / file).read_text() for file in files).split()
        except OSError:
            continue
        return None if limit in ("max", "-1") else max(1, int(limit) // int(period))
    return None
