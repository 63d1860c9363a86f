"""List a bucket with many threads, also where its keys have no `/`: each thread lists a range of keys.

A range holds the keys with `start < key <= last`. One thread lists it page by page. An idle thread looks for a key
about half-way to the end of another thread's range (`between`, then a page of one key to find the first key after
that string) and takes over what comes after that key. Where a range is cut is a guess, but it decides only which thread
lists what: every key is in exactly one range.

This needs keys in S3's order (by UTF-8 bytes, as Python orders strings). A store that lists in no order (S3's
directory buckets) is listed by one thread. Some stores seem to have that order until a page shows otherwise: SeaweedFS
lists `a/1` before `a-b`, folder by folder. Then UnorderedError ends the listing, and one thread lists all again.
"""

import queue
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Protocol

from patchscan.storage.store import ObjectInfo, StoreError, UnorderedError

# Objects in a page: the most that S3 returns.
PAGE = 1000
# A store may give pages without a key, as where many were deleted; after so many in a row it goes on for ever.
MOST_EMPTY_PAGES = 10_000
# Tries to find a place to cut a range, before the idle thread waits for the range's next page.
PROBES = 12
# Tries to see that a range ends where the next one begins, while others delete keys there.
END_TRIES = 3
# Characters after the common prefix of two keys that `between` computes with.
WIDTH = 6


@dataclass(frozen=True)
class Page:
    """Some objects in the order of their keys, and the token that continues the listing; None at its end."""

    objects: Sequence[ObjectInfo]
    token: str | None


class Repetition:
    """Notices that a listing's tokens or keys come again, so that it would never end: after at most about three rounds,
    and with one token and one key in memory (Brent's cycle detection); and that only pages without keys come."""

    def __init__(self) -> None:
        self._token: str | None = None
        self._key: str | None = None
        self._pages = self._empty_pages = 0

    def check(self, token: str | None, keys: Sequence[str]) -> None:
        """Note a page. Raises StoreError where it has come before, or is the last of too many empty ones."""
        for what, repeated in (("token", token is not None and token == self._token), ("keys", self._key in keys)):
            if repeated:
                raise StoreError(
                    f"the store gives the same {what} again while it is listed: the listing would never end"
                )
        self._empty_pages = 0 if keys else self._empty_pages + 1
        if self._empty_pages >= MOST_EMPTY_PAGES:
            raise StoreError(
                f"the store has given {self._empty_pages:,} pages without a key while it is listed, and says it goes on"
            )
        self._pages += 1
        if self._pages & (self._pages - 1) == 0:
            self._token = token
            self._key = keys[0] if keys else self._key


class ListPage(Protocol):
    """List up to `limit` objects: those after the key `after`, or those from `token` on."""

    def __call__(self, *, after: str, token: str | None = None, limit: int) -> Page: ...


@dataclass(eq=False)
class KeyRange:
    """Keys with `start < key <= last` (None: to the end), listed up to `after`. There is no key between `ceiling` and
    `last`. `pages` were listed since the range was last cut; `divisible`: another thread may try to cut it."""

    start: str
    after: str
    last: str | None = None
    ceiling: str | None = None
    token: str | None = None
    repetition: Repetition = field(default_factory=Repetition)
    pages: int = 0
    divisible: bool = False


