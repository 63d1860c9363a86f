"""How work flows through a scan worker: threads that can be stopped, and three throttles: bytes held in memory,
requests under way at the server, and batches of crops."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from patchscan.common.retries import StoppedError, TransientError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int, stop: threading.Event, drain_s: float
) -> Iterator[Result]:
    """The results of `function` for each item, as they come, from `threads` threads.

    What `function` raises ends it. After `stop` is set no item is begun; results of those under way are given for up to
    `drain_s` seconds, then StoppedError is raised.
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
            except queue.Empty:
                return
            except Exception as error:  # noqa: BLE001  raised again where the results are consumed
                results.put(error)

    # Daemons: a thread that hangs in a request must not keep a stopped scan from ending.
    crew = [threading.Thread(target=run, daemon=True) for _ in range(min(threads, len(items)))]
    for thread in crew:
        thread.start()
    left, drained_at = len(items), float("inf")
    try:
        while left:
            if stop.is_set():
                drained_at = min(drained_at, time.monotonic() + drain_s)
            over = time.monotonic() > drained_at or not any(thread.is_alive() for thread in crew)
            try:
                result = results.get(timeout=0.2)
            except queue.Empty:
                if over:
                    raise StoppedError from None
                continue
            if isinstance(result, Exception) and not isinstance(result, StoppedError):
                raise result
            if not isinstance(result, Exception):
                left -= 1
                yield result
    finally:
        halt.set()


class ByteBudget:
    """A semaphore on bytes: encoded images held at once stay under `total`; a larger one passes alone."""

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
    """How many requests may be under way: one more for each windowful of answers, half as many when the server is busy
    (additive increase, multiplicative decrease), between 1 and `largest`."""

    # Requests of one overload fail together; they count as one sign.
    SETTLE_S = 1.0

    def __init__(self, start: int = 8, largest: int = 64):
        self.size = float(max(1, min(start, largest)))
        self.largest = largest
        self._under_way = 0
        self._shrunk = 0.0
        self._changed = threading.Condition()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Wait for a place and hold it for one request; TransientError raised within means that the server is busy."""
        with self._changed:
            self._changed.wait_for(lambda: self._under_way < int(self.size))
            self._under_way += 1
        busy = False
        try:
            yield
        except TransientError:
            busy = True
            raise
        finally:
            with self._changed:
                self._adapt(busy)
                self._under_way -= 1
                self._changed.notify_all()

    def _adapt(self, busy: bool) -> None:
        now = time.monotonic()
        if not busy:
            self.size = min(self.size + 1 / self.size, float(self.largest))
        elif now - self._shrunk > self.SETTLE_S:
            self.size, self._shrunk = max(1.0, self.size / 2), now


class Batcher:
    """Joins the crops of many threads into few calls of `score`, each of at most `size` images."""

    def __init__(self, score: Callable[[Sequence[np.ndarray]], list[float]], senders: int, size: int):
        self._score, self._size = score, size
        self._waiting: queue.SimpleQueue[tuple[np.ndarray, Future[float]]] = queue.SimpleQueue()
        for _ in range(senders):
            threading.Thread(target=self._send, daemon=True).start()

    def logit(self, crops: np.ndarray) -> float:
        """The logit of one image's crops, uint8 (count, size, size, 3); raises what `score` raised for its batch."""
        future: Future[float] = Future()
        self._waiting.put((crops, future))
        return future.result()

    def _send(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < self._size and not self._waiting.empty():
                try:
                    batch.append(self._waiting.get_nowait())
                except queue.Empty:
                    break
            try:
                logits = self._score([crops for crops, _ in batch])
            except Exception as error:  # noqa: BLE001  each waiting thread raises it for its own image
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), logit in zip(batch, logits, strict=True):
                    future.set_result(logit)
