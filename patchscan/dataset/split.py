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
    be met so, because one collection has most of a generator's images, single sources of that collection are. `sources`
    is the file of sources, if it is neither in a data folder nor beside it. The index of a bucket is
    `out`/<name>.index.parquet. Returns the images: columns data, path, generator, class, collection, before and after
    (`train` or `val`). An interrupted call continues when it is repeated. Raises SplitError, SourcesError, and what
    building an index raises.
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
    images = pd.concat(tables, ignore_index=True)
    held = choose_held_out(images[images.before == "val"], held_out)
    images["after"] = np.where(images.index.isin(held), "val", "train")
    _copy(images, dict(zip(names, data, strict=True)), out)
    return images[["data", "path", "generator", "class", "collection", "before", "after"]]


def choose_held_out(images: pd.DataFrame, share: float) -> pd.Index:
    """Choose `share` of the images of each GROUP, by collection, or by source where that misses the share by half.

    images: columns of GROUP, collection, source. Returns labels of its index. The choice depends on names alone.
    """
    held = _hold(images, "collection", share, pd.Series(data=False, index=images.index))
    return images.index[_hold(images, "source", share, held)]


def _hold(images: pd.DataFrame, unit: str, share: float, held: pd.Series) -> pd.Series:
    """Hold out further units in each group that lacks half of its share, as far as no group gets more than its share
    and one image."""
    held, group = held.copy(), images.groupby(GROUP).ngroup()
    target = share * group.value_counts()
    for number in sorted(target.index):
        if held[group == number].sum() >= target[number] / 2:
            continue
        for _, name in sorted((crc32(name.encode()), name) for name in images[unit][group == number].unique()):
            chosen = images[unit] == name
            after = group[held | chosen].value_counts()
            if (after <= target[after.index] + 1).all():
                held |= chosen
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
