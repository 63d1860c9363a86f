"""Write what the package `lir` (Netherlands Forensic Institute) answers for fixed likelihood ratios, to compare ours
with.

    pip install --no-deps lir==1.3.1
    python -m tests.golden.lir_answers

`lir` is not among the dependencies, because it wants optuna and KDEpy, which are not needed for what is compared. Its
answers are in tests/golden/data/lir.json, which `tests/unit/test_likelihood.py` reads.
"""

import importlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parent / "data" / "lir.json"
PRIORS = (-2.0, -0.5, 0.0, 0.5, 2.0)


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Log10 likelihood ratios and labels, by name."""
    found = {}
    for name, ai, real, power, scale in (
        ("good", 200, 300, 3.0, 1.0),
        ("weak", 150, 100, 0.5, 1.0),
        ("overconfident", 120, 120, 1.5, 4.0),
        ("separated", 40, 60, 12.0, 0.5),
        ("wrong way round", 80, 80, -1.5, 1.0),
        ("with ties", 50, 50, 1.0, 1.0),
    ):
        rng = np.random.default_rng(len(name))
        label = np.repeat([1, 0], [ai, real])
        score = (rng.normal(0, 1, ai + real) + power * (label - 0.5)) * scale
        found[name] = (np.round(score, 0 if name == "with ties" else 6), label)
    return found


def answers() -> dict[str, Any]:
    """What lir says to each case."""
    metrics, bayeserror, entropy, models, isotonic = (
        importlib.import_module(f"lir.{name}")
        for name in (
            "metrics",
            "algorithms.bayeserror",
            "plotting.expected_calibration_error",
            "data.models",
            "algorithms.isotonic_regression",
        )
    )
    found = {}
    for name, (score, label) in cases().items():
        data = models.LLRData(features=score.reshape(-1, 1), labels=label)
        prior = 1 / (1 + 10 ** -np.array(PRIORS))
        found[name] = {
            "cllr": metrics.cllr(data),
            "cllr_min": metrics.cllr_min(data),
            "elub": [float(one) for one in bayeserror.elub(score.copy(), label)],
            "cross_entropy": entropy.calculate_ece(10**score, label, prior).tolist(),
            "pav": isotonic.IsotonicCalibrator().fit_transform(score, label).tolist()[:: len(score) // 10],
        }
    return {"lir": version("lir"), "priors": PRIORS, "cases": found}


if __name__ == "__main__":
    FILE.write_text(json.dumps(answers(), indent=1) + "\n")
