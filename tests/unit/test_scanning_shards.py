"""Shards: every object exactly once, in order, within the limits."""

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from patchscan.scanning.shards import cut, name

SIZES = st.lists(st.one_of(st.none(), st.integers(0, 100)), max_size=200)


def listed(sizes: list[int | None]) -> list[dict[str, Any]]:
    return [{"key": number, "size": size} for number, size in enumerate(sizes)]


def held(shard: list[dict[str, Any]]) -> int:
    return sum(one["size"] or 0 for one in shard)


@given(SIZES, st.integers(1, 20), st.integers(1, 200))
def test_shards_cover_every_object_once_within_the_limits(sizes: list[int | None], objects: int, size: int) -> None:
    shards = list(cut(listed(sizes), objects, size))
    assert [one for shard in shards for one in shard] == listed(sizes)
    for shard in shards:
        assert 1 <= len(shard) <= objects
        assert held(shard) <= size or len(shard) == 1


@given(SIZES, st.integers(1, 20), st.integers(1, 200))
def test_no_two_neighbouring_shards_would_fit_in_one(sizes: list[int | None], objects: int, size: int) -> None:
    for shard, following in pairwise(cut(listed(sizes), objects, size)):
        assert len(shard) == objects or held([*shard, following[0]]) > size


def test_names_sort_as_the_shards_do() -> None:
    assert sorted(name(index) for index in (0, 2, 10, 99_999)) == [name(index) for index in (0, 2, 10, 99_999)]
