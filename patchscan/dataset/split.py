"""Divide the val images of data sets anew by source, so that a detector can be trained on every generator and still be
measured on sources that it has not seen."""

import re
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd

from patchscan.common.console import ProgressReport
from patchscan.common.errors import UserError
from patchscan.common.files import atomic_write, safe_path
from patchscan.dataset.index import INDEX_FILE, load_index
from patchscan.dataset.layout import data_name
from patchscan.dataset.source import DataSource
from patchscan.dataset.sources import add_sources, find_sources
from patchscan.storage.store import is_bucket

GROUP = ["data", "generator", "class"]


class SplitError(UserError):
    """The data sets cannot be divided into this folder."""


def split(data: Sequence[str], out: Path, held_out: float = 1 / 3, sources: Path | None = None) -> pd.DataFrame:
    """Copy data sets to `out`/<name of the data set>: a share `held_out` of the val images of each generator and class
    stays in val, the other ones and all train images are in train.

    Whole collections of sources (see `add_sources`) are held out or not, in all data sets alike. Where the share cannot
    be met so, because one collection has most of a generator's images, single sources of that collection are. A source
    that has train images is not held out; files of equal bytes have one source. `sources` is the file of sources, if it
    is neither in a data folder nor beside it. The index of a bucket is `out`/<name>.index.parquet. Returns the images:
    columns data, path, generator, class, collection, before and after (`train` or `val`). An interrupted call continues
    when it is repeated. Raises SplitError, SourcesError, and what building an index raises.
    """
    names = [data_name(one) for one in data]
    if len(set(names)) < len(names):
        raise SplitError(f"two data sets have one name ({', '.join(names)}): they would share a folder of {out}")
    for folder in (Path(one).resolve() for one in data if not is_bucket(one)):
        if folder.is_relative_to(out.resolve()):
            raise SplitError(f"{out} holds one of the data sets: choose another folder")
        if out.resolve().is_relative_to(folder):
            raise SplitError(f"{out} lies within {folder} and would become part of it: choose a folder outside")
    tables = []
    for name, one in zip(names, data, strict=True):
        index_file = out / f"{name}.{INDEX_FILE}" if is_bucket(one) else None
        index = load_index(one, index_file).rename(columns={"split": "before"})
        tables.append(add_sources(index, one, sources or find_sources(one)).assign(data=name))
    images = join_copies(pd.concat(tables, ignore_index=True))
    if not (images.before == "val").any():
        raise SplitError(f"{', '.join(data)}: no images are in val, of which a part is held out: move some there first")
    held = choose_held_out(images, held_out)
    images["after"] = np.where(images.index.isin(held), "val", "train")
    _copy(images, dict(zip(names, data, strict=True)), out)
    return images[["data", "path", "generator", "class", "collection", "before", "after"]]


def join_copies(images: pd.DataFrame) -> pd.DataFrame:
    """Give files of equal bytes (`sha256`) one source and collection: the first of those that are known, else the
    first."""
    ordered = images.assign(unknown=~images.source_known).sort_values(["unknown", "source"])
    first = ordered.groupby("sha256")[["source", "collection"]].transform("first")
    return images.assign(source=first.source, collection=first.collection)


def choose_held_out(images: pd.DataFrame, share: float) -> pd.Index:
    """Choose `share` of the val images of each GROUP, by collection, or by source where that misses the share by half;
    none of a source that has train images.

    images: columns of GROUP, before, collection, source. Returns labels of its index. The choice depends on names
    alone.
    """
    val = images[images.before == "val"]
    trained = val[val.source.isin(images.source[images.before == "train"])]
    held = np.zeros(len(val), bool)
    for unit in ("collection", "source"):
        held = _hold(val, unit, share, held, set(trained[unit]))
    return val.index[held]


def _hold(images: pd.DataFrame, unit: str, share: float, held: np.ndarray, trained: set[str]) -> np.ndarray:
    """Hold out further units in each group that lacks half of its share, none of them in `trained`, as far as no group
    gets more than its share and one image. `held` and the result: bool (images,)."""
    held, group = held.copy(), images.groupby(GROUP).ngroup().to_numpy()
    names = images[unit].to_numpy()
    rows_of = {name: np.asarray(rows) for name, rows in pd.Series(names).groupby(names).indices.items()}
    target = share * np.bincount(group)
    count = np.bincount(group[held], minlength=len(target))
    for number in range(len(target)):
        if count[number] >= target[number] / 2:
            continue
        for _, name in sorted((crc32(name.encode()), name) for name in {*names[group == number]} - trained):
            rows = rows_of[name][~held[rows_of[name]]]
            groups, more = np.unique(group[rows], return_counts=True)
            if (count[groups] + more <= target[groups] + 1).all():
                held[rows] = True
                count[groups] += more
    return held


def _copy(images: pd.DataFrame, data: dict[str, str], out: Path) -> None:
    opened = {name: DataSource(url) for name, url in data.items()}
    columns = images[["data", "path", "generator", "class", "before", "after"]]
    with ProgressReport(f"copy to {out}", len(images)) as progress:
        for name, path, generator, label, before, after in columns.itertuples(index=False, name=None):
            # Moved images are in a folder of their own: a train image may have the same name.
            in_train, found = re.subn(f"(^|/){before}/{label}/", rf"\g<1>train/{label}/from-{before}/", path, count=1)
            stays = path
            if not found:  # the data set has a layout of its own, and its images get GenImage's
                stays = f"{generator}/{before}/{label}/{path}"
                in_train = f"{generator}/train/{label}/from-{before}/{path}"
            kept, moved = (safe_path(out, f"{name}/{place}") for place in (stays, in_train))
            file, other = (kept, moved) if after == before else (moved, kept)
            if other.exists():
                raise SplitError(
                    f"{other} is there from another division of these images, which would now be trained on and "
                    f"measured alike: name a new folder, or remove {out}"
                )
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(file) as partial:
                    partial.write_bytes(opened[name].read(path))
            progress.advance()
