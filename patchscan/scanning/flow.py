"""Limit the work of a scan worker: threads that can be stopped, a budget of bytes in memory, a window of requests at
the server, and batches of crops."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TypeVar

import numpy as np

from patchscan.common.retries import StoppedError, TransientError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int, stop: threading.Event, drain_s: float
) -> Iterator[Result]:
    """Yield the results of `function` for each item, as they come, from `threads` threads.

    An exception from `function` is raised, and no item is started after it. After `stop` is set no item is started
    either; results of the running ones are yielded for up to `drain_s` seconds, then StoppedError is raised.
    """
    todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    results: queue.SimpleQueue[Result | Exception] = queue.SimpleQueue()
    halt = threading.Event()

    def run() -> None:
        while not stop.is_set() and not halt.is_set():
            try:
                results.put(function(todo.get_nowait()))
            except (queue.Empty, StoppedError):
                return
            except Exception as error:  # noqa: BLE001  raised again where the results are consumed
                halt.set()
                results.put(error)

    # Daemon threads: one that hangs in a request must not keep a stopped scan from ending.
    workers = [threading.Thread(target=run, daemon=True) for _ in range(min(threads, len(items)))]
    for thread in workers:
        thread.start()
    remaining, drained_at = len(items), float("inf")
    try:
        while remaining:
            if stop.is_set():
                drained_at = min(drained_at, time.monotonic() + drain_s)
            give_up = time.monotonic() > drained_at or not any(thread.is_alive() for thread in workers)
            try:
                result = results.get(timeout=0.2)
            except queue.Empty:
                if give_up:
                    raise StoppedError from None
                continue
            if isinstance(result, Exception):
                raise result
            remaining -= 1
            yield result
    finally:
        halt.set()


class ByteBudget:
    """A semaphore that counts bytes: at most `total` are held at once; a larger image waits until it can be held
    alone."""

    def __init__(self, total: int):
        self.total = total
        self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes are free and hold them."""
        size = min(size, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


class Window:
    """Limit the requests in flight, between 1 and `largest`: one more after each window of answers, half as many when
    the server is busy (additive increase, multiplicative decrease)."""

    # The requests of one overload fail together: within this time they halve the window only once.
    SETTLE_S = 1.0

    def __init__(self, start: int, largest: int):
        self.size = float(max(1, min(start, largest)))
        self.largest = largest
        self._in_flight = 0
        self._shrunk = 0.0
        self._changed = threading.Condition()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Wait for a free place and hold it for one request. A TransientError in the block means that the server is
        busy."""
        with self._changed:
            self._changed.wait_for(lambda: self._in_flight < int(self.size))
            self._in_flight += 1
        busy = False
        try:
            yield
        except TransientError:
            busy = True
            raise
        finally:
            with self._changed:
                self._adapt(busy)
                self._in_flight -= 1
                self._changed.notify_all()

    def _adapt(self, busy: bool) -> None:
        now = time.monotonic()
        if not busy:
            self.size = min(self.size + 1 / self.size, float(self.largest))
        elif now - self._shrunk > self.SETTLE_S:
            self.size, self._shrunk = max(1.0, self.size / 2), now


class Batcher:
    """Collect the crops of many threads into few calls of `score`, each with at most `size` images."""

    def __init__(self, score: Callable[[Sequence[np.ndarray]], list[float]], senders: int, size: int):
        self._score, self._size = score, size
        self._waiting: queue.SimpleQueue[tuple[np.ndarray, Future[float]]] = queue.SimpleQueue()
        for _ in range(senders):
            threading.Thread(target=self._send, daemon=True).start()

    def logit(self, crops: np.ndarray) -> float:
        """Return the logit of one image's crops, uint8 (count, size, size, 3). Raises what `score` raised for its
        batch."""
        future: Future[float] = Future()
        self._waiting.put((crops, future))
        return future.result()

    def _send(self) -> None:
        while True:
            batch = [self._waiting.get()]
            with suppress(queue.Empty):
                while len(batch) < self._size:
                    batch.append(self._waiting.get_nowait())
            try:
                answered = list(zip(batch, self._score([crops for crops, _ in batch]), strict=True))
            except Exception as error:  # noqa: BLE001  each waiting thread raises it for its own image
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), logit in answered:
                    future.set_result(logit)
