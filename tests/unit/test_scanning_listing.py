"""The listing against the previous table: what is carried over, what is scored, and the counts, against plain sets."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchscan.detector.images import ErrorCode
from patchscan.scanning import manifest, rows
from patchscan.scanning.listing import Filters, ListingJoin
from patchscan.scanning.manifest import ManifestError
from patchscan.storage.store import FailureCode, ObjectInfo, UnorderedError, read_listing

KEYS = st.sampled_from(["a", "b/1", "b/10", "b/2", "ü %+", "../x", "日本", "Z"])
ETAGS = st.sampled_from(["1", "2"])
VERSIONS = st.sampled_from([None, "v1", "v2", "null"])
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


def test_dates_are_those_of_utc_wherever_the_machine_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB knows names of time zones that the machine's own list may lack, such as US/Pacific on Ubuntu 24.04."""
    connect = duckdb.connect

    def connect_elsewhere(path: Path) -> duckdb.DuckDBPyConnection:
        made = connect(path)
        made.execute("SET GLOBAL TimeZone = 'US/Pacific'")  # as DuckDB takes it from the environment
        return made

    monkeypatch.setattr(duckdb, "connect", connect_elsewhere)
    join = ListingJoin(tmp_path, Filters())
    join.add_listing([ObjectInfo(key="a", last_modified=datetime(2026, 10, 25, 1, 30, tzinfo=UTC))])
    (listed,) = join.to_score()
    assert str(listed["last_modified"]) == "2026-10-25 01:30:00+00:00"


@pytest.mark.slow
@settings(max_examples=25)
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


def test_rows_of_a_later_version_are_carried_over_without_what_it_has_added(tmp_path: Path) -> None:
    row = {"key": "a", "etag": "1", "status": "rejected", "digest": "now"}
    later = rows.from_parquet(rows.to_parquet([row])).append_column("of_a_later_version", [[1]])
    join = ListingJoin(tmp_path, Filters())
    join.add_listing([ObjectInfo(key="a", etag="1")])
    join.add_previous([rows.table_to_parquet(later)], "now")
    (carried,) = join.unchanged()
    assert (carried.schema, carried.to_pylist()[0]["key"]) == (rows.SCHEMA, "a")


@pytest.mark.slow
@settings(max_examples=25)
@given(
    st.lists(st.builds(ObjectInfo, key=KEYS, version_id=VERSIONS, etag=st.sampled_from([None, "1", "2"])), max_size=10),
    st.dictionaries(st.tuples(KEYS, VERSIONS), ETAGS),
)
def test_a_manifest_has_a_row_for_each_version(
    listed: list[ObjectInfo], previous: dict[tuple[str, str | None], str]
) -> None:
    table = [
        {"key": key, "version_id": version, "etag": etag, "size": 1, "digest": "now", "status": "scored"}
        for (key, version), etag in previous.items()
    ]
    with TemporaryDirectory() as scratch:
        join = ListingJoin(Path(scratch), Filters(), by_version=True)
        join.add_listing(listed)
        join.add_previous([rows.to_parquet(table)], "now")
        carried = [(row["key"], row["version_id"]) for table in join.unchanged() for row in table.to_pylist()]
        todo = [(row["key"], row["version_id"]) for row in join.to_score()]
        counts = join.counts()
    objects = {(info.key, info.version_id) for info in listed}
    assert sorted([*carried, *todo], key=str) == sorted(objects, key=str)
    assert todo == sorted(todo, key=lambda one: (one[0].encode(), one[1] is None, one[1] or ""))
    for key, version in carried:
        etags = {info.etag for info in listed if (info.key, info.version_id) == (key, version)}
        assert previous[key, version] in etags or (None in etags and version in ("v1", "v2"))
    assert counts["deleted"] == len(previous.keys() - objects)
    assert counts["duplicates"] == len(listed) - len(objects)


def test_a_listing_that_begins_again_counts_nothing_twice(tmp_path: Path) -> None:
    class Store:
        tries = 0

        def objects(self) -> Iterator[ObjectInfo]:
            self.tries += 1
            yield ObjectInfo(key="a.png", size=1)
            yield ObjectInfo(key="b.jpg", size=2)
            if self.tries == 1:
                raise UnorderedError
            yield ObjectInfo(key="c.png", size=4)

    join, store = ListingJoin(tmp_path, Filters(suffixes=(".png",))), Store()
    read_listing(cast("Any", store), join.add_listing)
    counts = join.counts()
    assert [row["key"] for row in join.to_score()] == ["a.png", "c.png"]
    assert (counts["listed"], counts["listed_bytes"], counts["filtered"], counts["duplicates"]) == (2, 5, 1, 0)


