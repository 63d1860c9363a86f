"""The bias audit: measure how well AI and real images can be separated without their pixels, by how they are stored.

Where that is possible, a detector may learn it instead of what generators leave in the pixels. GenImage's real
photographs are JPEGs of many sizes and its fakes are PNGs of one size, and detectors learn that ("Fake or JPEG?
Revealing Common Biases in Generated Image Detection Datasets", arXiv 2403.17608).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from patchscan.common.blas import one_blas_thread
from patchscan.reporting.statistics import Estimate, auc_interval, undefined

Verdict = Literal["fair", "caution", "biased", "unknown"]

# A clue counts where the whole interval of its AUC lies above this. Chance is 0.5; a detector gains little from less.
MIN_CLUE_AUC = 0.55
FOLDS = 5
# Images of each generator: with more, the intervals become narrower than half a point and the audit takes minutes.
SAMPLE = 20_000

# Each clue and the columns of `_inputs` it uses. STORAGE clues say only how files were stored; WEIGHT clues also depend
# on how complex the content is.
STORAGE = {
    "format": ["format"],
    "size": ["size", "log_width", "log_height"],
    "JPEG quality": ["quality", "quality_number"],
    "chroma subsampling": ["subsampling"],
}
WEIGHT = {"file size": ["log_bytes"], "bytes per pixel": ["log_bytes_per_pixel"]}
CLUES = STORAGE | WEIGHT
_CATEGORIES = ["format", "size", "quality", "subsampling"]


ALL = "all"  # all generators together


@dataclass(frozen=True)
class GeneratorAudit:
    """How well clues other than pixels separate one generator's AI images from real ones: cross-validated AUCs with 95
    % intervals (DeLong), of the storage clues together (`storage`), of all clues (`everything`), and of each (`clues`).

    verdict: `biased` where the storage clues separate them, `caution` where only the number of bytes does, `fair` where
    nothing does, `unknown` where a class has too few images. `warning` is a sentence, empty where fair.
    """

    generator: str
    ai: int
    real: int
    storage: Estimate
    everything: Estimate
    clues: dict[str, Estimate]
    verdict: Verdict
    warning: str


@dataclass(frozen=True)
class Audit:
    """One audit for each generator, and one for `all` together where there are several."""

    generators: list[GeneratorAudit]

    @property
    def biased(self) -> bool:
        """Whether any generator's verdict is `biased`."""
        return any(generator.verdict == "biased" for generator in self.generators)

    @property
    def warnings(self) -> list[str]:
        """The sentences that belong on a model card and in every report on these data: where several generators have
        the same verdict, one for all of them."""
        found = []
        for verdict in ("biased", "caution", "unknown"):
            flagged = [one for one in self.generators if one.verdict == verdict]
            named = [one for one in flagged if one.generator != ALL] or flagged
            if len(named) > 1 and verdict != "unknown":
                found.append(_warning_of_several(named, verdict))
            else:
                found += [one.warning for one in named]
        return found

    def as_dict(self) -> dict[str, Any]:
        """The audit as JSON values, for reports."""
        return {
            "biased": self.biased,
            "warnings": self.warnings,
            "generators": [asdict(generator) for generator in self.generators],
        }


def audit(index: pd.DataFrame) -> Audit:
    """Audit an index (a table with the columns INDEX_COLUMNS of index.py): for each generator, cross-validate in 5
    folds a logistic regression that sees no pixels, on at most SAMPLE images. Writes nothing."""
    groups = [(str(name), rows) for name, rows in index.groupby("generator")]
    if len(groups) > 1:
        groups.append((ALL, index))
    return Audit([_audit_generator(name, rows) for name, rows in groups])


def _audit_generator(generator: str, rows: pd.DataFrame) -> GeneratorAudit:
    rows = rows.sample(min(len(rows), SAMPLE), random_state=0)
    label = (rows["class"] == "ai").to_numpy(int)
    ai, real = int(label.sum()), int((1 - label).sum())
    if min(ai, real) < FOLDS:
        warning = f"NOT AUDITED: {generator} has {ai} AI and {real} real images; {FOLDS} of each are needed."
        none = undefined("delong")
        return GeneratorAudit(generator, ai, real, none, none, dict.fromkeys(CLUES, none), "unknown", warning)
    inputs = _inputs(rows)
    storage, everything = (_auc(inputs, label, [*clues]) for clues in (STORAGE, CLUES))
    clues = {clue: _auc(inputs, label, [clue]) for clue in CLUES}
    verdict: Verdict = "biased" if _is_clue(storage) else "caution" if _is_clue(everything) else "fair"
    warning = _warning(generator, rows, verdict, storage, everything, clues)
    return GeneratorAudit(generator, ai, real, storage, everything, clues, verdict, warning)


