"""Score the images of a data set with one model into a table with one row per image.

The table is saved as Parquet with a key of the weights' and images' digests, so that a second report can reuse it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from patchscan.common.console import ProgressReport
from patchscan.common.files import atomic_write
from patchscan.dataset.source import UnreadableError
from patchscan.detector.answer import Engine, Tier
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import SCORING, Card, Decision
from patchscan.detector.images import ErrorCode, ImageError
from patchscan.detector.prepared import Prepared
from patchscan.detector.presets import preset_to_dict
from patchscan.evaluation.calibration import Decided, Target, cross_fitted, decide

# What stands in the place of an image that has no score; both have a `code`.
Rejection = ImageError | UnreadableError

BATCH = 32
DECODERS = 4
_KEY = b"patchscan_scores"
SCORE_COLUMNS = ["path", "generator", "split", "label", "logit", "small", "graphic", "tier", "status", "error_code"]


def score_images(
    detector: BaseDetector, read: Callable[[str], bytes], images: pd.DataFrame, task: str, keep_unreadable: bool = False
) -> pd.DataFrame:
    """Score files with the detector; `read` returns the encoded bytes of a path; `task` is the progress bar's label.

    With `keep_unreadable` an image for which `read` raises UnreadableError is rejected; otherwise that is raised.
    images: columns path, generator, split, class. Returns one row per image, in order: path, generator, split, label
    (1 AI, 0 real), logit (NaN if rejected), small (had to be enlarged), graphic (see `is_graphic`),
    tier (the one that the image looks like, None if rejected), status ('scored', 'rejected') and error_code (None if
    scored).
    """
    rejecting = (ImageError, UnreadableError) if keep_unreadable else (ImageError,)
    rows: list[tuple[float, bool, bool, Tier | None, str | None]] = []
    with ProgressReport(task, len(images)) as progress:
        for batch in _prepare_batches(detector, images.path.tolist(), read, rejecting):
            logits = iter(detector.logits([image.crops.pixels for image in batch if isinstance(image, Prepared)]))
            for image in batch:
                if isinstance(image, Prepared):
                    rows.append((next(logits), image.crops.upscaled, image.graphic, image.tier, None))
                else:
                    rows.append((np.nan, False, False, None, str(image.code)))
            progress.advance(len(batch))
    scores = pd.DataFrame(rows, columns=["logit", "small", "graphic", "tier", "error_code"]).astype(
        {"logit": "float", "small": "bool", "graphic": "bool", "tier": "string", "error_code": "string"}
    )
    scores["status"] = ["scored" if code is None else "rejected" for *_, code in rows]
    for column in ("path", "generator", "split"):
        scores[column] = images[column].to_numpy()
    scores["label"] = (images["class"] == "ai").to_numpy().astype(int)
    return scores[SCORE_COLUMNS]


def _prepare_batches(
    detector: BaseDetector, paths: list[str], read: Callable[[str], bytes], rejecting: tuple[type[Rejection], ...]
) -> Iterator[list[Prepared | Rejection]]:
    """Yield decoded batches in order, with the errors `rejecting` in the place of an image; the next batch is decoded
    while the caller scores this one."""

    def prepare(path: str) -> Prepared | Rejection:
        try:
            return detector.prepare(read(path))
        except rejecting as error:
            return error

    pool = ThreadPoolExecutor(DECODERS)
    try:
        waiting: list[Future[Prepared | Rejection]] = []
        for begin in range(0, len(paths), BATCH):
            started = [pool.submit(prepare, path) for path in paths[begin : begin + BATCH]]
            if waiting:
                yield [future.result() for future in waiting]
            waiting = started
        if waiting:
            yield [future.result() for future in waiting]
    finally:
        pool.shutdown(cancel_futures=True)  # large images take seconds to be decoded and delivered


def scores_key(card: Card, images: pd.DataFrame, engine: Engine, delivered: Tier = "native") -> str:
    """Return a digest of everything that decides the logits of a table: tables of equal keys have equal logits.
    `delivered` is the tier by which the images were re-delivered before scoring."""
    rows = images[["path", "sha256"]].astype(str).sort_values("path").to_numpy().tolist()
    parts = [card.architecture, preset_to_dict(card.preset), card.weights_sha256, SCORING, engine, delivered, rows]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_scores(path: Path, key: str) -> pd.DataFrame | None:
    """Read what `score_images` returned from the table at `path`, if it exists, is whole, has this key, and all its
    images could be read; otherwise None."""
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError):  # damaged, perhaps by a disk
        return None
    if (table.schema.metadata or {}).get(_KEY) != key.encode():
        return None  # perhaps of an older version, with other columns
    scores = table.select(SCORE_COLUMNS).to_pandas()
    return scores if scores.error_code.dropna().isin(list(ErrorCode)).all() else None


def write_scores(path: Path, table: pd.DataFrame, key: str) -> None:
    """Write a scores table as Parquet, atomically."""
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), _KEY: key.encode()})
    with atomic_write(path) as file:
        pq.write_table(arrow, file)


def evenly_spread(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return at most `most` of the rows, evenly spread over the table."""
    return table.iloc[np.linspace(0, len(table) - 1, min(most, len(table))).round().astype(int)]