def test_what_filters_leave_out_is_not_deleted(tmp_path: Path) -> None:
    join = ListingJoin(tmp_path, Filters(suffixes=(".png",), max_size=5))
    join.add_listing(
        [ObjectInfo(key="a.png", size=1), ObjectInfo(key="b.jpg", size=1), ObjectInfo(key="c.png", size=9)]
    )
    before = ["a.png", "b.jpg", "c.png", "gone.png", "gone.jpg"]
    join.add_previous([rows.to_parquet([{"key": key, "status": "scored"} for key in before])], "now")
    counts = join.counts()
    assert (counts["listed"], counts["filtered"], counts["deleted"]) == (1, 2, 2)


def test_a_table_of_an_older_version_without_some_columns_is_carried_over(tmp_path: Path) -> None:
    join = ListingJoin(tmp_path, Filters())
    join.add_listing([ObjectInfo(key="a", size=1, etag="e", storage_class="STANDARD")])
    row = {"key": "a", "size": 1, "etag": "e", "digest": "now", "status": "scored"}
    older = rows.SCHEMA.remove(rows.SCHEMA.get_field_index("storage_class"))
    join.add_previous([rows.to_parquet([row], older), rows.to_parquet([], older)], "now")
    ((carried,),) = (table.to_pylist() for table in join.unchanged())
    assert (carried["key"], carried["storage_class"]) == ("a", None)


ARCHIVED = ObjectInfo(
    key="a", size=1, etag="e", last_modified=datetime(2026, 1, 2, tzinfo=UTC), storage_class="GLACIER"
)


@pytest.mark.parametrize(
    ("change", "carried"),
    [
        ({}, True),
        ({"restored": True}, False),
        ({"storage_class": "STANDARD"}, False),
        ({"storage_class": None}, False),
        ({"etag": "f"}, False),
        ({"etag": None}, False),
        ({"last_modified": datetime(2026, 1, 3, tzinfo=UTC)}, False),
    ],
)
@pytest.mark.parametrize("retry", [False, True])
def test_an_archived_object_is_tried_again_when_something_changed(
    change: dict[str, Any], carried: bool, retry: bool, tmp_path: Path
) -> None:
    join = ListingJoin(tmp_path, Filters())
    join.add_listing([replace(ARCHIVED, **change)])
    failed = rows.without_score(ARCHIVED, FailureCode.ARCHIVED, "in cold storage", 1) | {"digest": "now"}
    join.add_previous([rows.to_parquet([failed])], "now", retry_archived=retry)
    assert join.counts()["unchanged"] == (carried and not retry)
    assert len(list(join.to_score())) == (not carried or retry)


@pytest.mark.parametrize(
    ("change", "carried"),
    [
        ({}, True),
        ({"size": 2}, False),
        ({"last_modified": datetime(2026, 1, 3, tzinfo=UTC)}, False),
        ({"storage_class": "STANDARD"}, False),
        ({"restored": True}, False),
        ({"etag": "e"}, False),
    ],
)
def test_an_archived_object_without_an_etag_is_known_by_size_and_date_and_no_other_is(
    change: dict[str, Any], carried: bool, tmp_path: Path
) -> None:
    before = [replace(ARCHIVED, key=key, etag=None) for key in ("archived", "denied", "scored", "text")]
    join = ListingJoin(tmp_path, Filters())
    join.add_listing([replace(info, **change) for info in before])
    archived, denied, scored, text = before
    previous = [
        rows.without_score(archived, FailureCode.ARCHIVED, "in cold storage", 1),
        rows.without_score(denied, FailureCode.ACCESS_DENIED, "access denied", 1),
        rows.without_score(scored, FailureCode.ARCHIVED, "", 1) | {"status": "scored", "error_code": None},
        rows.without_score(text, ErrorCode.NOT_AN_IMAGE, "no image", 1),
    ]
    join.add_previous([rows.to_parquet([row | {"digest": "now"} for row in previous])], "now")
    assert [row["key"] for table in join.unchanged() for row in table.to_pylist()] == ["archived"] * carried


@pytest.mark.parametrize("unknown", ["size", "last_modified"])
def test_an_archived_object_of_which_the_listing_says_too_little_is_tried_again(unknown: str, tmp_path: Path) -> None:
    info = replace(ARCHIVED, etag=None, **{unknown: None})  # type: ignore[arg-type]
    join = ListingJoin(tmp_path, Filters())
    join.add_listing([info])
    failed = rows.without_score(info, FailureCode.ARCHIVED, "in cold storage", 1) | {"digest": "now"}
    join.add_previous([rows.to_parquet([failed])], "now")
    assert join.counts()["unchanged"] == 0


def test_an_object_on_which_a_decoder_died_is_tried_again(tmp_path: Path) -> None:
    """It may have been the machine's fault; other rejected objects are carried over."""
    infos = [replace(ARCHIVED, key=key, storage_class=None) for key in ("died", "text")]
    join = ListingJoin(tmp_path, Filters())
    join.add_listing(infos)
    before = [
        rows.without_score(info, code, "no", 1) | {"digest": "now"}
        for info, code in zip(infos, (ErrorCode.DECODER_DIED, ErrorCode.NOT_AN_IMAGE), strict=True)
    ]
    join.add_previous([rows.to_parquet(before)], "now")
    assert [row["key"] for row in join.to_score()] == ["died"]


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


