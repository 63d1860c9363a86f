"""Train a linear head on the features of an imported backbone: features once, then a logistic regression, on a CPU."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from patchscan.common.console import ProgressReport
from patchscan.common.processes import available_cpus
from patchscan.dataset.audit import audit
from patchscan.dataset.index import data_digest, load_index
from patchscan.dataset.source import DataError, DataSource, telling_of_changes
from patchscan.detector.card import Card, CardError
from patchscan.detector.graph_check import GraphError, parse_graph
from patchscan.detector.onnx_detector import open_session
from patchscan.detector.prepared import prepare
from patchscan.training.data import LABELS, select_rows
from patchscan.training.import_config import ImportConfig, ImportConfigError, LinearHead, naming_line, read_config
from patchscan.training.import_onnx import read_model, write_run
from patchscan.training.onnx_graph import wrap_features
from patchscan.training.run_folder import check_free

# Inverse strengths of the regularisation that are tried on the val split.
STRENGTHS = tuple(10.0**power for power in range(-5, 2))


def train_probe(
    backbone: Path,
    config: Path,
    data: str,
    run: Path,
    seen: Sequence[str] | None = None,
    index: Path | None = None,
    limit: int | None = None,
) -> Card:
    """Write the run folder of a detector: the backbone, a file that `patchscan import` takes, described by `config`
    (docs/import.md), whose output is a vector, and a linear head trained on the train split of the generators `seen`
    (default: all that have train and val images of both classes). The strength of its regularisation is chosen on their
    val split.

    `limit`: most train images and most val images of each generator and class. Raises ImportConfigError, GraphError,
    RunFolderError and DataError.
    """
    check_free(run, backbone)
    described = read_config(config)
    if described.output.head:
        raise ImportConfigError(f"{config} has a head: a probe trains its own")
    graph = read_model(backbone, described.input)
    with naming_line(config):
        extract = _Extractor(backbone, graph, described)
    rows = load_index(data, index)
    names = sorted(seen or _complete(rows))
    if not names:
        raise DataError(
            f"no generator of {data} has train and val images of both classes, which a probe needs; `patchscan split` "
            "moves a part of val to train"
        )
    train, val = (_limited(select_rows(rows, names, split), limit) for split in ("train", "val"))
    read = DataSource(data).read
    features, val_features = (extract(read, part, name) for part, name in ((train, "train"), (val, "val")))
    head, strength = fit_head(features, train.label.to_numpy(), val_features, val.label.to_numpy())
    auc = float(roc_auc_score(val.label, val_features @ head.weights + head.bias))
    training = {
        "seen": names,
        "unseen": sorted(set(rows.generator) - set(names)),
        "data_digest": data_digest(pd.concat([train, val])),
        "trained_on": f"{len(train):,} images of {', '.join(names)}, with the backbone as it was",
        "train_images": len(train),
        "val_images": len(val),
        "regularisation": strength,
        "seen_val_auc": auc,
    }
    warnings = [_warning(described, names), *audit(pd.concat([train, val])).warnings]
    return write_run(described, backbone, graph, head, run, training, warnings)


def fit_head(
    features: np.ndarray, label: np.ndarray, val_features: np.ndarray, val_label: np.ndarray
) -> tuple[LinearHead, float]:
    """Return a logistic regression on features (n, d) and label (n,) of 0 and 1, both classes of
    equal weight, and the strength of its regularisation, the best of STRENGTHS by the log loss of the val images."""
    scaler = StandardScaler().fit(features)
    train, val = scaler.transform(features), scaler.transform(val_features)
    best: tuple[float, float, LogisticRegression] | None = None
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000).fit(train, label)
        p_ai = model.predict_proba(val)[:, 1]
        loss = log_loss(val_label, p_ai, sample_weight=compute_sample_weight("balanced", val_label))
        if best is None or loss < best[0]:
            best = loss, strength, model
    assert best is not None
    # The scaling is a part of the weights.
    weights = best[2].coef_[0] / scaler.scale_
    bias = float(best[2].intercept_[0] - weights @ scaler.mean_)
    return LinearHead(weights.tolist(), bias, normalise=False), best[1]


class _Extractor:
    """Computes the features of images, each a pass of its own on one thread."""

    def __init__(self, file: Path, graph: bytes, described: ImportConfig):
        wrapped = wrap_features(file, parse_graph(file, graph), described.input, described.output.name)
        try:
            self._session = open_session(wrapped)
        except CardError as error:
            raise GraphError(f"{file}: {error}") from error
        self._file, self._preset = file, described.input.preset()

    def __call__(self, read: Callable[[str], bytes], rows: pd.DataFrame, task: str) -> np.ndarray:
        """Return the features of the images that `rows` names, float64 (rows, d). Raises GraphError where one is not
        finite, DataError where an image cannot be read."""
        found: list[np.ndarray] = []
        with ThreadPoolExecutor(available_cpus()) as pool, ProgressReport(f"features {task}", len(rows)) as progress:
            for values in pool.map(partial(self._features, read), rows.path):
                found.append(values)
                progress.advance(1)
        features = np.stack(found)
        if not np.isfinite(features).all():
            raise GraphError(f"{self._file} gives features that are not finite")
        return features

    def _features(self, read: Callable[[str], bytes], path: str) -> np.ndarray:
        with telling_of_changes(path):
            crops = prepare(read(path), self._preset).crops.pixels
        values: np.ndarray = self._session.run(None, {"crops": np.ascontiguousarray(crops)})[0]
        return values


def _complete(rows: pd.DataFrame) -> list[str]:
    """The generators with train and val images of both classes."""
    kinds = rows[rows.split.isin(["train", "val"])].groupby("generator")[["split", "class"]]
    return [str(name) for name, part in kinds if len(part.drop_duplicates()) == 2 * len(LABELS)]


def _limited(rows: pd.DataFrame, limit: int | None) -> pd.DataFrame:
    """At most `limit` images of each generator and class, drawn at random, the same in each run."""
    if limit is None:
        return rows
    chosen = rows.sample(frac=1, random_state=0).groupby(["generator", "label"]).head(limit)
    return chosen.sort_values("path").reset_index(drop=True)


def _warning(described: ImportConfig, names: list[str]) -> str:
    source = described.source or "a backbone of unknown source"
    return f"A linear head on the features of {source}, trained on {', '.join(names)}; evaluate it on your data first."
