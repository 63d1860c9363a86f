"""Select the images that a run trains and validates on: those of the seen generators only."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from patchscan.common.console import say
from patchscan.dataset.index import data_digest, default_index_path, load_index
from patchscan.dataset.layout import find_files, generators_for_people
from patchscan.dataset.matched import matched_version, protocol_of
from patchscan.dataset.source import DataError, DataSource
from patchscan.storage.store import is_bucket
from patchscan.training.recipe import Recipe

LABELS = {"nature": 0, "ai": 1}


@dataclass(frozen=True)
class TrainingData:
    """The images of one run: `train` and `val` are index rows as `select_rows` returns them, with paths relative to
    `source`; `digest` identifies these images; `protocol` is `raw` or `matched`."""

    source: DataSource
    protocol: str
    train: pd.DataFrame
    val: pd.DataFrame
    digest: str

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        data: str,
        index: Path | None,
        protocol: Literal["raw", "matched"],
        extra: Sequence[str] = (),
    ) -> "TrainingData":
        """Load the images of `data`, a folder or s3:// URL; builds a missing index or matched version first.

        extra: folders to train on as well, see `select_extra_rows`. Raises DataError as `select_rows` does, and what
        building an index or a matched version raises.
        """
        places = [one.rstrip("/") if is_bucket(one) else Path(one).resolve() for one in (data, *extra)]
        if len(set(places)) < len(places):
            raise DataError("--data and --extra name one folder twice: its images would be trained on twice as often")
        if protocol == "matched":
            matched = str(matched_version(data, index=index))
            data, index = matched, index if matched == data else None
        table = load_index(data, index)
        train = select_rows(table, recipe.seen, "train")
        val = select_rows(table, recipe.seen, "val")
        held_out = set(table.sha256[table.split == "val"])
        added = [select_extra_rows(folder, recipe, number, held_out) for number, folder in enumerate(extra)]
        train = pd.concat([train, *added], ignore_index=True)
        if copies := int(val.sha256.isin(train.sha256).sum()):
            say(
                f"{copies:,} of {len(val):,} val images are also train images: validation and evaluation are too good "
                "on them; duplicates.parquet beside the index lists them, `patchscan match` leaves them out",
                error=True,
            )
        return cls(JoinedSource(data, extra), protocol_of(data), train, val, data_digest(pd.concat([train, val])))


def check_names(
    data: str, index: Path | None, extra: Sequence[str], seen: Sequence[str], unseen: Sequence[str]
) -> None:
    """Raise DataError where a generator of `seen` is not in `data`, or one of `unseen` neither there nor in a folder of
    `extra`: one that is misspelt would be trained on. Of data without an index the files are listed, and none is read.
    """
    if not seen and not unseen:
        return
    names = _generators(data, index)
    anywhere = names.union(*(_generators(folder, None) for folder in extra))
    for option, wanted, known in (("seen", seen, names), ("unseen", unseen, anywhere)):
        for name in wanted:
            if name not in known:
                raise DataError(
                    f"--{option}: the data have no generator {name}; there are {generators_for_people(known)}. One "
                    "that came later is found by `patchscan index`"
                )


def _generators(data: str, index: Path | None) -> set[str]:
    file = index or (None if is_bucket(data) else default_index_path(data))
    if file and file.exists():
        return set(load_index(data, file).generator)
    return {one.generator for one in find_files(data).files}


class JoinedSource(DataSource):
    """A data set and extra ones beside it, if any, whose paths begin with `extra-0/`, `extra-1/` and so on."""

    def __init__(self, url: str, extra: Sequence[str]):
        super().__init__(url)
        self._extra = {f"extra-{number}": DataSource(folder) for number, folder in enumerate(extra)}

    def read(self, path: str) -> bytes:
        """Return the encoded bytes of one image. Raises as DataSource does."""
        first, _, rest = path.partition("/")
        return self._extra[first].read(rest) if first in self._extra else super().read(path)


def select_extra_rows(folder: str, recipe: Recipe, number: int, held_out: set[str]) -> pd.DataFrame:
    """Return the index rows of extra folder `number`, in GenImage's layout, with a column `label` and paths that
    JoinedSource reads: its train images, or all where it has none, of all generators but the recipe's unseen ones.
    Copies of the validation images, whose SHA-256 are `held_out`, are left out and told of on standard error.

    A generator of the folder may have real images only: it is then a kind of real image (`is_kind`).
    """
    index = load_index(folder)
    rows = index[~index.generator.isin(recipe.unseen)]
    if (index.split == "train").any():
        rows = rows[rows.split == "train"]
    elif len(rows):
        say(
            f"--extra {folder} has no train images: its {len(rows):,} val images are trained on, and what is measured "
            "on them tells nothing; `patchscan split` holds out a part of them",
            error=True,
        )
    copies = rows.sha256.isin(held_out)
    if copies.any():
        say(f"--extra {folder}: {copies.sum():,} images are also val images of --data: left out", error=True)
        rows = rows[~copies]
    return rows.assign(path=f"extra-{number}/" + rows.path, label=rows["class"].map(LABELS))


def select_rows(index: pd.DataFrame, generators: list[str], split: str) -> pd.DataFrame:
    """Return the index rows of these generators and this split, with a column `label` (1 AI, 0 real).

    Raises DataError if a generator is missing or has one class only.
    """
    rows = index[index.generator.isin(generators) & (index.split == split)].reset_index(drop=True)
    for generator in generators:
        classes = set(rows[rows.generator == generator]["class"])
        if classes != set(LABELS):
            raise DataError(
                f"{generator}/{split} needs images in both ai/ and nature/, found {sorted(classes) or 'none'}; "
                f"generators in this data: {generators_for_people(index.generator)}. Choose among them with --seen and "
                "--unseen"
            )
    return rows.assign(label=rows["class"].map(LABELS))
