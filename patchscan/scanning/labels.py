"""Evaluate a scan against labels, which come from folder names or from a CSV file."""

import csv
import hashlib
import io
import re
from pathlib import Path
from typing import Any

import pandas as pd

from patchscan.common.errors import UserError
from patchscan.detector.card import Card
from patchscan.scanning.table import ScanTable
from patchscan.storage import open_store

FOLDERS = "folders"
AI_NAMES, REAL_NAMES = ("ai", "fake", "generated"), ("nature", "real", "natural")
# GenImage's layout: .../<generator>/<split>/<class>/file, or just .../<class>/file.
FOLDER_LABEL = re.compile(
    rf"(?:^|/)(?:(?P<generator>[^/]+)/(?:train|val|test)/)?(?P<label>{'|'.join(AI_NAMES + REAL_NAMES)})/[^/]+$",
    re.IGNORECASE,
)


class LabelError(UserError):
    """Labels that cannot be read; the message names the line."""


def from_key(key: str) -> tuple[int, str] | None:
    """Return label (1 AI, 0 real) and generator of a key by its folders' names; None where they do not say."""
    match = FOLDER_LABEL.search(key)
    if match is None:
        return None
    return int(match["label"].lower() in AI_NAMES), match["generator"] or "all"


def from_csv(url: str, endpoint_url: str | None = None) -> dict[str, tuple[int, str]]:
    """Read labels by key from a CSV (s3://... or a file) with columns key, label (ai or real) and, optionally,
    generator.

    Raises LabelError, StoreError.
    """
    folder, slash, name = url.rpartition("/")
    data = open_store(folder or slash or ".", endpoint_url=endpoint_url).read(name)
    if data is None:
        raise LabelError(f"there is no file {url}")
    labels = {}
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))), start=2):
            label = (row.get("label") or "").lower()
            if not row.get("key") or label not in AI_NAMES + REAL_NAMES:
                raise LabelError(f"{url}, line {number}: needs columns `key` and `label`, the label `ai` or `real`")
            labels[row["key"]] = int(label in AI_NAMES), row.get("generator") or "all"
    except UnicodeDecodeError as error:
        raise LabelError(f"{url} is not UTF-8 at byte {error.start:,}; save it as UTF-8") from error
    except csv.Error as error:
        raise LabelError(f"{url} is not a CSV file: {error}") from error
    if not labels:
        raise LabelError(f"{url} has no labels: it needs columns `key` and `label`, and a line for each object")
    return labels


def check(source: str, endpoint_url: str | None = None) -> None:
    """Raise LabelError or StoreError where `--labels` names a file that cannot be used, before a scan that takes hours
    ends with it."""
    if source != FOLDERS:
        from_csv(source, endpoint_url)


def scores_table(table: ScanTable, source: str, endpoint_url: str | None = None) -> pd.DataFrame:
    """Return the labelled rows as evaluation's scores table: path, generator, label, logit, small, status, error_code.

    `source` is `folders`, or the path or URL of a CSV. Raises LabelError where no object with a
    label was scored.
    """
    known = None if source == FOLDERS else from_csv(source, endpoint_url)
    records: list[dict[str, Any]] = []
    for row in table.stream(
        "SELECT key, etag, logit, coalesce(reason = 'small_image', false) AS small,"
        " coalesce(reason = 'out_of_domain', false) AS graphic, tier, status, error_code"
        " FROM rows WHERE status <> 'failed' ORDER BY key, version_id"
    ):
        label = from_key(row["key"]) if known is None else known.get(row["key"])
        if label:
            records.append({"label": label[0], "generator": label[1], **row})
    if not records:
        raise LabelError(f"no object has a label from {source}: name folders ai and nature, or list keys in a CSV")
    if not any(record["status"] == "scored" for record in records):
        raise LabelError(f"none of the {len(records):,} objects that have a label from {source} was scored")
    return pd.DataFrame(records).rename(columns={"key": "path"}).assign(split="scan")


def evaluate(scores: pd.DataFrame, card: Card, name: str, out: Path) -> dict[str, Any]:
    """Write evaluation's report on a labelled scan into `out`. It judges the card's decision and fits nothing."""
    from patchscan.evaluation.calibration import Target
    from patchscan.evaluation.report import build_report, write_report
    from patchscan.evaluation.results import Evaluated
    from patchscan.evaluation.scoring import apply_decision

    target = Target()
    model = Evaluated(card, {"raw": apply_decision(scores, card.decision)}, None, target)
    digest = hashlib.sha256(scores[["path", "etag"]].to_csv(index=False).encode()).hexdigest()
    # Whether a bucket's images were in a training set is not known: None.
    described = {"name": name, "digest": digest, "images": len(scores), "in_train": None, "repeated": None}
    report = build_report([model], {**described, "generators": sorted(scores.generator.unique())})
    write_report(report, [model], [out], out)
    return report
