"""One function over many items on several processes, with few items in flight and results as they come."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from patchscan.common.errors import UserError

CHUNK = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> Generator[tuple[Item, Result]]:
    """Pairs of item and `function(item)`, in no particular order; `workers` None takes one process a core. Closing it
    ends the processes.

    `function` must be a module's own (or a partial of one). With one worker, or no more than one chunk of work,
    everything runs in this process. Raises what `function` raises, and UserError where a worker process dies.
    """
    workers = workers or os.cpu_count() or 1
    if workers == 1 or len(items) <= CHUNK:
        yield from ((item, function(item)) for item in items)
        return
    chunks = iter([items[start : start + CHUNK] for start in range(0, len(items), CHUNK)])
    # Spawned, not forked: a fork copies the locks of whatever threads this process runs, in whatever state.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_obey_the_parent) as pool:
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
                "a worker process died (out of memory, or killed): what is done is kept; "
                "run the same command again, with fewer --workers if memory was short"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _obey_the_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it even where it was killed outright."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(function: Callable[[Item], Result], chunk: Sequence[Item]) -> list[Result]:
    return [function(item) for item in chunk]
