"""Evaluate run folders on a data set: score its images, calibrate the cards and write a report."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from patchscan.common.errors import UserError
from patchscan.detector.card import Card
from patchscan.evaluation.calibration import Target, fit_decision
from patchscan.evaluation.report import build_report, write_report
from patchscan.evaluation.results import Evaluated, card_metrics
from patchscan.evaluation.scoring import apply_decision, read_scores, score_images, scores_key, usable, write_scores


class EvaluationError(UserError):
    """The data or run folders cannot be evaluated; the message says what to do."""


@dataclass(frozen=True)
class Options:
    """Options of `evaluate`.

    `device`: where to score, `cpu` or `cuda`. `calibrate`: fit a new decision, for the error rates `target`. `limit`:
    most images per generator and class (None: all). `index`: the index file of the first data set if it is not beside
    the data. `robustness`: images per generator and class to measure robustness on (0: do not measure it).
    """

    device: str = "cpu"
    calibrate: bool = True
    target: Target = field(default_factory=Target)
    limit: int | None = None
    index: Path | None = None
    robustness: int = 0


def evaluate(
    runs: list[Path], data: Mapping[str, str | Path], out: Path, options: Options = Options()
) -> dict[str, Any]:
    """Evaluate every run on every data set and write the report into `out`; returns report.json's content.

    data maps a protocol ('raw', 'matched') to a folder or s3:// URL in GenImage's layout; its validation split is
    scored. The decision and metrics are written to each run's card. Raises EvaluationError, and what reading cards and
    data raises.
    """
    cards = [Card.read(run) for run in runs]
    names = [card.name for card in cards]
    if len(set(names)) < len(names):
        raise EvaluationError(f"two runs have the same name ({', '.join(names)}): change the name in one card.json")
    first = next(iter(data))
    images = {
        protocol: validation_images(where, options.limit, options.index if protocol == first else None)
        for protocol, where in data.items()
    }
    (out / "scores").mkdir(parents=True, exist_ok=True)
    models = [_evaluate(run, card, data, images, out, options) for run, card in zip(runs, cards, strict=True)]
    report = build_report(models, _describe(data, images))
    for run, model, part in zip(runs, models, report["models"], strict=True):
        metrics = {protocol: card_metrics(result["rows"]) for protocol, result in part["results"].items()}
        replace(model.card, metrics=metrics).write(run)
    write_report(report, models, runs, out)
    return report


def validation_images(data: str | Path, limit: int | None = None, index_file: Path | None = None) -> pd.DataFrame:
    """List the validation split of a data set, quarantined files included.

    Returns columns path, generator, split, class, sha256, in_train (the same file is also in the training split).
    `limit` keeps at most that many images per generator and class, evenly spread; `index_file` is the index file if it
    is not DATA/index.parquet. Raises EvaluationError if there is no validation split.
    """
    from patchscan.dataset.index import QUARANTINE_FILE, default_index_path, load_index

    index_file = index_file or default_index_path(data)
    index = load_index(data, index_file)
    quarantine = index_file.with_name(QUARANTINE_FILE)
    columns = ["path", "generator", "split", "class", "sha256"]
    parts = [index[columns]]
    if quarantine.exists():
        parts.append(pq.read_table(quarantine, columns=columns).to_pandas())
    images = pd.concat(parts, ignore_index=True)
    train_digests = set(images.sha256[images.split == "train"])
    images = images[images.split == "val"].sort_values("path").reset_index(drop=True)
    if images.empty:
        raise EvaluationError(f"{data} has no val split: put images under {data}/<generator>/val/ai and .../val/nature")
    images["in_train"] = images.sha256.isin(train_digests)
    return images if limit is None else limit_per_group(images, limit)


def limit_per_group(images: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Keep at most `limit` images of each generator and class, evenly spread over their sorted paths."""
    chosen = [
        part.iloc[np.linspace(0, len(part) - 1, min(limit, len(part))).round().astype(int)]
        for _, part in images.groupby(["generator", "class"])
    ]
    return pd.concat(chosen).sort_values("path").reset_index(drop=True)


def _evaluate(
    run: Path,
    card: Card,
    data: Mapping[str, str | Path],
    images: dict[str, pd.DataFrame],
    out: Path,
    options: Options,
) -> Evaluated:
    logits = {
        protocol: _scores(
            run,
            card,
            data[protocol],
            images[protocol],
            out / "scores" / f"{card.name}-{protocol}.parquet",
            options.device,
        )
        for protocol in data
    }
    basis = card.training.get("protocol", "raw")
    basis = basis if basis in logits else next(iter(logits))
    calibration = _calibration_rows(card, logits[basis])
    fit = options.calibrate and logits[basis].label[calibration].nunique() == 2
    if fit:
        rows = logits[basis][calibration]
        seen = ", ".join(sorted(rows.generator.unique()))
        description = (
            f"{int((rows.label == 1).sum())} AI and {int((rows.label == 0).sum())} real images ({seen}; val, {basis})"
        )
        decision = fit_decision(rows.logit.to_numpy(), rows.label.to_numpy(), options.target, description)
        card = replace(card, decision=decision)
    if options.robustness:
        sample = limit_per_group(images[basis], options.robustness)
        card = _with_robustness(run, card, data[basis], sample, options.device)
    tables = {
        protocol: apply_decision(
            table, card.decision, calibration if fit and protocol == basis else None, options.target
        )
        for protocol, table in logits.items()
    }
    for protocol, table in tables.items():
        path = out / "scores" / f"{card.name}-{protocol}.parquet"
        write_scores(path, table, scores_key(card, images[protocol]))
    return Evaluated(card, tables, basis if fit else None, options.target)


def _calibration_rows(card: Card, table: pd.DataFrame) -> pd.Series:
    return usable(table) & table.generator.isin(card.training.get("seen", []))


def _scores(run: Path, card: Card, data: str | Path, images: pd.DataFrame, cache: Path, device: str) -> pd.DataFrame:
    """The logits of these images; read from the file `cache` of an earlier evaluation if nothing has changed."""
    cached = read_scores(cache, scores_key(card, images))
    if cached is not None:
        return cached[["path", "generator", "split", "label", "logit", "small", "status", "error_code"]]
    from patchscan.dataset.source import DataSource
    from patchscan.detector.detector import Detector

    task = f"score {card.name}, {cache.stem.rpartition('-')[2]}"
    return score_images(Detector.load(run, device), DataSource(data).read, images, task)


def _with_robustness(run: Path, card: Card, data: str | Path, images: pd.DataFrame, device: str) -> Card:
    """The card with its robustness; measured again unless the card holds it for the same images and decision."""
    from patchscan.dataset.source import DataSource
    from patchscan.detector.detector import Detector
    from patchscan.evaluation.robustness import measure_robustness

    key = scores_key(card, images)
    previous = card.robustness
    if (previous.get("digest"), previous.get("images_key")) == (card.digest, key):
        return card
    card.write(run)
    measured = measure_robustness(Detector.load(run, device), DataSource(data).read, images)
    return replace(card, robustness={**measured, "images_key": key})


def _describe(data: Mapping[str, str | Path], images: dict[str, pd.DataFrame]) -> dict[str, Any]:
    from patchscan.dataset.index import data_digest

    first = next(iter(images))
    table = images[first]
    return {
        "name": Path(data[first]).resolve().name,
        "digest": data_digest(table),
        "images": len(table),
        "in_train": int(table.in_train.sum()),
        "repeated": int(table.sha256.duplicated().sum()),
        "generators": sorted(table.generator.unique()),
    }
