"""How often the estimated tier is the one that an image was delivered by, and the fit of the estimator's weights.

    python -m patchscan.evaluation.tier_accuracy --data genmix --data genmix-web
    python -m patchscan.evaluation.tier_accuracy --data genmix --data genmix-web --fit tier_weights.py

The weights are fitted to the train split of each data set, or to half of the images where it has none, and measured on
the rest. For the fit the settings of each tier are spread, so that the estimate does not depend on one quality. The
stored files of a data set without a train split are taken to have come from the web: as examples of `native` they are
left out of the fit.
"""

import argparse
import io
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from patchscan.common.console import ProgressReport, say_table
from patchscan.common.files import atomic_write
from patchscan.dataset.index import load_index
from patchscan.dataset.source import DataSource
from patchscan.detector.answer import TIERS, Tier
from patchscan.detector.graphic import is_graphic
from patchscan.detector.images import decode
from patchscan.detector.tier import estimate_tier, traces
from patchscan.evaluation.disturbances import jpeg, png
from patchscan.evaluation.scoring import evenly_spread
from patchscan.evaluation.tiers import compress, deliver, resized

# The few images of a data set without a train split count this much more in the fit.
WEIGHT_OF_HALF = 3
REGULARISATION = 0.3


def spread_delivery(data: bytes, tier: Tier, rng: np.random.Generator) -> bytes:
    """Deliver an encoded image by `tier` with settings drawn around the tier's own."""
    image = Image.fromarray(decode(data).rgb)
    if tier == "native":
        kinds: list[Callable[[], bytes]] = [
            lambda: data,
            lambda: png(image),
            lambda: jpeg(image, float(rng.integers(86, 99))),
        ]
        return kinds[rng.choice(3, p=[0.6, 0.15, 0.25])]()
    if tier == "web":
        factor = 1.0 if rng.random() < 2 / 3 else rng.uniform(0.5, 1)
        return compress(resized(image, factor, rng), int(rng.uniform(68, 83)), rng)
    if tier == "hard":
        small = resized(image, rng.uniform(0.45, 0.85), rng)
        once = Image.open(io.BytesIO(jpeg(small, rng.uniform(40, 60))))
        left, top = (int(one) for one in rng.integers(1, 8, 2))
        return compress(once.crop((left, top, once.width, once.height)), int(rng.uniform(40, 60)), rng)
    large = resized(image, rng.uniform(1.4, 2.1), rng)
    return png(large) if rng.random() < 0.25 else compress(large, int(rng.uniform(75, 98)), rng)


def rows_to_use(index: pd.DataFrame, limit: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split an index into the rows to fit on and those to measure on, at most `limit` rows each, evenly spread."""
    train = index.split == "train"
    if not train.any():
        train = index.path.map(lambda path: zlib.crc32(path.encode()) % 2 == 0)
    first, second = (evenly_spread(part.sort_values("path"), limit) for part in (index[train], index[~train]))
    return first, second


def fit(sets: list[tuple[DataSource, pd.DataFrame, bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Fit the estimator to (source, rows, whether the stored files are native). Returns weights (35, 4), bias (4,)."""
    found, tier_of, weight = [], [], []
    with ProgressReport("fit", sum(len(rows) for _, rows, _ in sets)) as progress:
        for source, rows, is_native in sets:
            for path in rows.path:
                data, rng = source.read(path), np.random.default_rng(zlib.crc32(path.encode()))
                for number, tier in enumerate(TIERS):
                    if is_native or tier != "native":
                        found.append(traces(decode(spread_delivery(data, tier, rng)).pillow))
                        tier_of.append(number)
                        weight.append(1 if is_native else WEIGHT_OF_HALF)
                progress.advance()
    scaler = StandardScaler().fit(found)
    model = LogisticRegression(C=REGULARISATION, max_iter=3000).fit(scaler.transform(found), tier_of, weight)
    weights = model.coef_ / scaler.scale_
    return weights.T, model.intercept_ - weights @ scaler.mean_


def measure(name: str, source: DataSource, rows: pd.DataFrame) -> pd.DataFrame:
    """Estimate the tier of each image as stored and re-delivered: columns data, delivered, images, and for each tier
    the share estimated to be it; `graphic`, the share taken for graphics."""
    counts = {tier: dict.fromkeys((*TIERS, "graphic"), 0) for tier in TIERS}
    with ProgressReport(f"measure {name}", len(rows)) as progress:
        for path in rows.path:
            data = source.read(path)
            for tier in TIERS:
                image = decode(deliver(data, tier)).pillow
                counts[tier][estimate_tier(image)] += 1
                counts[tier]["graphic"] += is_graphic(image)
            progress.advance()
    return pd.DataFrame(
        [
            {"data": name, "delivered": tier, "images": len(rows)}
            | {estimated: count / len(rows) for estimated, count in found.items()}
            for tier, found in counts.items()
        ]
    )


def write_weights(weights: np.ndarray, bias: np.ndarray, path: Path) -> None:
    """Write the weights as the module that the estimator imports: archives carry modules, no data files."""
    lines = [
        '"""Weights of the tier estimator, written by `python -m patchscan.evaluation.tier_accuracy --fit`."""',
        "",
    ]
    lines += ["import numpy as np", "", "# One row per trace, one column per tier.", "WEIGHTS = np.array(", "    ["]
    lines += [f"        [{', '.join(f'{value:.4g}' for value in row)}]," for row in weights.tolist()]
    lines += ["    ]", ")", f"BIAS = np.array([{', '.join(f'{value:.4g}' for value in bias.tolist())}])", ""]
    with atomic_write(path) as file:
        file.write_text("\n".join(lines))


def main() -> None:
    """Fit or measure, as the command line says."""
    parser = argparse.ArgumentParser(
        description="Measure how often the estimated tier is right and what passes for a graphic, or fit it."
    )
    parser.add_argument("--data", action="append", required=True, type=Path, help="a data set; repeat for several")
    parser.add_argument("--fit", type=Path, help="fit the weights and write them to this file instead")
    parser.add_argument("--limit", type=int, default=500, help="most images of each data set")
    arguments = parser.parse_args()
    sets = []
    for folder in arguments.data:
        index = load_index(folder)
        sets.append((folder, index, *rows_to_use(index, arguments.limit)))
    if arguments.fit:
        weights, bias = fit(
            [(DataSource(folder), rows, bool((index.split == "train").any())) for folder, index, rows, _ in sets]
        )
        write_weights(weights, bias, arguments.fit)
        return
    tables = [measure(folder.name, DataSource(folder), rows) for folder, _, _, rows in sets]
    say_table(pd.concat(tables), index=False, float_format="%.3f")


if __name__ == "__main__":
    main()
