"""Shards: every object exactly once, in order, within the limits."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from patchscan.scanning.shards import cut, name

SIZES = st.lists(st.one_of(st.none(), st.integers(0, 100)), max_size=200)


@given(SIZES, st.integers(1, 20), st.integers(1, 200))
def test_shards_cover_every_object_once_within_the_limits(sizes: list[int | None], objects: int, size: int) -> None:
    shards = list(cut(sizes, objects, size))
    assert [index for first, end in shards for index in range(first, end)] == list(range(len(sizes)))
    for first, end in shards:
        held = sum(one or 0 for one in sizes[first:end])
        assert 1 <= end - first <= objects
        assert held <= size or end - first == 1


@given(SIZES, st.integers(1, 20), st.integers(1, 200))
def test_no_two_neighbouring_shards_would_fit_in_one(sizes: list[int | None], objects: int, size: int) -> None:
    shards = list(cut(sizes, objects, size))
    for (first, end), (_, following) in pairwise(shards):
        assert end - first == objects or sum(one or 0 for one in sizes[first : end + 1]) > size
        assert following > end


def test_names_sort_as_the_shards_do() -> None:
    assert sorted(name(index) for index in (0, 2, 10, 99_999)) == [name(index) for index in (0, 2, 10, 99_999)]