def _inputs(rows: pd.DataFrame) -> pd.DataFrame:
    """The index's columns as inputs of a regression: categories as text, quantities as logarithms."""
    return pd.DataFrame(
        {
            "format": rows["format"],
            "size": rows["width"].astype(str) + "x" + rows["height"].astype(str),
            "quality": rows["jpeg_quality"].map("{:.0f}".format),
            "subsampling": rows["jpeg_subsampling"].astype(object).fillna("none"),
            "quality_number": rows["jpeg_quality"].fillna(rows["jpeg_quality"].median()).fillna(0.0),
            "log_width": np.log(rows["width"]),
            "log_height": np.log(rows["height"]),
            "log_bytes": np.log(rows["bytes"]),
            "log_bytes_per_pixel": np.log(rows["bytes"] / (rows["width"] * rows["height"])),
        }
    )


def _auc(inputs: pd.DataFrame, label: np.ndarray, clues: list[str]) -> Estimate:
    # imported here because it takes long, and training imports this module
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    columns = [column for clue in clues for column in CLUES[clue] if inputs[column].nunique() > 1]
    if not columns:
        return auc_interval(label, np.zeros(len(label)))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    # Balanced class weights: otherwise folds with different class shares get different intercepts, which shifts the AUC
    # of their pooled scores.
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    features = _features(inputs[columns])
    with one_blas_thread():
        score = cross_val_predict(model, features, label, cv=folds, method="decision_function")
    return auc_interval(label, score)


def _features(inputs: pd.DataFrame) -> np.ndarray:
    """Categories as one-hot columns (rare values pooled), and quantities with their squares, so that both "AI images
    all have one size" and "AI files have a medium size" are found. They are the same in all folds: no label is used."""
    from sklearn.compose import make_column_transformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, PolynomialFeatures, StandardScaler

    values = OneHotEncoder(min_frequency=0.01, sparse_output=False)
    quantities = make_pipeline(StandardScaler(), PolynomialFeatures(2, include_bias=False))
    transformer = make_column_transformer(
        (values, [column for column in inputs if column in _CATEGORIES]),
        (quantities, [column for column in inputs if column not in _CATEGORIES]),
    )
    return np.asarray(transformer.fit_transform(inputs))


def _is_clue(estimate: Estimate) -> bool:
    return estimate.low is not None and estimate.low > MIN_CLUE_AUC


def _warning(
    generator: str,
    rows: pd.DataFrame,
    verdict: Verdict,
    storage: Estimate,
    everything: Estimate,
    clues: dict[str, Estimate],
) -> str:
    if verdict == "fair":
        return ""
    among = STORAGE if verdict == "biased" else CLUES
    found = sorted((clue for clue in among if _is_clue(clues[clue])), key=lambda clue: -(clues[clue].value or 0))
    which = "; ".join(f"{clue} alone {clues[clue].value:.2f} ({_difference(rows, clue)})" for clue in found)
    what = which or f"none alone, {' and '.join(among)} together"
    return _sentence(verdict, generator, f"{_format_auc(storage if verdict == 'biased' else everything)}: {what}")


def _warning_of_several(generators: list[GeneratorAudit], verdict: str) -> str:
    aucs = [one.storage.value if verdict == "biased" else one.everything.value for one in generators]
    known = [auc for auc in aucs if auc is not None]
    where = " (`patchscan audit` names the clues)" if verdict == "biased" else ""
    names = ", ".join(one.generator for one in generators)
    return _sentence(verdict, names, f"{min(known):.2f} to {max(known):.2f}{where}")


def _sentence(verdict: str, names: str, auc: str) -> str:
    """The warning of a verdict, `biased` or `caution`; `auc` says how well the clues tell the classes apart."""
    if verdict == "biased":
        return (
            f"BIASED DATA: {names}: how the files are stored separates AI from real without a pixel, AUC {auc}. "
            "A detector may have learned that instead of the generator's traces; train and evaluate on the matched "
            "protocol too (`patchscan match`)."
        )
    return (
        f"CAUTION: {names}: the files are stored alike, but how many bytes they take separates AI from real, "
        f"AUC {auc}. Their content or their earlier compression differs, and a detector may have learned that; "
        "re-encoding cannot remove it."
    )


def _format_auc(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} (95 % interval {estimate.low:.2f} to {estimate.high:.2f})"


def _difference(rows: pd.DataFrame, clue: str) -> str:
    """How the classes differ in one clue: the most common value of each class, or the median of a quantity."""
    column = CLUES[clue][0]
    ai, real = (_inputs(rows[rows["class"] == label])[column] for label in ("ai", "nature"))
    describe = _most_common if column in _CATEGORIES else _median
    return f"AI {describe(ai)}, real {describe(real)}"


def _most_common(values: pd.Series) -> str:
    shares = values.value_counts(normalize=True)
    return f"{shares.index[0]} in {shares.iloc[0] * 100:.0f} %".replace("nan", "none")


def _median(logarithms: pd.Series) -> str:
    median = np.exp(logarithms.median())
    return f"{median:,.0f} in the median" if median >= 100 else f"{median:.3g} in the median"
