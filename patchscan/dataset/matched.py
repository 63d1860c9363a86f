"""Build the matched version of a data set: a fair one, in which AI and real images differ in nothing but their pixels.

It has crops at native resolution, balanced classes and one encoding for all images, after "Fake or JPEG? Revealing
Common Biases in Generated Image Detection Datasets" (arXiv 2403.17608). The first JPEG pass of lossless images is an
addition of this project.
"""

import io
import json
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from patchscan.common.console import ProgressReport
from patchscan.common.errors import UserError
from patchscan.common.files import atomic_write
from patchscan.common.processes import map_in_processes
from patchscan.dataset.index import Index, build_index, data_digest, load_index, write_parquet
from patchscan.dataset.layout import CLASSES, data_name
from patchscan.dataset.source import DataSource, telling_of_changes
from patchscan.detector.images import decode, encode
from patchscan.storage import open_store
from patchscan.storage.store import Store, is_bucket

SETTINGS_FILE = "protocol.json"
CROPS_FILE = "crops.parquet"
LEFT_OUT_FILE = "left_out.parquet"
ORIGINAL_NAME = "source"  # the key in SETTINGS_FILE
# Other keys that are there always.
MADE_OF = {"size", "qualities", "seed", "source_digest"}

# Corners of crops lie on this grid. A JPEG's blocks are 8 pixels wide at 4:4:4 and 16 at 4:2:0, so that a crop from a
# multiple of 16 cuts no block under either. Lossless images are cut on it too, or the grid would be a clue.
GRID = 16
SUBSAMPLING = "4:4:4"
CROP_COLUMNS = [
    *("path", "source", "generator", "split", "class", "x", "y", "first_quality", "first_subsampling", "quality")
]


class ProtocolError(UserError):
    """The matched version cannot be built from these data or in this folder."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`size` is the crop's side in pixels; JPEG qualities are drawn uniformly from `qualities` (lowest, highest)."""

    size: int = 256
    qualities: tuple[int, int] = (85, 98)
    seed: int = 0

    @classmethod
    def read(cls, out: Path) -> "Settings | None":
        """Read the settings that a matched version was made with; None where the folder holds none."""
        used = _settings_of(open_store(str(out)))
        if used is None:
            return None
        return cls(size=used["size"], qualities=tuple(used["qualities"]), seed=used["seed"])


@dataclass(frozen=True)
class MatchedData:
    """A matched data set: its `index`, its `crops` (CROP_COLUMNS), and what was `left_out` (path, reason)."""

    index: Index
    crops: pd.DataFrame
    left_out: pd.DataFrame


def build_matched(
    data: str | Path, out: Path, settings: Settings = Settings(), index: Path | None = None, workers: int | None = None
) -> MatchedData:
    """Build the matched version of `data` in `out`: <generator>/{train,val}/{ai,nature}/*.jpg, indexed, with
    crops.parquet and left_out.parquet beside it. After an interruption, even a SIGKILL, the same call continues.

    Raises ProtocolError where `out` contains something else or no image is large enough, and what `load_index` raises.
    """
    table = load_index(data, index)
    crops, left_out = plan_matched(table, settings)
    if crops.empty:
        raise ProtocolError(
            f"no generator of {data} has, in one split, images of both classes of at least {settings.size} x "
            f"{settings.size} pixels: where no class is missing, use a smaller --size"
        )
    _check_or_write_settings(out, data, settings, data_digest(table))
    write_parquet(pa.Table.from_pandas(crops, preserve_index=False), out / CROPS_FILE)
    write_parquet(pa.Table.from_pandas(left_out, preserve_index=False), out / LEFT_OUT_FILE)
    for folder in crops["path"].map(lambda path: (out / path).parent).unique():
        folder.mkdir(parents=True, exist_ok=True)
    missing = [crop for crop in crops.to_dict("records") if not (out / crop["path"]).exists()]
    if missing:
        writing = map_in_processes(partial(_write_crop, DataSource(data), out, settings.size), missing, workers)
        with ProgressReport("match", len(missing)) as progress, closing(writing):
            for _ in writing:
                progress.advance()
    return MatchedData(build_index(out, workers=workers), crops, left_out)


