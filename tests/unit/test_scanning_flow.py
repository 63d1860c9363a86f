"""The throttles: they hold their limits under many threads, adapt to a busy server, and let go when stopped."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from patchscan.common.retries import Retries, StoppedError, TransientError
from patchscan.scanning.flow import Batcher, ByteBudget, Window, map_in_threads


class Peak:
    """The highest sum of what is held at once."""

    def __init__(self) -> None:
        self.now = self.highest = 0
        self._lock = threading.Lock()

    def add(self, amount: int) -> None:
        with self._lock:
            self.now += amount
            self.highest = max(self.highest, self.now)


def test_bytes_held_at_once_stay_under_the_budget() -> None:
    budget, peak = ByteBudget(100), Peak()

    def hold(size: int) -> None:
        with budget.hold(size):
            peak.add(min(size, 100))
            time.sleep(0.001)
            peak.add(-min(size, 100))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(hold, [30, 70, 1, 99, 500] * 20))
    assert 0 < peak.highest <= 100


def test_the_window_grows_with_answers_and_halves_when_the_server_is_busy() -> None:
    window = Window(start=4, largest=8)
    for _ in range(100):
        with window.request():
            pass
    assert window.size == 8
    for _ in range(3):  # requests of one overload fail together and count once
        with pytest.raises(TransientError), window.request():
            raise TransientError("503")
    assert window.size == 4


def test_a_window_of_one_lets_one_through() -> None:
    with Window(start=0, largest=1).request():
        pass


def test_requests_under_way_never_exceed_the_window() -> None:
    window, peak = Window(start=3, largest=3), Peak()

    def ask(_: int) -> None:
        with window.request():
            peak.add(1)
            time.sleep(0.001)
            peak.add(-1)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(60)))
    assert peak.highest == 3


def test_a_batch_gives_each_image_its_own_logit_and_each_its_error() -> None:
    sizes = []

    def score(crops: list[np.ndarray]) -> list[float]:
        sizes.append(len(crops))
        if any(one[0] == 13 for one in crops):
            raise TransientError("busy")
        time.sleep(0.01)
        return [float(one[0]) for one in crops]

    batcher = Batcher(score, senders=1, size=4)  # type: ignore[arg-type]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda number: batcher.logit(np.array([number])), range(12))) == list(range(12))
    assert max(sizes) == 4
    with pytest.raises(TransientError):
        batcher.logit(np.array([13]))


def test_an_answer_of_too_few_logits_is_an_error_and_keeps_no_image_waiting() -> None:
    batcher, stop = Batcher(lambda crops: [], senders=1, size=4), threading.Event()
    threading.Timer(2, stop.set).start()
    for _ in range(2):
        with pytest.raises(ValueError, match="shorter"):
            list(map_in_threads(batcher.logit, [np.zeros(1)], 1, stop, drain_s=0))


def test_stopping_begins_no_item_and_gives_those_under_way() -> None:
    stop, begun = threading.Event(), []

    def work(item: int) -> int:
        begun.append(item)
        if item == 5:
            stop.set()
        time.sleep(0.01)
        return item

    finished: list[int] = []
    with pytest.raises(StoppedError):
        finished.extend(map_in_threads(work, range(1000), threads=4, stop=stop, drain_s=5))
    assert sorted(finished) == sorted(begun)
    assert len(begun) < 20


def test_a_hanging_item_does_not_keep_a_stopped_scan() -> None:
    stop = threading.Event()
    stop_soon = threading.Timer(0.1, stop.set)
    stop_soon.start()
    began = time.monotonic()
    with pytest.raises(StoppedError):
        list(map_in_threads(lambda _: time.sleep(30), [1], threads=1, stop=stop, drain_s=0.2))
    assert time.monotonic() - began < 5


def test_retries_count_tries_and_give_up_at_the_deadline() -> None:
    answers: Iterator[TransientError | int] = iter([TransientError("a"), TransientError("b"), 7])

    def once() -> int:
        answer = next(answers)
        if isinstance(answer, TransientError):
            raise answer
        return answer

    assert Retries(longest_wait_s=0.01).call(once) == (7, 3)

    def never() -> None:
        raise TransientError("down")

    with pytest.raises(TransientError) as given_up:
        Retries(deadline_s=0.1, longest_wait_s=0.01).call(never)
    assert given_up.value.attempts > 1
