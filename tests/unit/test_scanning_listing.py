"""The listing against the previous table: what is carried over, what is scored, and the counts, against plain sets."""

from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from patchscan.scanning import rows
from patchscan.scanning.listing import Filters, ListingJoin
from patchscan.storage.store import ObjectInfo

KEYS = st.sampled_from(["a", "b/1", "b/10", "b/2", "ü %+", "../x", "日本", "Z"])
ETAGS = st.sampled_from(["1", "2"])
LISTED = st.lists(st.builds(ObjectInfo, key=KEYS, size=st.integers(0, 2), etag=ETAGS), max_size=10)
PREVIOUS = st.dictionaries(
    KEYS,
    st.fixed_dictionaries(
        {
            "size": st.integers(0, 2),
            "etag": ETAGS,
            "digest": st.sampled_from(["now", "before"]),
            "status": st.sampled_from(["scored", "rejected", "failed"]),
        }
    ),
)


@settings(max_examples=40, deadline=None)
@given(LISTED, PREVIOUS)
def test_only_unchanged_rows_of_this_model_are_carried_over(
    listed: list[ObjectInfo], previous: dict[str, dict[str, Any]]
) -> None:
    with TemporaryDirectory() as scratch:
        join = ListingJoin(Path(scratch), Filters())
        join.add_listing(listed)
        join.add_previous([rows.to_parquet([{"key": key, **row} for key, row in previous.items()])], "now")
        carried = {row["key"]: row for table in join.unchanged() for row in table.to_pylist()}
        todo = list(join.to_score())
        counts = join.counts()
    keys = {info.key for info in listed}
    assert set(carried) | {row["key"] for row in todo} == keys
    assert not set(carried) & {row["key"] for row in todo}
    for key, row in carried.items():
        before = previous[key]
        assert before["digest"] == "now"
        assert before["status"] != "failed"
        assert any((info.key, info.etag, info.size) == (key, before["etag"], before["size"]) for info in listed)
        assert row["status"] == before["status"]
    assert [row["key"] for row in todo] == sorted((row["key"] for row in todo), key=str.encode)
    assert counts["listed"] == len(keys)
    assert counts["unchanged"] == len(carried)
    assert counts["duplicates"] == len(listed) - len(keys)
    assert counts["deleted"] == len(set(previous) - keys)


def test_filters_count_what_they_leave_out(tmp_path: Path) -> None:
    join = ListingJoin(tmp_path, Filters(suffixes=(".jpg",), min_size=2, max_size=3))
    join.add_listing(ObjectInfo(key=f"{size}{end}", size=size) for size in range(5) for end in (".JPG", ".png"))
    assert [row["key"] for row in join.to_score()] == ["2.JPG", "3.JPG"]
    assert join.counts()["filtered"] == 8


def test_a_date_range_includes_its_start_and_not_its_end() -> None:
    moment = "2026-01-02T00:00:00+00:00"
    info = ObjectInfo(key="a", last_modified=datetime.fromisoformat(moment))
    assert Filters(since=moment).keep(info)
    assert not Filters(until=moment).keep(info)
