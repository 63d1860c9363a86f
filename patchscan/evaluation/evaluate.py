"""Evaluate run folders on a data set: score its images, calibrate the cards and write a report."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from patchscan.common.console import printable, say
from patchscan.common.errors import UserError
from patchscan.common.shipped import is_shipped
from patchscan.dataset.index import QUARANTINE_FILE, companion, data_digest, default_index_path, load_index
from patchscan.dataset.labels import key_root, labelled_images
from patchscan.dataset.layout import MEANS, POOLED, taken_by_reports
from patchscan.dataset.matched import originals
from patchscan.dataset.source import DataSource
from patchscan.dataset.sources import SOURCE_COLUMNS, add_sources, find_sources
from patchscan.detector.answer import TIERS, Engine, Tier
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import Card, Decision
from patchscan.detector.cascade import Cascade
from patchscan.detector.engines import choose_engine, load_detector
from patchscan.evaluation.calibration import Target, fit_decision
from patchscan.evaluation.cascade import choose_band, cost, cost_finding, join
from patchscan.evaluation.draws import measure_draws
from patchscan.evaluation.evidence import fit_bounds
from patchscan.evaluation.report import build_report, write_report
from patchscan.evaluation.results import Evaluated, card_metrics, seen_rows
from patchscan.evaluation.robustness import RATES_RULE, measure_robustness
from patchscan.evaluation.scoreboard import card_scoreboard
from patchscan.evaluation.scoring import (
    apply_decision,
    cluster_or_image,
    evenly_spread,
    read_scores,
    score_images,
    scores_key,
    usable,
    write_scores,
)
from patchscan.evaluation.tiers import deliver

# So many of the labelled images that cannot be read are named on standard error.
NAMED = 5
# Returns the encoded bytes of an image of a data set, by its path.
Read = Callable[[str], bytes]


class EvaluationError(UserError):
    """The data or run folders cannot be evaluated; the message says what to do."""


@dataclass(frozen=True)
class Options:
    """Options of `evaluate`.

    `device`: where to score, `cpu` or `cuda`. `engine`: what runs the models (None: see `choose_engine`). `calibrate`:
    fit a new decision, for the error rates `target`. `limit`: most images per generator and class (None: all). `index`:
    the index file of the first data set if it is not beside the data. `robustness`: images per generator and class to
    measure robustness on (0: do not measure it). `tiers`: the deliveries to score, `native` among them. `sources`: the
    file of sources, if it is neither in a data folder nor beside it. `groups`: names of means over generators, and of
    which. `labels`: the file that says which images to score, instead of the validation split; the cards then stay as
    they are. `when`: judge two runs as a cascade too, with this band (LOW, HIGH); `when_loss`: with the band that is
    chosen for this loss.
    """

    device: str = "cpu"
    engine: Engine | None = None
    calibrate: bool = True
    target: Target = field(default_factory=Target)
    limit: int | None = None
    index: Path | None = None
    robustness: int = 0
    tiers: tuple[Tier, ...] = TIERS
    sources: Path | None = None
    groups: Mapping[str, list[str]] = field(default_factory=dict)
    labels: str | None = None
    when: tuple[float, float] | None = None
    when_loss: float | None = None


def evaluate(runs: list[Path], data: Mapping[str, str | Path], out: Path, options: Options) -> dict[str, Any]:
    """Evaluate every run on every data set and write the report into `out`; returns report.json's content.

    data maps a name (a folder's, or a protocol, 'raw', 'matched') to a folder or s3:// URL in GenImage's layout; its
    validation split is scored as stored and re-delivered by each tier, or, with `labels`, the labelled images. The
    decision and metrics are written to each run's card, but not with `labels`, nor to the cards of the detectors that
    come with patchscan. Raises EvaluationError, and what reading cards, data and labels raises.
    """
    cards = [Card.read(run) for run in runs]
    names = [card.name for card in cards]
    if len(set(names)) < len(names):
        raise EvaluationError(f"two runs have the same name ({', '.join(names)}): change the name in one card.json")
    if (options.when is not None or options.when_loss is not None) and len(runs) != 2:
        raise EvaluationError("a cascade is of two detectors: give --run twice, the one that looks at all images first")
    labels, label_info = options.labels, None
    if labels:
        data, options = {name: key_root(where) for name, where in data.items()}, replace(options, calibrate=False)
        listed, label_info = _labelled(data, labels, options.limit)
    else:
        _check_cards_can_be_written(runs)
        indexes = {next(iter(data)): options.index}
        listed = {name: validation_images(where, options.limit, indexes.get(name)) for name, where in data.items()}
    _check_groups(options.groups, listed)
    images = {}
    for name, table in listed.items():
        file = options.sources or find_sources(data[name])
        images[name] = add_sources(table, data[name], file)
        tell_unknown_sources(images[name], data[name], file)
    reads = {name: DataSource(where).read for name, where in data.items()}
    (out / "scores").mkdir(parents=True, exist_ok=True)
    models = [_evaluate(run, card, reads, images, out, options) for run, card in zip(runs, cards, strict=True)]
    cascade = _cascade(models, options)
    joined = [] if cascade is None else [join(cascade, *models)]
    report = build_report([*models, *joined], _describe(data, images, label_info), options.groups, runs)
    if cascade is not None:
        _add_cost(report, cascade, joined[0], runs, reads, options)
    if not labels:  # what those images measure is not what the card's figures are about
        for run, model, part in zip(runs, models, report["models"], strict=False):
            if is_shipped(run):  # what scans use by default changes with the version alone
                continue
            metrics = {protocol: card_metrics(result["rows"]) for protocol, result in part["results"].items()}
            replace(model.card, metrics=metrics, scoreboard=card_scoreboard(part["scoreboard"])).write(run)
    write_report(report, [*models, *joined], [*runs, *(out for _ in joined)], out)
    return report


def _check_cards_can_be_written(runs: Sequence[Path]) -> None:
    """Raise EvaluationError where that cannot be done: it is, once all images are scored."""
    for run in runs:
        if not is_shipped(run) and not os.access(run, os.W_OK, effective_ids=True):
            raise EvaluationError(f"{run} cannot be written, and its card is to hold what is measured: evaluate a copy")


def _labelled(
    data: Mapping[str, str | Path], labels: str, limit: int | None
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """The labelled images of the one data set, and what the report says of the labels."""
    ((name, root),) = data.items()
    images, label_info = labelled_images(labels, root)
    if label_info["unavailable"]:
        say(_cannot_be_read(label_info), error=True)
    return {name: images if limit is None else limit_per_group(images, limit)}, label_info


def _check_groups(groups: Mapping[str, list[str]], images: Mapping[str, pd.DataFrame]) -> None:
    """Raise EvaluationError for a generator of a group that no data set has, because a mean over the others would be
    taken for the group's, and for a generator or group that is called as another row of the report."""
    known = {str(generator) for table in images.values() for generator in table.generator.unique()}
    if taken := taken_by_reports(known):
        raise EvaluationError(taken)
    for name, generators in groups.items():
        if name in known | {*POOLED, *MEANS}:
            raise EvaluationError(f"the report has a row {name} without --group: give the group another name")
        if missing := set(generators) - known:
            raise EvaluationError(
                f"the group {name}: there are no images of {', '.join(sorted(missing))}; "
                f"these data have {', '.join(sorted(known))}"
            )
        if not any(set(generators) <= set(table.generator) for table in images.values()):
            raise EvaluationError(f"the group {name}: no data set has all of {', '.join(generators)}")


def tell_unknown_sources(images: pd.DataFrame, data: str | Path, file: Path | None) -> None:
    """Tell where the `file` of sources names none of the images (columns path, source_known) of `data`."""
    if file is not None and not images.source_known.any():
        like = printable(images.path.iloc[0])
        why = f"its column `file` needs paths below the data folder, such as {like}, so each image counts as a source"
        say(f"{file} names no source of the {len(images):,} images of {data}: {why}", error=True)


def _cannot_be_read(label_info: dict[str, Any]) -> str:
    keys, total = label_info["unavailable_keys"], label_info["unavailable"]
    first = ", ".join(f"{printable(key)} ({code})" for key, code in islice(keys.items(), NAMED))
    more = f" and {total - NAMED:,} more, see report.json" if total > NAMED else ""
    return f"labels: {total:,} of {label_info['labelled']:,} images cannot be read: {first}{more}"


def _cascade(models: list[Evaluated], options: Options) -> Cascade | None:
    if options.when is not None:
        low, high = options.when
        return Cascade(first=models[0].card, then=models[1].card, low=low, high=high)
    if options.when_loss is not None:
        return choose_band(models[0], models[1], options.when_loss)
    return None


def _add_cost(
    report: dict[str, Any],
    cascade: Cascade,
    joined: Evaluated,
    runs: list[Path],
    reads: Mapping[str, Read],
    options: Options,
) -> None:
    """Add what the cascade costs to the report, and a finding that says it."""
    name = next(iter(joined.tables))
    found = cost(joined, (runs[0], runs[1]), reads[name], name, options.engine)
    report["cascade"] = {"first": cascade.first.name, "then": cascade.then.name, **found}
    report["cascade"] |= {"low": cascade.low, "high": cascade.high}
    if found:
        report["findings"]["models"].append(cost_finding(cascade, found, options.when_loss is not None))


def validation_images(data: str | Path, limit: int | None = None, index_file: Path | None = None) -> pd.DataFrame:
    """List the validation split of a data set, quarantined files included.

    Returns columns path, generator, split, class, sha256, in_train (the same file is also in the training split).
    `limit` keeps at most that many images per generator and class, evenly spread; `index_file` is the index file if it
    is not DATA/index.parquet. Raises EvaluationError if there is no validation split.
    """
    index_file = index_file or default_index_path(data)
    index = load_index(data, index_file)
    quarantine = companion(index_file, QUARANTINE_FILE)
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
    chosen = [evenly_spread(part, limit) for _, part in images.groupby(["generator", "class"])]
    return pd.concat(chosen).sort_values("path").reset_index(drop=True)


def _evaluate(
    run: Path, card: Card, reads: Mapping[str, Read], images: dict[str, pd.DataFrame], out: Path, options: Options
) -> Evaluated:
    engine = choose_engine(run, options.device, options.engine)
    # Loaded once, and only where something is not known from an earlier evaluation.
    detector = cache(partial(load_detector, run, options.device, options.engine))
    kept = {(name, tier): _kept_scores(out, card, name, images[name], engine, tier)
            for name in reads for tier in options.tiers}  # fmt: skip
    scores = {
        name: pd.concat(
            [_scores(detector, read, images[name], kept[name, tier], options, tier) for tier in options.tiers],
            ignore_index=True,
        ).merge(images[name][["path", *SOURCE_COLUMNS]], on="path")
        for name, read in reads.items()
    }
    basis = card.training.get("protocol", "raw")
    basis = basis if basis in scores else next(iter(scores))
    calibration = _calibration_rows(card, scores[basis])
    fit = options.calibrate and scores[basis].label[calibration].nunique() == 2
    if fit:
        card = replace(card, decision=_fit_decision(scores[basis][calibration], basis, options))
    if options.labels is None and card.draws.get("digest") != card.digest:
        stored = scores[basis][scores[basis].delivered == "native"]
        card = replace(card, draws=measure_draws(detector(), card, reads[basis], stored))
    if options.robustness:
        sample = limit_per_group(images[basis], options.robustness)
        card = replace(card, robustness=_robustness(detector, engine, card, reads[basis], sample))
    decided = {
        name: apply_decision(table, card.decision, calibration if fit and name == basis else None, options.target)
        for name, table in scores.items()
    }
    deliveries = pd.concat([table.assign(data=name) for name, table in decided.items()], ignore_index=True)
    if fit:
        fitted_on = deliveries[deliveries.data == basis]
        card = replace(card, evidence=fit_bounds(fitted_on[_calibration_rows(card, fitted_on)], card.decision))
    for (name, tier), (file, key) in kept.items():
        write_scores(file, decided[name][decided[name].delivered == tier], key)
    return Evaluated(card, _as_stored(deliveries), basis if fit else None, options.target, deliveries)


def _kept_scores(
    out: Path, card: Card, name: str, images: pd.DataFrame, engine: Engine, delivered: Tier
) -> tuple[Path, str]:
    """The file that keeps the scores of a data set as `delivered`, and their key."""
    tier = "" if delivered == "native" else f".{delivered}"
    return out / "scores" / f"{card.name}-{name}{tier}.parquet", scores_key(card, images, engine, delivered)


def _calibration_rows(card: Card, table: pd.DataFrame) -> pd.Series:
    return usable(table) & seen_rows(card, table)


def _fit_decision(rows: pd.DataFrame, basis: str, options: Options) -> Decision:
    """The decision fitted to the seen generators' images; for each tier where several deliveries were scored."""
    stored = rows[rows.delivered == "native"]
    seen = ", ".join(sorted(rows.generator.unique()))
    counts = f"{int((stored.label == 1).sum())} AI and {int((stored.label == 0).sum())} real images"
    several = len(options.tiers) > 1
    description = f"{counts} ({seen}; val, {basis}{', each in every tier' if several else ''})"
    tier = rows.tier.to_numpy() if several else None
    arrays = (rows.logit.to_numpy(), rows.label.to_numpy())
    return fit_decision(*arrays, options.target, description, tier, cluster_or_image(rows))


def _as_stored(deliveries: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The images as stored of each data set with AI images; of all data sets if none has any."""
    native = deliveries[deliveries.delivered == "native"]
    stored = {str(name): table.reset_index(drop=True) for name, table in native.groupby("data", sort=False)}
    return {name: table for name, table in stored.items() if (table.label == 1).any()} or stored


def _scores(
    detector: Callable[[], BaseDetector],
    read: Read,
    images: pd.DataFrame,
    kept: tuple[Path, str],
    options: Options,
    delivered: Tier,
) -> pd.DataFrame:
    """The logits of these images as `delivered`; read from the file of an earlier evaluation if nothing has changed."""
    file, key = kept
    table = read_scores(file, key)
    if table is None:
        table = score_images(
            detector(),
            lambda path: deliver(read(path), delivered),
            images,
            f"score {file.stem}",
            keep_unreadable=options.labels is not None,
        )
        write_scores(file, table, key)
    return table.assign(delivered=delivered)


def _robustness(
    detector: Callable[[], BaseDetector], engine: Engine, card: Card, read: Read, images: pd.DataFrame
) -> dict[str, Any]:
    """The card's robustness; measured again unless the card holds it for the same images, decision and rule."""
    known = images.assign(sha256=images.sha256 + " " + images.collection + " " + images.source)
    key = f"{scores_key(card, known, engine)} {RATES_RULE}"
    if (card.robustness.get("digest"), card.robustness.get("images_key")) == (card.digest, key):
        return card.robustness
    return {**measure_robustness(detector(), card, read, images), "images_key": key}


def _describe(
    data: Mapping[str, str | Path], images: dict[str, pd.DataFrame], label_info: dict[str, Any] | None
) -> dict[str, Any]:
    # A matched version shows crops of the same images: they are not counted twice.
    again = set() if label_info else {name for name, where in data.items() if _shows_again(where, data)}
    tables = [table for name, table in images.items() if name not in again]
    table = pd.concat(tables, ignore_index=True)
    names = [Path(where).resolve().name for name, where in data.items() if name not in again]
    return {
        "name": ", ".join(names),
        "digest": data_digest(table),
        "images": len(table),
        # Whether labelled images were in a training set is not known.
        "in_train": None if label_info else int(table.in_train.sum()),
        "repeated": sum(int(one.sha256.duplicated().sum()) for one in tables),
        "labels": label_info,
        "generators": sorted(table.generator.unique()),
    }


def _shows_again(where: str | Path, data: Mapping[str, str | Path]) -> bool:
    """Whether these data are the matched version of others of `data`."""
    made_of = originals(where)
    return made_of is not None and ("raw" in data or made_of[0] in data)
