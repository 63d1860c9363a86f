"""Cut a listing into shards, with pure functions: the same listing always gives the same shards."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def cut(objects: Iterable[dict[str, Any]], max_objects: int, max_bytes: int) -> Iterator[list[dict[str, Any]]]:
    """Cut listed objects (rows.LISTED) into shards of at most `max_objects` objects and `max_bytes` bytes, in one pass.

    Yields the objects of each shard, every object exactly once, in order. An object larger than `max_bytes` is a shard
    of its own; an unknown size (None) counts as 0.
    """
    shard: list[dict[str, Any]] = []
    held = 0
    for listed in objects:
        size = listed["size"] or 0
        if shard and (len(shard) == max_objects or held + size > max_bytes):
            yield shard
            shard, held = [], 0
        shard.append(listed)
        held += size
    if shard:
        yield shard


def name(index: int) -> str:
    """Return a shard's part of a file name: `00042`. Up to 100,000 of them sort in the order of the shards."""
    return f"{index:05d}"


def format_ranges(indexes: Sequence[int]) -> str:
    """Format ascending indexes as Kubernetes does: [0, 1, 2, 5] becomes `0-2,5`."""
    runs: list[list[int]] = []
    for index in indexes:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_ranges(text: str) -> list[int]:
    """Parse what `format_ranges` returns. Raises ValueError."""
    found: list[int] = []
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found