def matched_version(data: str | Path, out: Path | None = None, index: Path | None = None) -> str | Path:
    """Return the matched version of `data`: `data` itself where it is matched already, else the folder `out` (by
    default DATA-matched, beside the folder DATA), which is built first where it is missing or incomplete.

    Raises ProtocolError where `out` was made of other data, and for a bucket without `out`.
    """
    if protocol_of(data) == "matched":
        return data
    if out is None and is_bucket(data):
        raise ProtocolError(f"build the matched version of {data} with `patchscan match {data} OUT`, then name OUT")
    out = out or Path(data).resolve().with_name(Path(data).resolve().name + "-matched")
    build_matched(data, out, Settings.read(out) or Settings(), index)
    return out


def protocol_of(data: str | Path) -> str:
    """Return `matched` where `data` is a matched version (a folder, or its copy in a bucket), else `raw`."""
    return "raw" if _settings_of(open_store(str(data))) is None else "matched"


def _settings_of(data: Store) -> dict[str, Any] | None:
    """What the SETTINGS_FILE of a matched version says; None of other data, which may have a file of that name."""
    try:
        found = json.loads(data.read(SETTINGS_FILE) or b"null")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.keys() >= MADE_OF else None


def originals(data: str | Path) -> tuple[str, dict[str, str]] | None:
    """Return, of a matched version, the name of the data set that it was made of, and the path in that of each crop's
    original by the crop's path; None for other data."""
    store = open_store(str(data))
    settings, crops = _settings_of(store), store.read(CROPS_FILE)
    if settings is None or crops is None:
        return None
    # Those of version 0.1 do not name it: by default it is the folder beside them.
    name = settings.get(ORIGINAL_NAME) or data_name(data).removesuffix("-matched")
    table = pq.read_table(io.BytesIO(crops), columns=["path", "source"])
    return name, dict(zip(table["path"].to_pylist(), table["source"].to_pylist(), strict=True))