@pytest.mark.parametrize("written", ["e", '"e"', ' W/"e"', '"e" '])
def test_an_etag_of_a_manifest_is_bare_as_a_listings(written: str, tmp_path: Path) -> None:
    """Else each object is failed: it would have changed since it was listed."""
    (tmp_path / "keys.jsonl").write_text(json.dumps({"key": "a", "etag": written}))
    (found,) = manifest.objects(str(tmp_path / "keys.jsonl"), None, None)
    assert found.etag == "e"


def test_a_manifest_of_the_root_folder_is_not_looked_for_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no-file-of-the-root.csv").write_text("key\na.png\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ManifestError, match=r"there is no manifest /no-file-of-the-root\.csv"):
        list(manifest.objects("/no-file-of-the-root.csv", None, None))


MANIFESTS: dict[str, tuple[bytes, list[str]]] = {
    "a.csv": (b"key,size\r\na.png,1\r\nb.png,\r\n\r\n", ["a.png", "b.png"]),
    "bom.csv": (b"\xef\xbb\xbfkey\na.png\n", ["a.png"]),
    "quoted.csv": (b'size,key\n1,"a,b.png"\n2,"line\nbreak.png"\n3,"say ""hi"".png"\n',
                   ["a,b.png", "line\nbreak.png", 'say "hi".png']),
    "bucket.csv": (b"bucket,key\nphotos,a.png\n,b.png\n", ["a.png", "b.png"]),
    "a.jsonl": (b'{"key": "a.png"}\r\n\r\n{"key": "b\\u2028.png"}', ["a.png", "b\u2028.png"]),
    "a.CSV": (b"key\na.png", ["a.png"]),
    "spreadsheet.csv": (b'\xef\xbb\xbfKey ;Size\r\n"a;b.png";1\r\nc,d.png;\r\n', ["a;b.png", "c,d.png"]),
    "tabs.csv": (b"size\tkey\n1\ta;b.png\n", ["a;b.png"]),
    "semicolon.csv": (b"key\na;b.png\n", ["a;b.png"]),
    "unicode-text.csv": ("Key\tSize\r\na;\u00fc.png\t1\r\n".encode("utf-16"), ["a;\u00fc.png"]),
    "wide.jsonl": ('{"key": "\u00fc.png"}\r\n'.encode("utf-16"), ["\u00fc.png"]),
    "none.csv": (b"key\n", []),
    "nothing.csv": (b"", []),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_read_as_people_write_it(name: str, tmp_path: Path) -> None:
    data, keys = MANIFESTS[name]
    (tmp_path / name).write_bytes(data)
    assert [info.key for info in manifest.objects(str(tmp_path / name), "photos", None)] == keys


UNUSABLE_MANIFESTS: dict[str, tuple[bytes, str]] = {
    "comma.csv": (b"key\nb.png\na,b.png\n", "record 2: it has more fields than the first line"),
    "headless.csv": (b"a.png\nb.png\n", "record 1 has no `key`"),
    "size.csv": (b'key,size\na.png,"1,024"\n', "record 1: the size '1,024' is not a number of bytes"),
    "day.csv": (b"key,last_modified\na.png,31/12/2026\n", "record 1: last_modified '31/12/2026' is not a time such as"),
    "other.csv": (b"key,bucket\na.png,photos\nb.png,music\n", "record 2: it is of bucket music, the scan of photos"),
    "latin.csv": ("key\nf\xfc.png\n".encode("latin-1"), "it is not UTF-8; save it as that"),
    "cut.jsonl": (b'{"key": "a.png"}\n{"key": "b', "line 2 is not JSON"),
    "keys.jsonl": (b'{"key": "a.png"}\n"b.png"\n', "record 2 has no `key`"),
    "epoch.jsonl": (b'{"key": "a.png", "last_modified": 1767323045}', "record 1: last_modified is not a time"),
    "keys.txt": (b"a.png", "a manifest is .csv"),
    "keys.parquet": (b"PAR1", "cannot be read"),
    "packed.csv.gz": (b"key\na.png\n", "cannot be read: Not a gzipped file"),
    "manifest.json": (b'["a.png"]', "is not an S3 Inventory's"),
}


@pytest.mark.parametrize("name", UNUSABLE_MANIFESTS)
def test_a_manifest_that_cannot_be_used_says_why(name: str, tmp_path: Path) -> None:
    data, why = UNUSABLE_MANIFESTS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ManifestError, match=re.escape(why)):
        list(manifest.objects(str(tmp_path / name), "photos", None))
    (tmp_path / "manifest.json").write_text('{"sourceSchema": 1}')
    with pytest.raises(ManifestError, match="it has no field 'sourceBucket'"):
        list(manifest.objects(str(tmp_path / "manifest.json"), "photos", None))
