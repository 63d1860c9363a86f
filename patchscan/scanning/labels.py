"""Evaluate a scan against labels, which come from folder names or from a CSV file."""

import hashlib
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from patchscan.dataset.labels import AI_NAMES, REAL_NAMES, LabelError, Labels, describe_labels, read_labels
from patchscan.dataset.layout import UNNAMED, taken_by_reports
from patchscan.detector.card import Card
from patchscan.scanning.plan import Plan, read_all
from patchscan.scanning.rows import from_parquet
from patchscan.scanning.table import ScanTable
from patchscan.storage.store import Store

FOLDERS = "folders"
# Why a labelled image is unavailable that has no row, or only one of another model than the scan's.
NOT_SCANNED, OTHER_MODEL = "not_scanned", "other_model"
# GenImage's layout: .../<generator>/<split>/<class>/file, or just .../<class>/file.
FOLDER_LABEL = re.compile(
    rf"(?:^|/)(?:(?P<generator>[^/]+)/(?:train|val|test)/)?(?P<label>{'|'.join(AI_NAMES + REAL_NAMES)})/[^/]+$",
    re.IGNORECASE,
)


class NotScoredError(LabelError):
    """Objects have labels, and none of them a score of the scan's model."""


def from_key(key: str) -> tuple[int, str] | None:
    """Return label (1 AI, 0 real) and generator of a key by its folders' names; None where they do not say. Raises
    LabelError where the generator is called as a row of reports."""
    match = FOLDER_LABEL.search(key)
    if match is None:
        return None
    generator = match["generator"] or UNNAMED
    if taken := taken_by_reports([generator]):
        raise LabelError(taken)
    return int(match["label"].lower() in AI_NAMES), generator


def check(source: str, endpoint_url: str | None = None) -> None:
    """Raise LabelError or StoreError where `--labels` names a file that cannot be used, before a scan that takes hours
    ends with it."""
    if source != FOLDERS:
        read_labels(source, endpoint_url)


def check_listed(out: Store, plan: Plan, source: str) -> None:
    """Raise LabelError where `--labels` says nothing of any object in a plan, before the scan."""
    known = None if source == FOLDERS else read_labels(source, plan.source.endpoint_url).by_key
    folder = f"scans/{plan.scan}"
    for data in chain(read_all(out, f"{folder}/shards/"), read_all(out, f"{folder}/rows/")):
        keys = from_parquet(data).column("key").to_pylist()
        if any(from_key(key) if known is None else key in known for key in keys):
            return
    raise _no_labels(source)


def _no_labels(source: str) -> LabelError:
    return LabelError(
        f"no object has a label from {source}: name folders ai and nature, or list whole keys in a CSV, as rows have"
        " them"
    )


def scores_table(table: ScanTable, source: str, endpoint_url: str | None = None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the labelled rows as evaluation's scores table (path, generator, label, logit, small, status, error_code),
    and what its report says of the labels; an image is unavailable if its row failed, another model scored it, or there
    is none.

    `source` is `folders`, or the path or URL of a CSV. Raises NotScoredError, and LabelError where no object has a
    label.
    """
    known = None if source == FOLDERS else read_labels(source, endpoint_url)
    records: list[dict[str, Any]] = []
    by_key: dict[str, tuple[int, str]] = {} if known is None else dict(known.by_key)
    without: dict[str, str] = {}
    found = 0
    for row in table.stream(
        "SELECT key, etag, logit, coalesce(reason = 'small_image', false) AS small,"
        " coalesce(reason = 'out_of_domain', false) AS graphic, tier, status, error_code,"
        " status = 'scored' AND other_model AS is_others FROM rows ORDER BY key, version_id"
    ):
        label = from_key(row["key"]) if known is None else by_key.get(row["key"])
        if label:
            found += 1
            by_key[row["key"]] = label
            if row.pop("is_others") or row["status"] == "failed":
                without[row["key"]] = row["error_code"] or OTHER_MODEL
            else:
                records.append({"label": label[0], "generator": label[1], **row})
    if not found:
        raise _no_labels(source)
    if not any(record["status"] == "scored" for record in records):
        raise NotScoredError(f"none of the {found:,} objects that have a label from {source} has a score of this model")
    scores = pd.DataFrame(records).rename(columns={"key": "path"}).assign(split="scan")
    unavailable = {key: without.get(key, NOT_SCANNED) for key in by_key.keys() - set(scores.path)}
    return scores, describe_labels(source, Labels(by_key, known.cannot_tell if known else 0), unavailable)


def evaluate(scores: pd.DataFrame, said: dict[str, Any], card: Card, name: str, out: Path) -> dict[str, Any]:
    """Write evaluation's report on a labelled scan (`scores_table`) into `out`. It judges the card's decision and fits
    nothing."""
    from patchscan.evaluation.calibration import Target
    from patchscan.evaluation.report import build_report, write_report
    from patchscan.evaluation.results import Evaluated
    from patchscan.evaluation.scoring import apply_decision

    target = Target()
    model = Evaluated(card, {"raw": apply_decision(scores, card.decision)}, None, target)
    digest = hashlib.sha256(scores[["path", "etag"]].to_csv(index=False).encode()).hexdigest()
    described = {
        "name": name,
        "digest": digest,
        "images": len(scores),
        "in_train": None,  # it is not known whether a bucket's images were in a training set
        "repeated": None,
        "labels": said,
        "generators": sorted(scores.generator.unique()),
    }
    report = build_report([model], described)
    write_report(report, [model], [out], out)
    return report
