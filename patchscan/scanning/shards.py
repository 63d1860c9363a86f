"""Cut a listing into shards, with pure functions: the same listing always gives the same shards."""

from collections.abc import Iterable, Iterator, Sequence


def cut(sizes: Iterable[int | None], max_objects: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut consecutive objects into shards of at most `max_objects` objects and `max_bytes` bytes, in one pass.

    Yields (first, end) index pairs that cover every object exactly once, in order. An object larger than `max_bytes`
    is a shard of its own; an unknown size (None) counts as 0.
    """
    first = end = 0
    held = 0
    for known_size in sizes:
        size = known_size or 0
        if end > first and (end - first == max_objects or held + size > max_bytes):
            yield first, end
            first, held = end, 0
        end += 1
        held += size
    if end > first:
        yield first, end


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
