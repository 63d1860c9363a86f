"""A listing by key ranges: the same objects, each once, whatever the keys, the page size and where ranges are cut."""

import random
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchscan.storage.key_ranges import KeyRanges, Page, between
from patchscan.storage.store import ObjectInfo, StoreError, UnorderedError

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


def folders(key: str) -> list[str]:
    """SeaweedFS's order: folder by folder, so that `a/1` comes before `a-b`."""
    return key.split("/")


class Keys:
    """A bucket of these keys, in pages of `size`; counts its pages and how many threads asked for them."""

    def __init__(self, keys: set[str], size: int, order: Callable[[str], Any] = utf8, wait_s: float = 0.0):
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


def list_again(store: Keys, threads: int) -> list[str]:
    """The keys, listed as a bucket's are: by one thread where the order shows to be another."""
    try:
        return [info.key for info in KeyRanges(store, threads)]
    except UnorderedError:
        return [info.key for info in KeyRanges(store, 1)]


@pytest.mark.slow
@settings(max_examples=200)
@given(st.sets(KEYS, max_size=60), st.integers(1, 7), st.integers(1, 6), st.sampled_from([utf8, utf16, folders]))
def test_every_key_is_listed_once(keys: set[str], size: int, threads: int, order: Callable[[str], Any]) -> None:
    assert sorted(list_again(Keys(keys, size, order, wait_s=0.0002), threads)) == sorted(keys)


IN_FOLDERS = {f"img{folder:02d}/{number:02d}.jpg" for folder in range(60) for number in range(10)}


def test_a_store_that_lists_folder_by_folder_loses_no_folder_where_keys_are_divided() -> None:
    for _ in range(5):
        store = Keys(IN_FOLDERS, size=10, order=folders, wait_s=0.001)
        assert sorted(info.key for info in KeyRanges(store, 8)) == sorted(IN_FOLDERS)
        assert len(store.threads) > 1, "on a busy machine the others may come when everything is listed"


@pytest.mark.parametrize("seed", range(10))
def test_files_beside_folders_of_a_store_that_lists_folder_by_folder_are_listed_once(seed: int) -> None:
    draw = random.Random(seed)
    beside = {f"img{draw.randrange(60):02d}{end}" for end in (".json", "-old/1.jpg", " 2/1.jpg")[: 1 + seed % 3]}
    store = Keys(IN_FOLDERS | beside, size=10, order=folders, wait_s=0.0005)
    assert sorted(list_again(store, 8)) == sorted(IN_FOLDERS | beside)


def test_where_a_folder_is_cut_the_next_one_may_come_first_by_its_name() -> None:
    """A range that ends at `a-b/1` does not end at `a/0`, which is beyond it by name, but comes before it here."""
    keys = {"a+c", *(f"a/{number}" for number in range(4)), "a-b/1", "a-b/2", "b"}
    for size in range(1, 9):
        for _ in range(5):
            assert sorted(list_again(Keys(keys, size, folders, wait_s=0.0002), 4)) == sorted(keys)


def test_keys_that_are_deleted_where_ranges_were_cut_do_not_end_the_listing() -> None:
    every = [f"{number:04d}" for number in range(2000)]
    keys, asked = [*every], set(every)

    def list_page(*, after: str, token: str | None = None, limit: int) -> Page:
        time.sleep(0.001)
        now = [*keys]
        start = bisect_right(now, token or after)
        found = now[start : start + min(limit, 5)]
        if limit == 1 and found and after not in asked and found[0] in keys:  # a place to cut a range is looked for
            keys.remove(found[0])
        asked.add(after)
        return Page([ObjectInfo(key=key) for key in found], found[-1] if start + len(found) < len(now) else None)

    listed = [info.key for info in KeyRanges(list_page, 4)]
    assert len(listed) == len(set(listed))
    assert set(keys) <= set(listed)
    assert len(keys) < len(every), "on a busy machine one thread may have listed all before others came"


def test_a_store_that_lists_also_the_key_to_begin_after_lists_no_key_twice() -> None:
    keys = [f"{number:04d}" for number in range(500)]

    def list_page(*, after: str, token: str | None = None, limit: int) -> Page:
        time.sleep(0.001)
        start = int(token) if token else bisect_left(keys, after)
        end = start + min(limit, 5)
        return Page([ObjectInfo(key=key) for key in keys[start:end]], str(end) if end < len(keys) else None)

    assert sorted(info.key for info in KeyRanges(list_page, 4)) == keys


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


def test_a_store_that_loses_its_order_midway_is_listed_again() -> None:
    store = Keys({f"{number:04d}" for number in range(2000)}, size=5, wait_s=0.001)

    def list_page(*, after: str, token: str | None = None, limit: int) -> Page:
        page = store(after=after, token=token, limit=limit)
        return Page([ObjectInfo(key="0000"), *page.objects], page.token) if store.pages > 200 else page

    with pytest.raises(UnorderedError):
        list(KeyRanges(list_page, 4))


def test_pages_in_no_order_are_listed_again() -> None:
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

    with pytest.raises(UnorderedError):
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
