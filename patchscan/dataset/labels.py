"""Read labels of images by key, as people and audits write them, and list the images that they are of."""

import csv
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from patchscan.common.csv_rows import csv_rows, decoded_lines
from patchscan.common.errors import UserError
from patchscan.common.retries import OutageError
from patchscan.dataset.layout import MEANS, POOLED, UNNAMED
from patchscan.dataset.source import DataSource, UnreadableError
from patchscan.storage import read_url
from patchscan.storage.store import FailureCode, is_bucket, split_url

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
    generator (UNNAMED where there is none).

    Raises LabelError, StoreError.
    """
    data = read_url(url, endpoint_url)
    if data is None:
        raise LabelError(f"there is no file {url}")
    known: dict[str, tuple[int, str]] = {}
    cannot_tell = set()
    try:
        for number, row in enumerate(csv_rows(decoded_lines(data)), start=2):
            key, label = row.get("key"), (row.get("label") or "").strip().lower()
            if not key or label not in (*AI_NAMES, *REAL_NAMES, CANNOT_TELL):
                raise LabelError(
                    f"{url}, line {number}: needs columns `key` and `label`, the label `ai`, `real` or `{CANNOT_TELL}`"
                    "; what a review page saved gets its keys from `patchscan audit-report`"
                )
            if row.get("generator") in (*POOLED, *MEANS):
                raise LabelError(f"{url}, line {number}: reports have a row {row['generator']} of their own")
            known.pop(key, None)
            cannot_tell.discard(key)
            if label == CANNOT_TELL:
                cannot_tell.add(key)
            else:
                known[key] = int(label in AI_NAMES), row.get("generator") or UNNAMED
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


def describe_labels(file: str, labels: Labels, unavailable: Mapping[str, str]) -> dict[str, Any]:
    """Return what a report says of the labels of `file`: how many images are `labelled`, of how many nobody
    `cannot_tell`, and which of the labelled are `unavailable`: their keys with the reason, a code."""
    return {
        "file": file,
        "labelled": len(labels.by_key),
        "cannot_tell": labels.cannot_tell,
        "unavailable": len(unavailable),
        "unavailable_keys": dict(sorted(unavailable.items())),
    }


def labelled_images(file: str, root: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """List the images at `root` that the file of labels says are AI or real, by key.

    Returns columns path, generator, split, class, sha256, in_train (False: it is not known), and `describe_labels`; an
    image is unavailable if it cannot be read (a FailureCode). Raises LabelError, also where none can be read,
    StoreError and OutageError.
    """
    labels, source = read_labels(file), DataSource(root)

    def digest(key: str) -> str | FailureCode:
        try:
            return source.digest(key)
        except UnreadableError as error:
            return error.code

    keys = sorted(labels.by_key)
    with ThreadPoolExecutor(READERS) as pool:
        digests = dict(zip(keys, pool.map(digest, keys), strict=True))
    unavailable = {key: str(found) for key, found in digests.items() if isinstance(found, FailureCode)}
    if len(unavailable) == len(keys):
        raise _none_left(file, root, unavailable)
    rows = [
        (key, labels.by_key[key][1], "labelled", "ai" if labels.by_key[key][0] else "nature", digests[key], False)
        for key in keys
        if key not in unavailable
    ]
    images = pd.DataFrame(rows, columns=["path", "generator", "split", "class", "sha256", "in_train"])
    return images, describe_labels(file, labels, unavailable)


def _none_left(file: str, root: str | Path, unavailable: Mapping[str, str]) -> UserError:
    codes = Counter(unavailable.values())
    if FailureCode.UNAVAILABLE in codes:
        return OutageError(f"{root}: the store gives none of the labelled images; run the same command again")
    reasons = ", ".join(f"{code}: {count:,}" for code, count in codes.most_common())
    return LabelError(
        f"none of the {len(unavailable):,} labelled images of {file} can be read in {root} ({reasons}): keys are paths"
        " below it"
    )
