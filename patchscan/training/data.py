"""Which images a run learns from and is chosen by: those of the seen generators, whatever else lies beside them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from patchscan.dataset.index import data_digest, load_index
from patchscan.dataset.matched import matched_version, protocol_of
from patchscan.dataset.source import DataError, DataSource
from patchscan.training.recipe import Recipe

LABELS = {"nature": 0, "ai": 1}


@dataclass(frozen=True)
class TrainingData:
    """The index rows `train` and `val` of the seen generators, as `rows_of` gives them, their paths relative to
    `source`; `digest` names these very images, `protocol` is what the data set was made by (`raw` or `matched`)."""

    source: DataSource
    protocol: str
    train: pd.DataFrame
    val: pd.DataFrame
    digest: str

    @classmethod
    def load(cls, recipe: Recipe, data: str, index: Path | None, protocol: Literal["raw", "matched"]) -> "TrainingData":
        """From `data`, a folder or s3:// URL, as it is or in its matched version; what is missing is built. Raises
        DataError as `rows_of` does, and what building an index or a matched version raises."""
        if protocol == "matched":
            made = str(matched_version(data, index=index))
            data, index = made, index if made == data else None
        table = load_index(data, index)
        train, val = (rows_of(table, recipe.seen, split) for split in ("train", "val"))
        return cls(DataSource(data), protocol_of(data), train, val, data_digest(pd.concat([train, val])))


def rows_of(index: pd.DataFrame, generators: list[str], split: str) -> pd.DataFrame:
    """The index rows of these generators and this split, with `label` (1 AI, 0 real). Raises DataError where a
    generator is missing or has one class only."""
    rows = index[index.generator.isin(generators) & (index.split == split)].reset_index(drop=True)
    for generator in generators:
        classes = set(rows[rows.generator == generator]["class"])
        if classes != set(LABELS):
            found = ", ".join(sorted(index.generator.unique())) or "none"
            raise DataError(
                f"{generator}/{split} needs images in both ai/ and nature/, found {sorted(classes) or 'none'}; "
                f"generators in this data: {found}. Name yours with --seen and --unseen"
            )
    return rows.assign(label=rows["class"].map(LABELS))
