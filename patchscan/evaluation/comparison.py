"""Compare models on the same images: paired tests with Holm's correction, and Friedman's test across generators."""

from dataclasses import asdict
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd

from patchscan.dataset.layout import POOLED
from patchscan.dataset.sources import SOURCE_COLUMNS
from patchscan.evaluation.results import Evaluated, group_rows
from patchscan.evaluation.scoring import cluster_of, usable
from patchscan.reporting.statistics import Difference, accuracy_difference, auc_difference, auc_interval, friedman, holm


def compare(models: list[Evaluated], protocol: str) -> dict[str, Any]:
    """Compare all pairs of models on every generator, and on the images of several: those that both models have seen,
    those that neither has, and all.

    Accuracy is compared at each model's own threshold (McNemar's exact test), AUC by DeLong's test. p-values are
    corrected by Holm's method over all pairs of the protocol, separately for the two tests, and for the images of one
    and of several generators. Only images that both models scored are used. Images of one collection are counted
    together where sources are known.
    """
    pairs = [row for first, second in combinations(models, 2) for row in _pair(first, second, protocol)]
    for test, pooled in product(("accuracy", "auc"), (False, True)):
        results = [row[test] for row in pairs if row[test] is not None and (row["generator"] in POOLED) == pooled]
        for result, p_value in zip(results, holm([result["p_value"] for result in results]), strict=True):
            result["p_corrected"] = p_value
    return {"pairs": pairs, "friedman": _friedman(models, protocol)}


def _pair(first: Evaluated, second: Evaluated, protocol: str) -> list[dict[str, Any]]:
    both = _join_scores(first.tables[protocol], second.tables[protocol])
    names = sorted(both.generator.unique())
    seen, unseen = first.seen & second.seen, set(names) - (first.seen | second.seen)
    parts = {name: both[both.generator == name] for name in names}
    for group, members in zip(POOLED, (seen.intersection(names), unseen, names), strict=True):
        if len(members) > 1 and (group == "overall" or len(members) < len(names)):  # no test twice
            parts[group] = both[both.generator.isin(members)]
    return [
        {
            "first": first.card.name,
            "second": second.card.name,
            "generator": name,
            "unseen_by_both": name in unseen or name == "all unseen",
            "images": len(part),
            **_differences(part),
        }
        for name, part in parts.items()
    ]


def _differences(part: pd.DataFrame) -> dict[str, Any]:
    cluster = cluster_of(part)
    logits = (part.logit_first.to_numpy(), part.logit_second.to_numpy())
    return {
        "accuracy": _as_dict(accuracy_difference(_correct(part, "_first"), _correct(part, "_second"), cluster)),
        "auc": _as_dict(auc_difference(part.label.to_numpy(), *logits, cluster)),
    }


def _join_scores(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    columns = ["path", "logit", "measured_ai"]
    sources = [name for name in SOURCE_COLUMNS if name in first]
    left = first.loc[usable(first), [*columns, "generator", "label", *sources]]
    right = second.loc[usable(second), columns]
    return left.merge(right, on="path", suffixes=("_first", "_second"))


def _correct(part: pd.DataFrame, suffix: str) -> np.ndarray:
    return (part[f"measured_ai{suffix}"] == (part.label == 1)).to_numpy(dtype=bool)


def _as_dict(difference: Difference | None) -> dict[str, Any] | None:
    return asdict(difference) if difference else None


def _friedman(models: list[Evaluated], protocol: str) -> dict[str, Any] | None:
    """Friedman's test on the AUCs with generators as blocks; None if there are too few models or generators."""
    by_model = []
    for model in models:
        table = model.tables[protocol]
        parts = {
            name: part[usable(part)] for name, part in group_rows(model, table).items() if name in set(table.generator)
        }
        by_model.append({name: auc_interval(part.label.to_numpy(), part.logit.to_numpy()).value
                         for name, part in parts.items()})  # fmt: skip
    names = sorted(name for name in by_model[0] if all(one.get(name) is not None for one in by_model))
    p_value = friedman(np.array([[one[name] for one in by_model] for name in names], dtype=float)) if names else None
    return None if p_value is None else {"p_value": p_value, "generators": len(names), "models": len(models)}