class KeyRanges:
    """The objects that `list_page` lists, in any order, listed by `threads` threads at once. Can be iterated once.
    Raises UnorderedError, unless there is one thread, where the order shows to be another after keys were divided."""

    def __init__(self, list_page: ListPage, threads: int):
        self._list_page, self._threads = list_page, threads
        self._open = [KeyRange(start="", after="")]
        self._unstarted = list(self._open)
        self._characters: set[str] = set()
        self._ordered = True
        self._stopped = False
        self._changed = threading.Condition()
        self._listed: queue.Queue[Sequence[ObjectInfo] | Exception | None] = queue.Queue(maxsize=2 * threads)

    def __iter__(self) -> Iterator[ObjectInfo]:
        for _ in range(self._threads):
            threading.Thread(target=self._run, daemon=True).start()
        try:
            running = self._threads
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
            while key_range := self._next_range():
                self._list(key_range)
            self._put(None)
        except Exception as error:  # noqa: BLE001  raised again where the listing is consumed
            self._put(error)

    def _put(self, page: Sequence[ObjectInfo] | Exception | None) -> None:
        while not self._stopped:
            try:
                self._listed.put(page, timeout=1)
            except queue.Full:
                continue
            return

    def _next_range(self) -> KeyRange | None:
        """Wait for a range for an idle thread to list; None when everything is listed."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopped or not self._open or self._unstarted or any(r.divisible for r in self._open)
                )
                if self._stopped or not self._open:
                    return None
                if self._unstarted:
                    return self._unstarted.pop()
                # The range with the most pages so far is likely to have the most pages left.
                largest = max((r for r in self._open if r.divisible), key=lambda r: r.pages)
                largest.divisible = False
            if upper := self._divide(largest):
                return upper

    def _divide(self, divided: KeyRange) -> KeyRange | None:
        """Cut a range that another thread lists, and return its upper part; None where no good place is found."""
        for _ in range(PROBES):
            with self._changed:
                middle = between(divided.after, divided.ceiling, sorted(self._characters))
            if middle is None:
                return None
            following = self._list_page(after=middle, limit=1).objects
            with self._changed:
                if divided not in self._open or not self._ordered:
                    return None
                if middle < divided.after or (divided.ceiling is not None and middle >= divided.ceiling):
                    continue  # the range has shrunk in the meantime
                if following and following[0].key <= middle:
                    return None  # the store ignores StartAfter
                if not following or (divided.last is not None and following[0].key >= divided.last):
                    divided.ceiling = middle
                    continue
                # Not at `middle`: where a string lies that is no key, such as `a.` beside `a/1`, depends on the order.
                # But it is listed from there, so that keys in no order show.
                cut = following[0].key
                upper = KeyRange(start=cut, after=middle, last=divided.last, ceiling=divided.ceiling)
                divided.last, divided.ceiling = cut, middle
                divided.pages = 0
                self._open.append(upper)
                return upper
        return None

    def _list(self, key_range: KeyRange) -> None:
        while True:
            page = self._list_page(after=key_range.after, token=key_range.token, limit=PAGE)
            key_range.repetition.check(page.token, [info.key for info in page.objects])
            with self._changed:
                inside = self._accept(key_range, page)
                closed = key_range not in self._open
                self._changed.notify_all()
            self._put(inside)
            if closed:
                self._check_end(key_range)
                return

    def _accept(self, key_range: KeyRange, page: Page) -> Sequence[ObjectInfo]:
        """Return the objects of a page that belong to the range, and advance or close the range."""
        until = list(takewhile(lambda info: key_range.last is None or info.key <= key_range.last, page.objects))
        keys = [key_range.after, *(info.key for info in page.objects)]
        self._ordered = self._ordered and all(one < other for one, other in pairwise(keys))
        if not self._ordered and (key_range.start or key_range.last is not None):
            # Keys of the range may come after the first one beyond it, where nobody looks for them.
            raise UnorderedError
        self._characters.update(character for key in keys[::50] for character in key)
        key_range.after, key_range.token = (until[-1].key if until else key_range.after), page.token
        key_range.pages += 1
        key_range.divisible = self._ordered and key_range.after >= key_range.start
        if len(until) < len(page.objects) or page.token is None or key_range.after == key_range.last:
            self._open.remove(key_range)
        return [info for info in until if info.key > key_range.start]

    def _check_end(self, key_range: KeyRange) -> None:
        """Raise UnorderedError where the next range does not begin where this one ended."""
        if key_range.last in (None, key_range.after):
            return
        # The key at which the range was cut was not met: it was deleted, or lies elsewhere in the store's order.
        for _ in range(END_TRIES):
            ends = [self._list_page(after=key or "", limit=1).objects for key in (key_range.after, key_range.last)]
            ours, following = ([info.key for info in objects] for objects in ends)
            if ours == following:
                return
        raise UnorderedError


def between(low: str, high: str | None, alphabet: Sequence[str]) -> str | None:
    """A short string of characters of `alphabet` (ascending) with low < string < high (None: no upper end), about
    half-way among the keys that can be made of them. None where there is no such string, or only a long one."""
    if not alphabet:
        return None
    shared = "".join(pair[0] for pair in takewhile(lambda pair: pair[0] == pair[1], zip(low, high or "", strict=False)))
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
