"""Build and load the index of a data set: each file is decoded once and gets a row in index.parquet, or is quarantined.

Building is resumable: rows are written to part files as they come, and a file whose size and modification time have not
changed is not read again.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from patchscan.common.console import ProgressReport, say
from patchscan.common.errors import UserError
from patchscan.common.files import atomic_write, locked
from patchscan.common.processes import available_cpus
from patchscan.dataset.duplicates import find_duplicates
from patchscan.dataset.layout import UNREADABLE, SourceFile, check_folder, find_files
from patchscan.dataset.source import DataSource
from patchscan.detector.decoders import DecoderBugError, decoder_pool
from patchscan.detector.images import ErrorCode, ImageError
from patchscan.storage.store import is_bucket

INDEX_FILE = "index.parquet"
QUARANTINE_FILE = "quarantine.parquet"
DUPLICATES_FILE = "duplicates.parquet"
PARTS_FOLDER = "index.parts"
PART_SECONDS = 5.0
CHUNK = 512  # files that threads take before the next ones are handed out

# One file's record. `code` and `message` are set where it cannot be scored, the image's properties where it can.
RECORD = pa.schema(
    [
        ("path", pa.string()),
        ("generator", pa.string()),
        ("split", pa.string()),
        ("class", pa.string()),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("jpeg_quality", pa.int16()),
        ("jpeg_subsampling", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("modified_ns", pa.int64()),
        ("code", pa.string()),
        ("message", pa.string()),
    ]
)
INDEX_COLUMNS = [name for name in RECORD.names if name not in ("code", "message")]
# What a listing says of a file, and what says that a file is the one that was read.
LISTED = ("path", "generator", "split", "class", "bytes", "modified_ns")
SAME_FILE = ("path", "bytes", "modified_ns")
FACTS = [name for name in RECORD.names if name not in LISTED or name in SAME_FILE]
QUARANTINE_COLUMNS = ["path", "generator", "split", "class", "bytes", "sha256", "modified_ns", "code", "message"]


class IndexFileError(UserError):
    """An index that cannot be written or read."""


@dataclass(frozen=True)
class Index:
    """A built index: `path` of index.parquet, its `table`, the `quarantine` and `duplicates` tables written beside it,
    how many files were `read` in this run (the others were already indexed), and the `seconds` it took."""

    path: Path
    table: pd.DataFrame
    quarantine: pd.DataFrame
    duplicates: pd.DataFrame
    read: int
    seconds: float


def build_index(data: str | Path, out: Path | None = None, workers: int | None = None) -> Index:
    """Index the data set under `data`, a folder or an s3:// URL, into the local file `out` (by default that of
    `default_index_path`), `workers` files at once.

    Writes quarantine.parquet (path, code, message, ...) and duplicates.parquet beside it (see `companion`). After an
    interruption, even a SIGKILL, the same call continues where it stopped. Raises LayoutError where `data` is not in
    GenImage's layout, DataError where a file cannot be read, IndexFileError where the index cannot be written.
    """
    started = time.monotonic()
    check_folder(data)  # before a misspelt one is made, for the index
    out = out or default_index_path(data)
    parts = companion(out, PARTS_FOLDER)
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IndexFileError(
            f"cannot write {out}: {error.strerror}; `patchscan index DATA --out FILE` writes it elsewhere, and other "
            "commands take --index FILE"
        ) from error
    with locked(out.parent):  # two commands that find no index would build it in the same files
        try:
            layout = find_files(data)
        except UserError:
            with suppress(OSError):  # an unfinished index is kept
                parts.rmdir()
            raise
        for note in layout.notes:
            say(f"index: {note}", error=True)
        parts.mkdir(exist_ok=True)  # another process may have finished, and removed it
        files, facts = _table(layout.files), _read_facts(out, parts)
        if unread := files.join(facts, list(SAME_FILE), join_type="left anti")["number"].to_pylist():
            _read_missing(DataSource(data), [layout.files[number] for number in sorted(unread)], parts, workers)
            facts = _read_facts(out, parts)
        records = files.join(facts, list(SAME_FILE)).sort_by("number").select(RECORD.names)
        index = _write_index(records, out)
        shutil.rmtree(parts)
    return Index(out, *index, read=len(unread), seconds=time.monotonic() - started)


def default_index_path(data: str | Path) -> Path:
    """Return `data`/index.parquet; where there is none and that folder cannot be written, a file in the user's cache,
    which is told on standard error. Raises IndexFileError for a bucket, whose index needs an explicit path."""
    if is_bucket(data):
        raise IndexFileError(
            f"the index of {data} must be a local file: name it (patchscan index: --out FILE; others: --index FILE)"
        )
    beside = Path(data) / INDEX_FILE
    if beside.exists() or not Path(data).is_dir() or os.access(data, os.W_OK, effective_ids=True):
        return beside
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # HOME is not set, and the system does not know the user
        raise IndexFileError(
            f"{data} cannot be written, and there is no home folder for its index: name it (patchscan index: --out "
            "FILE; others: --index FILE)"
        ) from error
    name = hashlib.sha256(os.fsencode(Path(data).resolve())).hexdigest()[:16]
    cached = cache / "patchscan" / "indexes" / name / INDEX_FILE
    say(f"index: {data} cannot be written, so its index is {cached}", error=True)
    return cached


def companion(index: Path, name: str) -> Path:
    """Return the path of a file that goes with an index: `name` beside an index.parquet, `sd.<name>` beside a
    sd.parquet, so that the indexes of several data sets may lie in one folder."""
    return index.with_name(name if index.name == INDEX_FILE else f"{index.stem}.{name}")


def load_index(data: str | Path, index: Path | None = None) -> pd.DataFrame:
    """Load the table of `index` (by default that of `default_index_path`), one row for each readable image. Builds a
    missing one.

    Columns: INDEX_COLUMNS; `path` is relative to `data`, `jpeg_quality` is NaN and `jpeg_subsampling` None where the
    image is not a JPEG. Raises IndexFileError where the file is not an index, and what `build_index` raises.
    """
    path = index or default_index_path(data)
    if not path.exists():
        return build_index(data, path).table
    try:
        result: pd.DataFrame = pq.read_table(path, columns=INDEX_COLUMNS).to_pandas()
        return result
    except (OSError, pa.ArrowInvalid) as error:
        raise IndexFileError(
            f"{path} is not an index that this version can read ({error}): delete it and run `patchscan index` again"
        ) from error


def data_digest(index: pd.DataFrame) -> str:
    """Return the SHA-256 of an index's sorted (path, sha256, class, split): equal digests mean equal training data."""
    rows = sorted(index[["path", "sha256", "class", "split"]].itertuples(index=False, name=None))
    return hashlib.sha256("\n".join(map(json.dumps, rows)).encode()).hexdigest()


