"""What the model of the scan protocol remembers instead of computing it again: the answers of Parquet and DuckDB, which
take 5 to 80 ms each, where a whole schedule takes 8.

Remembered are the smallest questions: what Parquet returns for a row, what the join decides about an object, how a row
is counted. There are some hundreds of them; whole files and tables would be new in most schedules.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import duckdb
import pyarrow as pa
from pydantic_core import from_json, to_json

from patchscan.scanning import rows
from patchscan.scanning.listing import Filters, ListingJoin
from patchscan.scanning.plan import Plan
from patchscan.scanning.table import ScanTable
from patchscan.storage.store import ObjectInfo, Store

READ, WRITE = rows.from_parquet, rows.table_to_parquet
EMPTY_TABLE = rows.SCHEMA.empty_table()
# What the join of a listing with earlier rows does not look at; of ETags and sizes it only asks whether they are equal.
NOT_COMPARED = {"key", "etag", "size", "attempts", "p_ai", "logit", "verdict", "error_message"}
MOST_ANSWERS = 100_000
answers: dict[Any, Any] = {}
scratch_folder = TemporaryDirectory(prefix="patchscan-protocol-")


def remember(question: Any, answer: Callable[[], Any]) -> Any:
    """The answer to a question that may have come before."""
    try:
        return answers[question]
    except KeyError:
        answers[question] = answer()
        return answers[question]


# Parquet


class SavedRow(dict[str, Any]):
    """A row as Parquet returns it: the same object each time."""

    __slots__ = ("case", "number")
    case: str
    number: int

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a saved row is shared by all schedules, and never changed")

    __setitem__ = __delitem__ = __ior__ = update = pop = setdefault = _refuse


# All rows that were ever saved, by number.
saved: list[SavedRow] = []


def forget() -> None:
    """Forget all, between two schedules, where it has become much."""
    if len(answers) > MOST_ANSWERS:
        answers.clear()
        saved.clear()


def save(row: dict[str, Any], schema: pa.Schema) -> int:
    """The number of the row that Parquet returns for this one."""
    if isinstance(row, SavedRow):
        return row.number
    values = tuple([str(value) if isinstance(value, dict) else value for value in row.values()])
    return int(remember((len(schema), *row, values), lambda: _save(row, schema)))


def _save(row: dict[str, Any], schema: pa.Schema) -> int:
    (found,) = READ(WRITE(pa.Table.from_pylist([row], schema))).to_pylist()
    new = SavedRow(found)
    new.number, new.case = len(saved), repr({name: found[name] for name in found if name not in NOT_COMPARED})
    saved.append(new)
    return new.number


@dataclass
class Rows:
    """pyarrow.Table."""

    rows: list[dict[str, Any]]
    schema: pa.Schema

    @classmethod
    def from_pylist(cls, found: list[dict[str, Any]], schema: pa.Schema) -> "Rows":
        return cls(found, schema)


def table_to_parquet(table: Rows, metadata: dict[bytes, bytes] | None = None) -> bytes:
    """rows.table_to_parquet, which writes the numbers of the rows."""
    return to_json((metadata or {}, [save(row, table.schema) for row in table.rows]))


def read(data: bytes) -> tuple[list[SavedRow], dict[bytes, bytes]]:
    """The rows and the metadata of a Parquet file."""
    metadata, numbers = from_json(data)
    return [saved[number] for number in numbers], {name.encode(): text.encode() for name, text in metadata.items()}


def rows_of(data: bytes) -> list[SavedRow]:
    """The rows of a Parquet file."""
    return read(data)[0]


def real_parquet(data: bytes) -> bytes:
    """The file as it is outside of the model."""
    return WRITE(pa.Table.from_pylist(rows_of(data), rows.SCHEMA))


class RememberedFooter:
    """pyarrow.parquet.read_metadata."""

    def __init__(self, data: bytes):
        found, self.metadata = read(data)
        self.num_rows = len(found)


class RememberedRows:
    """rows.from_parquet."""

    def __init__(self, data: bytes):
        self._rows, metadata = read(data)
        self.num_rows, self.schema = len(self._rows), SimpleNamespace(metadata=metadata)

    def to_pylist(self) -> list[SavedRow]:
        return self._rows


# DuckDB


class Database:
    """duckdb.connect, as a new database in one DuckDB: to start another takes 30 ms. Only the last one made works."""

    duckdb: duckdb.DuckDBPyConnection

    def __init__(self, path: Path | None = None):
        self.duckdb.execute("DETACH DATABASE IF EXISTS scratch")
        self.duckdb.execute("ATTACH ':memory:' AS scratch")
        first = self.cursor()
        self.execute, self.register, self.sql = first.execute, first.register, first.sql

    def cursor(self) -> Any:
        cursor = self.duckdb.cursor()
        cursor.execute("USE scratch")
        return cursor

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[None]:
        """Run DuckDB within the block."""
        with duckdb.connect() as cls.duckdb:
            yield


class LazyDatabase:
    """A database that begins when something is asked."""

    def __init__(self) -> None:
        self._steps: list[Callable[[Any], Any]] = []

    def execute(self, statement: str) -> None:
        self._steps.append(lambda real: real.execute(statement))

    def register(self, name: str, data: pa.Table) -> None:
        self._steps.append(lambda real: real.register(name, data))

    def sql(self, query: str, params: list[Any]) -> Any:
        real = Database()
        for step in self._steps:
            step(real)
        return real.sql(query, params=params)


class RememberedJoin:
    """ListingJoin. What it decides about an object depends on this object alone, and not on what it is called: DuckDB
    joins whole listings, and only where one of their objects is in a case that has not come before (what is listed, its
    earlier row, whether both have the same ETag and size, the model)."""

    def __init__(self, scratch: Path, filters: Filters, *, by_version: bool, part_only: bool):
        self._listed: dict[str, ObjectInfo] = {}
        self._before: dict[str, SavedRow] = {}
        self._parts: list[bytes] = []
        self._options: Any = None
        self._decided: dict[str, str] = {}

    def add_listing(self, objects: Iterator[ObjectInfo]) -> None:
        self._listed = {info.key: info for info in objects}

    def add_previous(
        self, parts: Iterator[bytes], digest: str, *, retry_archived: bool, c2pa_trust: str | None
    ) -> None:
        self._parts, self._options = list(parts), (digest, retry_archived)
        self._before = {row["key"]: row for part in self._parts for row in rows_of(part)}

    def _case(self, key: str) -> Any:
        info, before = self._listed.get(key), self._before.get(key)
        listed = info and (info.etag is None, info.last_modified, info.storage_class)
        same = info and before and (info.etag == before["etag"], info.size == before["size"])
        return listed, before and before.case, same, self._options

    def counts(self) -> dict[str, int]:
        cases = {key: self._case(key) for key in self._listed.keys() | self._before.keys()}
        if not answers.keys() >= set(cases.values()):
            self._join(cases)
        self._decided = {key: answers[case] for key, case in cases.items()}
        counted = Counter(self._decided.values())
        return {
            "listed": len(self._listed),
            "listed_bytes": sum(info.size or 0 for info in self._listed.values()),
            "unchanged": counted["unchanged"],
            "deleted": counted["deleted"],
            "filtered": 0,
            "unsampled": 0,
            "duplicates": 0,
        }

    def _join(self, cases: dict[str, Any]) -> None:
        """Have DuckDB decide, and remember what it decided about each object."""
        with TemporaryDirectory(dir=scratch_folder.name) as scratch:
            real = ListingJoin(Path(scratch), Filters())
            real.add_listing(self._listed.values())
            if self._options:
                parts = map(real_parquet, self._parts)
                real.add_previous(parts, self._options[0], retry_archived=self._options[1])
            counts, kept = real.counts(), [row for found in real.unchanged() for row in found.to_pylist()]
            todo = list(real.to_score())
        assert kept == [self._before[row["key"]] for row in kept], "a row is carried over with a change"
        assert todo == [vars(self._listed[row["key"]]) for row in todo], "an object is planned with a change"
        gone = self._before.keys() - self._listed.keys()
        decided = dict.fromkeys(gone, "deleted")
        decided |= {row["key"]: "unchanged" for row in kept} | {row["key"]: "to score" for row in todo}
        assert decided.keys() == cases.keys()
        assert counts["deleted"] == len(gone)
        answers.update({case: decided[key] for key, case in cases.items()})

    def _keys(self, decision: str) -> list[str]:
        return sorted(key for key, decided in self._decided.items() if decided == decision)

    def unchanged(self) -> Iterator[Rows]:
        yield Rows([self._before[key] for key in self._keys("unchanged")], rows.SCHEMA)

    def bytes_to_score(self) -> int:
        return sum(info["size"] for info in self.to_score())

    def to_score(self) -> Iterator[dict[str, Any]]:
        return (vars(self._listed[key]) for key in self._keys("to score"))


class MemoryFile:
    """A file, or the folder of the files, that ScanTable puts on the local disk."""

    def __init__(self, name: str = ""):
        self.name, self.data, self.files = name, b"", list[MemoryFile]()

    def __truediv__(self, name: str) -> "MemoryFile":
        self.files.append(MemoryFile(name))
        return self.files[-1]

    def mkdir(self) -> None:
        pass

    def write_bytes(self, data: bytes) -> None:
        self.data = data

    def __str__(self) -> str:
        return scratch_folder.name


class RememberedTable(ScanTable):
    """ScanTable. As long as no object has two rows, its counts add up over the rows: DuckDB counts one of each kind."""

    def __init__(self, out: Store, plan: Plan, scratch: Path):
        self._scratch: Any = scratch
        super().__init__(out, plan, scratch)

    def query_one(self, query: str, *values: Any) -> dict[str, Any]:
        (folder,) = self._scratch.files
        found = [(file.name, row) for file in folder.files for row in rows_of(file.data)]
        if not found or len({row["key"] for _, row in found}) < len(found):
            return self._count(query, {file.name: rows_of(file.data) for file in folder.files})
        counted: Counter[str] = Counter()
        for name, row in found:
            kind = query, name[:4], row["status"], row["verdict"]
            counted.update(remember(kind, partial(self._count, query, {name: [row]})))
        return dict(counted)

    def _count(self, query: str, files: dict[str, list[SavedRow]]) -> dict[str, Any]:
        paths = [Path(scratch_folder.name, name) for name in files]
        for path, found in zip(paths, files.values(), strict=True):
            path.write_bytes(WRITE(pa.Table.from_pylist(found, rows.SCHEMA)))
        counted = super().query_one(query)
        for path in paths:
            path.unlink()
        return counted
