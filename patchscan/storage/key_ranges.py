"""A listing by many threads that needs no `/` in the keys: ranges of keys, halved whenever a thread has nothing to do.

A range holds the keys with `start < key <= last`. One thread lists it page by page; one that is idle looks for a key
about half-way to the range's end (`between`, and a page of one key to see whether anything lies there) and takes what
comes after it. Where ranges are cut is a guess and decides only who lists what: every key is in exactly one range.

That needs keys in a fixed order, which S3 gives (UTF-8 bytes, the order of Python's strings). A store that lists in no
order (S3's directory buckets) is listed by one thread.
"""

import queue
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from patchscan.storage.store import ObjectInfo, StoreError

# Objects in a page: the most that S3 gives.
PAGE = 1000
# Looks for a place to cut before the thread lets the range be until its next page.
PROBES = 12
# Characters after what two keys share that `between` reckons with.
WIDTH = 6
# Cuts are made of characters below this: there UTF-8 and UTF-16, by which some stores sort, agree.
FIRST_SURROGATE = "\ud800"


@dataclass(frozen=True)
class Page:
    """Some objects in the order of their keys, and what continues the listing; None at its end."""

    objects: Sequence[ObjectInfo]
    token: str | None


class ListPage(Protocol):
    """Lists up to `limit` objects: from the one after the key `after`, or from where `token` says."""

    def __call__(self, *, after: str, token: str | None = None, limit: int) -> Page: ...


@dataclass(eq=False)
class KeyRange:
    """Keys with `start < key <= last` (None: to the end), listed up to `after`. No key was seen between `ceiling` and
    `last`; `pages` counts those listed since the range was cut. `divisible`: another thread may look for a cut."""

    start: str
    after: str
    last: str | None = None
    ceiling: str | None = None
    token: str | None = None
    pages: int = 0
    divisible: bool = False


class KeyRanges:
    """The objects that `list_page` gives, listed by `threads` threads at once; iterate once, in any order."""

    def __init__(self, list_page: ListPage, threads: int):
        self._list_page, self._threads = list_page, threads
        self._open = [KeyRange(start="", after="")]
        self._untaken = list(self._open)
        self._characters: set[str] = set()
        self._ordered = True
        self._stopped = False
        self._changed = threading.Condition()
        self._listed: queue.Queue[Sequence[ObjectInfo] | Exception | None] = queue.Queue(maxsize=2 * threads)

    def __iter__(self) -> Iterator[ObjectInfo]:
        crew = [threading.Thread(target=self._run, daemon=True) for _ in range(self._threads)]
        for thread in crew:
            thread.start()
        try:
            running = len(crew)
            while running:
                page = self._listed.get()
                if isinstance(page, Exception):
                    raise page
                if page is None:
                    running -= 1
                else:
                    yield from page
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()

    def _run(self) -> None:
        try:
            while taken := self._take():
                self._list(taken)
            self._give(None)
        except Exception as error:  # noqa: BLE001  raised again where the listing is consumed
            self._give(error)

    def _give(self, page: Sequence[ObjectInfo] | Exception | None) -> None:
        while not self._stopped:
            try:
                self._listed.put(page, timeout=1)
            except queue.Full:
                continue
            return

    def _take(self) -> KeyRange | None:
        """A range for an idle thread; None when everything is listed."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopped or not self._open or self._untaken or any(one.divisible for one in self._open)
                )
                if self._stopped or not self._open:
                    return None
                if self._untaken:
                    return self._untaken.pop()
                # The one that has gone on longest is likely to go on longest.
                widest = max((one for one in self._open if one.divisible), key=lambda one: one.pages)
                widest.divisible = False
            if half := self._divide(widest):
                return half

    def _divide(self, whole: KeyRange) -> KeyRange | None:
        """Cut a range that another thread lists, and return its upper part; None where no good place is found."""
        for _ in range(PROBES):
            with self._changed:
                middle = between(whole.after, whole.ceiling, sorted(self._characters))
            if middle is None:
                return None
            following = self._list_page(after=middle, limit=1).objects
            with self._changed:
                if whole not in self._open or not self._ordered:
                    return None
                if middle < whole.after or (whole.ceiling is not None and middle >= whole.ceiling):
                    continue  # the range has become smaller meanwhile
                if following and following[0].key <= middle:
                    return None  # the store does not know StartAfter
                if not following or (whole.last is not None and following[0].key > whole.last):
                    whole.ceiling = middle
                    continue
                half = KeyRange(start=middle, after=middle, last=whole.last, ceiling=whole.ceiling)
                whole.last = whole.ceiling = middle
                whole.pages = 0
                self._open.append(half)
                return half
        return None

    def _list(self, one: KeyRange) -> None:
        while True:
            page = self._list_page(after=one.after, token=one.token, limit=PAGE)
            with self._changed:
                inside = self._take_in(one, page)
                self._changed.notify_all()
            self._give(inside)
            if one not in self._open:
                return

    def _take_in(self, one: KeyRange, page: Page) -> Sequence[ObjectInfo]:
        """What of a page belongs to the range; the range goes on after it, or is closed."""
        inside = list(takewhile(lambda info: one.last is None or info.key <= one.last, page.objects))
        beyond = page.objects[len(inside) :]
        keys = [info.key for info in page.objects]
        self._ordered = self._ordered and keys == sorted(keys)
        if any(info.key <= one.start for info in inside) or any(info.key <= (one.last or "") for info in beyond):
            raise StoreError("the store lists its keys in no fixed order")
        self._characters.update(character for key in keys[::50] for character in key if character < FIRST_SURROGATE)
        one.after, one.token = (inside[-1].key if inside else one.after), page.token
        one.pages += 1
        one.divisible = self._ordered
        if beyond or page.token is None:
            self._open.remove(one)
        return inside


def between(low: str, high: str | None, alphabet: Sequence[str]) -> str | None:
    """A short string of `alphabet` (ascending) with low < string < high (None: no end), about half-way as keys made of
    this alphabet lie; None where there is no such string or it would be long."""
    if not alphabet:
        return None
    shared = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(low, high or "", strict=False)))
    base = len(alphabet) + 1  # 0 is the end of a string

    def number(text: str) -> int:
        places = [bisect_right(alphabet, character) for character in text[len(shared) :][:WIDTH]]
        return sum(place * base ** (WIDTH - 1 - index) for index, place in enumerate(places))

    middle = (number(low) + (base**WIDTH if high is None else number(high))) // 2
    places = [middle // base**power % base for power in reversed(range(WIDTH))]
    while places and places[-1] == 0:
        places.pop()
    found = shared + "".join(alphabet[max(place, 1) - 1] for place in places)
    return found if low < found and (high is None or found < high) else None
