"""Read labels of images by key, as people and audits write them, and list the images that they are of."""

import csv
import hashlib
import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from patchscan.common.errors import UserError
from patchscan.dataset.source import DataError, DataSource
from patchscan.storage import open_store
from patchscan.storage.store import UnusableNameError, is_bucket, split_url

AI_NAMES, REAL_NAMES = ("ai", "fake", "generated"), ("nature", "real", "natural")
CANNOT_TELL = "cannot_tell"
READERS = 16


class LabelError(UserError):
    """Labels that cannot be read; the message names the line."""


@dataclass(frozen=True)
class Labels:
    """`by_key`: label (1 AI, 0 real) and generator of each image. `cannot_tell`: how many images nobody could tell."""

    by_key: Mapping[str, tuple[int, str]]
    cannot_tell: int = 0


def read_labels(url: str, endpoint_url: str | None = None) -> Labels:
    """Read labels from a CSV (s3://... or a file) with columns key, label (ai, real or cannot_tell) and, optionally,
    generator (`all` where there is none).

    Raises LabelError, StoreError.
    """
    folder, slash, name = url.rpartition("/")
    data = open_store(folder or slash or ".", endpoint_url=endpoint_url).read(name)
    if data is None:
        raise LabelError(f"there is no file {url}")
    known: dict[str, tuple[int, str]] = {}
    cannot_tell = set()
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))), start=2):
            key, label = row.get("key"), (row.get("label") or "").lower()
            if not key or label not in (*AI_NAMES, *REAL_NAMES, CANNOT_TELL):
                raise LabelError(
                    f"{url}, line {number}: needs columns `key` and `label`, the label `ai`, `real` or `{CANNOT_TELL}`"
                    "; what a review page saved gets its keys from `patchscan audit-report`"
                )
            known.pop(key, None)
            cannot_tell.discard(key)
            if label == CANNOT_TELL:
                cannot_tell.add(key)
            else:
                known[key] = int(label in AI_NAMES), row.get("generator") or "all"
    except UnicodeDecodeError as error:
        raise LabelError(f"{url} is not UTF-8 at byte {error.start:,}; save it as UTF-8") from error
    except csv.Error as error:
        raise LabelError(f"{url} is not a CSV file: {error}") from error
    if not known:
        raise LabelError(f"{url} has no labels: it needs columns `key` and `label`, and a line for each object")
    return Labels(known, len(cannot_tell))


def key_root(data: str | Path) -> str | Path:
    """Return what a scan's keys are relative to: the bucket of an s3:// URL, or the folder."""
    return f"s3://{split_url(str(data))[0]}" if is_bucket(data) else data


def labelled_images(labels: str, root: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """List the images at `root` that the file `labels` says are AI or real, by key.

    Returns columns path, generator, split, class, sha256, in_train (False: it is not known), and what a report says of
    the labels: the `file`, and how many images are `labelled`, `cannot_tell`, or `unavailable`, having gone or being
    unreadable. Raises LabelError, also where none is there, and StoreError.
    """
    known = read_labels(labels)
    source = DataSource(root)

    def digest(key: str) -> str | None:
        try:
            return hashlib.sha256(source.read(key)).hexdigest()
        except (DataError, UnusableNameError):
            return None

    keys = sorted(known.by_key)
    with ThreadPoolExecutor(READERS) as pool:
        digests = list(pool.map(digest, keys))
    rows = [
        (key, known.by_key[key][1], "labelled", "ai" if known.by_key[key][0] else "nature", found, False)
        for key, found in zip(keys, digests, strict=True)
        if found
    ]
    if not rows:
        raise LabelError(f"none of the {len(keys):,} labelled images of {labels} is in {root}: keys are paths below it")
    images = pd.DataFrame(rows, columns=["path", "generator", "split", "class", "sha256", "in_train"])
    counts = {"labelled": len(keys), "cannot_tell": known.cannot_tell, "unavailable": len(keys) - len(rows)}
    return images, {"file": labels, **counts}
