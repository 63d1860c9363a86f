"""A listing by key ranges: the same objects, each once, whatever the keys, the page size and where ranges are cut."""

import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchscan.storage.key_ranges import KeyRanges, Page, between
from patchscan.storage.store import ObjectInfo, StoreError

CHARACTERS = st.characters(exclude_categories=["Cs"])
KEYS = st.one_of(
    st.text(CHARACTERS, min_size=1, max_size=6),
    st.from_regex(r"\Aimg_00\d{3}\.jpg\Z"),
    st.from_regex(r"\A(\.\./|a/|a//|a\+%25 |ü|日本/|🙂|\uffff|\U0010ffff){1,4}[0-9a-f]?\Z"),
    st.integers(1, 3).map(lambda number: "x" * 1020 + str(number)),
)


def utf8(key: str) -> bytes:
    return key.encode()


def utf16(key: str) -> bytes:
    return key.encode("utf-16-be")


class Keys:
    """A bucket of these keys, in pages of `size`; counts its pages and how many threads asked for them."""

    def __init__(self, keys: set[str], size: int, order: Callable[[str], bytes] = utf8, wait_s: float = 0.0):
        self.ordered, self.size, self.order, self.wait_s = sorted(keys, key=order), size, order, wait_s
        self.places = [order(key) for key in self.ordered]
        self.pages = 0
        self.threads: set[int] = set()

    def __call__(self, *, after: str, token: str | None = None, limit: int) -> Page:
        self.pages += 1
        self.threads.add(threading.get_ident())
        time.sleep(self.wait_s)
        start = int(token) if token else bisect_right(self.places, self.order(after))
        end = start + min(limit, self.size)
        found = [ObjectInfo(key=key) for key in self.ordered[start:end]]
        return Page(found, str(end) if end < len(self.ordered) else None)


@pytest.mark.slow
@settings(max_examples=200)
@given(st.sets(KEYS, max_size=60), st.integers(1, 7), st.integers(1, 6), st.sampled_from([utf8, utf16]))
def test_every_key_is_listed_once(keys: set[str], size: int, threads: int, order: Callable[[str], bytes]) -> None:
    listed = [info.key for info in KeyRanges(Keys(keys, size, order, wait_s=0.0002), threads)]
    assert sorted(listed) == sorted(keys)


@pytest.mark.parametrize("name", ["{0:07d}.jpg", "photos/2026/11/24/IMG_{0:07d}.JPG", "{1:064x}", "日本/{0:05d}"])
def test_keys_under_one_prefix_are_listed_by_most_threads(name: str) -> None:
    keys = {name.format(number, number * 2**256 // 3000 * 7919 % 2**256) for number in range(3000)}
    store = Keys(keys, size=10, wait_s=0.002)
    assert len(list(KeyRanges(store, 8))) == 3000
    assert len(store.threads) > 4, "on a busy machine the others may come when everything is listed"
    assert store.pages < 3 * 300, "looking for places to cut costs more than it gains"


def test_a_store_without_order_is_listed_by_one_thread() -> None:
    store = Keys({f"{number:03d}" for number in range(100)}, size=7, order=lambda key: key[::-1].encode())
    assert sorted(info.key for info in KeyRanges(store, 4)) == sorted(store.ordered)


def test_a_store_that_loses_its_order_midway_is_an_error_and_no_lost_key() -> None:
    store = Keys({f"{number:04d}" for number in range(2000)}, size=5, wait_s=0.001)

    def list_page(*, after: str, token: str | None = None, limit: int) -> Page:
        page = store(after=after, token=token, limit=limit)
        return Page([ObjectInfo(key="0000"), *page.objects], page.token) if store.pages > 200 else page

    with pytest.raises(StoreError, match="no fixed order"):
        list(KeyRanges(list_page, 4))


def test_pages_in_no_order_are_an_error_and_no_lost_key() -> None:
    """Each page is ordered in itself, so that ranges are cut before the order is known."""
    ordered = [[f"{number:04d}" for number in range(start, start + 5)] for start in range(0, 2000, 5)]
    shuffled = ordered[:50] + ordered[50:][::-1]
    numbers, left = count(), dict[str | None, list[list[str]]]()

    def list_page(*, after: str, token: str | None = None, limit: int) -> Page:
        time.sleep(0.001)
        behind = ([key for key in page if key > after] for page in shuffled)
        page, *others = left.get(token) or [*filter(None, behind), []]
        following = str(next(numbers))
        left[following] = others
        return Page([ObjectInfo(key=key) for key in page[:limit]], following if others else None)

    with pytest.raises(StoreError, match="no fixed order"):
        list(KeyRanges(list_page, 4))


def test_an_error_of_one_thread_ends_the_listing() -> None:
    store = Keys({f"{number:04d}" for number in range(2000)}, size=5)

    def list_page(*, after: str, token: str | None = None, limit: int) -> Page:
        if store.pages > 50:
            raise StoreError("gone")
        return store(after=after, token=token, limit=limit)

    with pytest.raises(StoreError, match="gone"):
        list(KeyRanges(list_page, 4))


@given(KEYS, st.one_of(st.none(), KEYS), st.sets(CHARACTERS, max_size=12))
def test_a_cut_lies_strictly_between(low: str, high: str | None, alphabet: set[str]) -> None:
    found = between(low, high, sorted(alphabet))
    assert found is None or (low < found and (high is None or found < high))