def plan_matched(index: pd.DataFrame, settings: Settings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Plan the crops (a table with CROP_COLUMNS), and what is left out (path, generator, split, class, reason). The
    same index and settings give the same plan.

    In each generator and split, images smaller than the crop are left out, and so are val images whose bytes are also
    in a train split. Then as many AI images as real ones are kept, at random. Corners and qualities are drawn from the
    same distribution for both classes.
    """
    train_digests = set(index["sha256"][index["split"] == "train"])
    small = index[["width", "height"]].min(axis=1) < settings.size
    copied = (index["split"] == "val") & index["sha256"].isin(train_digests)
    left_out = [
        _with_reason(index[small], f"smaller than {settings.size} x {settings.size}"),
        _with_reason(index[copied & ~small], "a copy of a training image"),
    ]
    crops = []
    for (generator, split), rows in index[~small & ~copied].groupby(["generator", "split"]):
        random = np.random.default_rng([settings.seed, crc32(f"{generator}/{split}".encode())])
        kept = _balance(rows.sort_values("path"), random)
        left_out.append(_with_reason(rows.drop(kept.index), "more of its class than of the other"))
        if len(kept):
            crops.append(_crops(kept, settings, random))
    planned = pd.concat(crops, ignore_index=True) if crops else pd.DataFrame(columns=CROP_COLUMNS)
    return planned, pd.concat(left_out, ignore_index=True)


def _with_reason(rows: pd.DataFrame, reason: str) -> pd.DataFrame:
    return rows[["path", "generator", "split", "class"]].assign(reason=reason)


def _balance(rows: pd.DataFrame, random: np.random.Generator) -> pd.DataFrame:
    """Keep equally many images of each class, in random order: first all AI images, then all real ones."""
    classes = [rows[rows["class"] == label] for label in CLASSES]
    count = min(len(part) for part in classes)
    return pd.concat([part.iloc[random.permutation(len(part))[:count]] for part in classes])


def _crops(kept: pd.DataFrame, settings: Settings, random: np.random.Generator) -> pd.DataFrame:
    number = np.tile(np.arange(len(kept) // 2), 2)
    low, high = settings.qualities
    places = kept["generator"] + "/" + kept["split"] + "/" + kept["class"] + "/"
    crops = pd.DataFrame(
        {
            "path": places + [f"{n:06d}.jpg" for n in number],
            "source": kept["path"],
            "generator": kept["generator"],
            "split": kept["split"],
            "class": kept["class"],
            "x": GRID * random.integers(0, (kept["width"] - settings.size) // GRID + 1),
            "y": GRID * random.integers(0, (kept["height"] - settings.size) // GRID + 1),
            "quality": random.integers(low, high + 1, len(kept)),
        }
    )
    return pd.concat([crops, _first_pass(kept, random)], axis=1)[CROP_COLUMNS]


def _first_pass(kept: pd.DataFrame, random: np.random.Generator) -> pd.DataFrame:
    """For images that are not JPEGs, the quality and subsampling of a JPEG of this group, drawn at random."""
    # Otherwise photographs would be compressed twice and lossless fakes once, which a detector can see.
    jpegs = kept[["jpeg_quality", "jpeg_subsampling"]].dropna()
    lossless = kept["jpeg_quality"].isna()
    first = pd.DataFrame({"first_quality": np.nan, "first_subsampling": None}, index=kept.index)
    if len(jpegs):
        drawn = jpegs.iloc[random.integers(0, len(jpegs), int(lossless.sum()))]
        first.loc[lossless, "first_quality"] = drawn["jpeg_quality"].to_numpy()
        first.loc[lossless, "first_subsampling"] = drawn["jpeg_subsampling"].to_numpy()
    return first.astype({"first_quality": "Int16", "first_subsampling": "object"})


def _check_or_write_settings(out: Path, data: str | Path, settings: Settings, digest: str) -> None:
    """Write settings and data digest into a new `out`, or check that an existing `out` was made with the same."""
    if not is_bucket(data) and out.resolve().is_relative_to(Path(data).resolve()):
        raise ProtocolError(f"{out} lies within {data} and would become part of it: choose a folder outside")
    made_of = {"protocol": "matched", **asdict(settings), "source_digest": digest}
    record = json.dumps({**made_of, ORIGINAL_NAME: data_name(data)}, indent=1) + "\n"
    file = out / SETTINGS_FILE
    there = _settings_of(open_store(str(out))) or {}
    if file.exists() and any(there.get(key) != json.loads(record)[key] for key in made_of):
        raise ProtocolError(f"{out} was made of other data or with other settings ({file}): choose another folder")
    if not file.exists() and out.exists() and any(out.iterdir()):
        raise ProtocolError(f"{out} is not empty and was not made by `patchscan match`: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial_file:
        partial_file.write_text(record)


def _write_crop(source: DataSource, out: Path, size: int, crop: dict[str, Any]) -> None:
    with telling_of_changes(f"{source.url}/{crop['source']}"):
        rgb = decode(source.read(crop["source"])).rgb
    x, y = crop["x"], crop["y"]
    pixels = rgb[y : y + size, x : x + size]
    if not pd.isna(crop["first_quality"]):
        pixels = decode(_jpeg(pixels, crop["first_quality"], crop["first_subsampling"])).rgb
    with atomic_write(out / crop["path"]) as partial_file:
        partial_file.write_bytes(_jpeg(pixels, crop["quality"], SUBSAMPLING))


def _jpeg(pixels: np.ndarray, quality: int, subsampling: str) -> bytes:
    """Pixels (uint8, H x W x 3) as a JPEG; subsamplings that Pillow cannot write (grey, 4:4:0, ...) become 4:2:0."""
    written = subsampling if subsampling in ("4:4:4", "4:2:2", "4:2:0") else "4:2:0"
    return encode(Image.fromarray(pixels), "JPEG", quality=int(quality), subsampling=written)
