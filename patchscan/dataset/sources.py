"""Where the images of a data set come from, so that images of one source are not counted as independent."""

import csv
from pathlib import Path

import pandas as pd

from patchscan.common.csv_rows import csv_rows, decoded_lines
from patchscan.common.errors import UserError
from patchscan.dataset.matched import originals
from patchscan.storage.store import is_bucket

SOURCES_FILE = "sources.csv"
SOURCE_COLUMNS = ("source", "collection", "source_known")


class SourcesError(UserError):
    """The file of sources cannot be read or lacks a column."""


def find_sources(data: str | Path) -> Path | None:
    """Return the file of sources of a data folder: sources.csv in it, or beside it for several folders at once, or of a
    matched version in the data that it was made of, beside it; None if there is none, or the data are in a bucket."""
    if is_bucket(data):
        return None
    beside = Path(data).resolve().parent
    matched = originals(data)
    places = [
        Path(data) / SOURCES_FILE,
        beside / SOURCES_FILE,
        *([beside / matched[0] / SOURCES_FILE] if matched else []),
    ]
    return next((place for place in places if place.exists()), None)


def add_sources(images: pd.DataFrame, data: str | Path, file: Path | None) -> pd.DataFrame:
    """Add the columns source, collection and source_known (bool) to a table of images with a column path.

    `file` is a CSV with the columns `file` and `source`; `file` is a path below the data folder, or below the folder
    that holds it. An image of a matched version has its original's source. A source that is itself a path, as in
    owner/collection/name, belongs to the collection of its first two parts. Images that are not named there are each a
    source and a collection of their own. Raises SourcesError.
    """
    known = {} if file is None else _read(file)
    name, paths = Path(data).resolve().name, images.path
    if known and (matched := originals(data)):
        name, paths = matched[0], images.path.map(lambda path: matched[1].get(path, path))
    called = Path(data).name  # by a link's name, perhaps
    found = [known.get(f"{name}/{path}") or known.get(f"{called}/{path}") or known.get(path) for path in paths]
    sources = [source or f"{name}/{path}" for source, path in zip(found, paths, strict=True)]
    return images.assign(
        source=sources,
        collection=[
            "/".join(source.split("/")[:2]) if is_known else source
            for source, is_known in zip(sources, found, strict=True)
        ],
        source_known=[source is not None for source in found],
    )


def _read(file: Path) -> dict[str, str]:
    known: dict[str, str] = {}
    try:
        rows = csv_rows(decoded_lines(file.read_bytes()))
        if not {"file", "source"} <= set(rows.fieldnames or ()):
            raise SourcesError(f"{file} needs the columns `file` and `source`")
        for row in rows:
            path, source = (row["file"] or "").removeprefix("./"), row["source"]
            if None in row:
                raise SourcesError(f"{file}, line {rows.line_num}: more values than columns; quote those with commas")
            if path and source and known.setdefault(path, source) != source:
                raise SourcesError(f"{file}, line {rows.line_num}: {path} has another source further up")
    except (OSError, ValueError, csv.Error) as error:
        raise SourcesError(f"cannot read {file}: {error}") from error
    return known