def usable(scores: pd.DataFrame) -> pd.Series:
    """Return which rows have a finite logit, bool (rows,)."""
    result: pd.Series = (scores.status == "scored") & np.isfinite(scores.logit)
    return result


def stratum(scores: pd.DataFrame) -> np.ndarray:
    """Return an integer per row that numbers the combinations of generator and class."""
    return scores.groupby(["generator", "label"]).ngroup().to_numpy()


def cluster_of(table: pd.DataFrame) -> np.ndarray | None:
    """Return an integer per row that numbers the collections of the images' sources, or the sources where a class has
    but one collection; None where no source is known."""
    if "source" not in table or not table.source_known.any():
        return None
    several = table.groupby("label").collection.nunique().min() > 1
    return table.groupby("collection" if several else "source").ngroup().to_numpy()


def cluster_or_image(table: pd.DataFrame) -> np.ndarray:
    """Return an integer per row that numbers what is alike: `cluster_of`, or the images, of which there may be several
    deliveries, where no source is known."""
    cluster = cluster_of(table)
    return table.groupby("path").ngroup().to_numpy() if cluster is None else cluster


def apply_decision(
    scores: pd.DataFrame, decision: Decision, calibrated_on: pd.Series | None = None, target: Target | None = None
) -> pd.DataFrame:
    """Add columns to the table: p_ai and verdict, as serving answers, and measured_p_ai, measured_ai,
    measured_uncertain and measured_threshold, which the metrics use.

    The measured columns differ for the images that the decision was fitted on, marked in `calibrated_on`, bool (rows,):
    each of those is decided by a decision fitted without it. Rows of one `path` are deliveries of one image.
    """
    table = scores.copy()
    good = usable(table).to_numpy()
    decided = Decided.empty(len(table))
    decided.put(good, decide(table.logit.to_numpy()[good], decision, table.tier.to_numpy()[good]))
    no_verdict = table.small | table.graphic
    verdict = np.where(decided.uncertain | no_verdict, "uncertain", np.where(decided.says_ai, "ai", "real"))
    # A copy, because what is measured replaces a part of it below.
    table["p_ai"] = decided.p_ai.copy()
    table["verdict"] = pd.Series(verdict, index=table.index, dtype="string").where(good)
    if calibrated_on is not None and target is not None:
        fitted_on = calibrated_on.to_numpy() & good
        part = table[fitted_on]
        tier = part.tier.to_numpy() if decision.tiers else None
        arrays = (part.logit.to_numpy(), part.label.to_numpy(), stratum(part))
        decided.put(fitted_on, cross_fitted(*arrays, target, tier, part.path.to_numpy(), cluster_or_image(part)))
    table["measured_p_ai"], table["measured_ai"] = decided.p_ai, decided.says_ai & ~table.graphic
    table["measured_uncertain"] = decided.uncertain | no_verdict
    table["measured_threshold"] = decided.threshold
    return table