def _table(files: list[SourceFile]) -> pa.Table:
    """The listed files, numbered in their order, as columns: as a Python object each, a data set of millions of images
    takes gigabytes."""
    columns = {name: [getattr(file, _attribute(name)) for file in files] for name in LISTED}
    schema = pa.schema([RECORD.field(name) for name in LISTED])
    return pa.table(columns, schema).append_column("number", pa.array(range(len(files)), pa.int64()))


def _attribute(column: str) -> str:
    return "label" if column == "class" else column


def _read_facts(out: Path, parts: Path) -> pa.Table:
    """What is known of each file, by SAME_FILE, from the last finished index and the parts of an unfinished one. Raises
    IndexFileError where there is another file in the index's place."""
    files = [out, companion(out, QUARANTINE_FILE), *sorted(parts.glob("*.parquet"))]
    tables = [RECORD.empty_table()]
    for file in filter(Path.exists, files):
        try:
            if not set(SAME_FILE) <= set(pq.read_schema(file).names):
                raise pa.ArrowInvalid("columns are missing")
            tables.append(pq.read_table(file, schema=RECORD))
        except (OSError, pa.ArrowException) as error:
            raise IndexFileError(f"{file} is in the index's place and is none: move it, or delete it") from error
    known = pa.concat_tables(tables).select(FACTS)
    numbered = known.append_column("number", pa.array(range(len(known)), pa.int64()))
    return known.take(numbered.group_by(list(SAME_FILE)).aggregate([("number", "max")])["number_max"])


def _read_missing(source: DataSource, missing: list[SourceFile], parts: Path, workers: int | None) -> None:
    """Read the files and write their records to a new part file every PART_SECONDS."""
    # Its imagehash is of the extra train, without which a scan with labels imports this module.
    from patchscan.dataset.image_facts import describe_image

    rows: list[dict[str, Any]] = []
    broken, last_part = 0, time.monotonic()
    workers = workers or available_cpus()
    read = partial(read_file, source, partial(decoder_pool().run, describe_image))
    try:
        with ProgressReport("index", len(missing)) as progress, ThreadPoolExecutor(workers) as threads:
            for start in range(0, len(missing), CHUNK):
                chunk = missing[start : start + CHUNK]
                for file, facts in zip(chunk, threads.map(read, chunk), strict=True):
                    rows.append(facts | {name: getattr(file, _attribute(name)) for name in LISTED})
                    broken += "code" in facts
                    progress.advance(notes=f"{broken} quarantined" if broken else None)
                    if time.monotonic() - last_part > PART_SECONDS:
                        _write_part(rows, parts)
                        rows, last_part = [], time.monotonic()
    finally:
        _write_part(rows, parts)


def read_file(source: DataSource, describe: Callable[[bytes], dict[str, Any]], file: SourceFile) -> dict[str, Any]:
    """Read one file of the data set and describe it (`describe_image`, in a process of its own), with its sha256. One
    that cannot be scored has code and message instead: `unreadable` where it was so when it was listed, or an
    ErrorCode."""
    try:
        data = source.read(file.path)
    except ImageError as error:
        return {"sha256": source.digest(file.path), "code": str(error.code), "message": error.message}
    except UserError as error:
        if file.modified_ns != UNREADABLE:
            raise
        return {"code": "unreadable", "message": str(error)}
    digest = {"sha256": hashlib.sha256(data).hexdigest()}
    try:
        return digest | describe(data)
    except ImageError as error:
        return digest | {"code": str(error.code), "message": error.message}
    except DecoderBugError as error:  # a file that breaks a library in a new way must not cost the index
        return digest | {"code": str(ErrorCode.DECODER_DIED), "message": str(error).strip().rpartition("\n")[2]}


def _write_part(rows: list[dict[str, Any]], parts: Path) -> None:
    write_parquet(pa.Table.from_pylist(rows, RECORD), parts / f"{uuid4().hex}.parquet")


def _write_index(records: pa.Table, out: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    readable = records["code"].is_null()
    table = records.filter(readable).select(INDEX_COLUMNS)
    quarantine = records.filter(pc.invert(readable)).select(QUARANTINE_COLUMNS)
    index = table.to_pandas()
    duplicates = find_duplicates(index)
    write_parquet(quarantine, companion(out, QUARANTINE_FILE))
    write_parquet(pa.Table.from_pandas(duplicates, preserve_index=False), companion(out, DUPLICATES_FILE))
    write_parquet(table, out)
    return index, quarantine.to_pandas(), duplicates


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a Parquet file atomically."""
    with atomic_write(path) as file:
        pq.write_table(table, file)
