"""Judge two evaluated detectors as one, a cascade (patchscan.detector.cascade), from the scores of both."""

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from patchscan.common.console import sentence
from patchscan.common.errors import UserError
from patchscan.dataset.source import telling_of_changes
from patchscan.detector.answer import Engine
from patchscan.detector.card import Card
from patchscan.detector.cascade import Cascade, log_odds, needed_band
from patchscan.detector.engines import load_detector
from patchscan.evaluation.results import Evaluated
from patchscan.evaluation.scoring import evenly_spread, usable
from patchscan.reporting.pages import show

# The ends of the bands that are tried: as far from 0 as from 1.
ENDS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
TIMED_IMAGES = 16
# Marks the rows that the second detector decided.
BY_SECOND = "by_second"


class BandError(UserError):
    """No band can be chosen on these data; the message says what to do."""


def join(cascade: Cascade, first: Evaluated, then: Evaluated) -> Evaluated:
    """Return the cascade as one evaluated model, with a column `by_second` in its tables. Both were evaluated on the
    same images; what is measured on the images that they were calibrated on stays cross-fitted."""
    return Evaluated(
        cascade.card,
        {name: _joined(cascade, table, then.tables[name]) for name, table in first.tables.items()},
        then.calibrated_on,
        then.target,
        None
        if first.deliveries is None or then.deliveries is None
        else _joined(cascade, first.deliveries, then.deliveries),
    )


def _joined(cascade: Cascade, first: pd.DataFrame, then: pd.DataFrame) -> pd.DataFrame:
    if not first.path.equals(then.path):
        raise ValueError("the two tables are of other images")
    second = _asks_second(first, cascade.first, cascade.then, cascade.low, cascade.high)
    table = first.where(~second, then, axis=0)
    decided = usable(table)
    table.loc[decided, "logit"] = table.p_ai[decided].map(log_odds)
    return table.astype(first.dtypes).assign(**{BY_SECOND: second})


def _asks_second(first: pd.DataFrame, first_card: Card, then_card: Card, low: float, high: float) -> pd.Series:
    """Which rows the first detector does not settle (Cascade.settles), bool (rows,)."""
    covered, first_covers = (
        first.tier.map(card.decision.covers, na_action="ignore").fillna(True).astype(bool)
        for card in (then_card, first_card)
    )
    p_ai = first.measured_p_ai
    left_open = ((low <= p_ai) & (p_ai < high)) | first.measured_uncertain | ~covered
    return left_open & ~(first.graphic & ~first.small & first_covers)


def choose_band(first: Evaluated, then: Evaluated, loss: float) -> Cascade:
    """Return the cascade that asks the second detector least often, among those whose error, on the generators that
    either has seen, is at most `loss` above the second one's alone.

    The error is the mean of the shares of AI images called real and of real images called AI; `uncertain` is none.
    Raises BandError where these data hold no seen generators.
    """
    name = then.calibrated_on or next(iter(then.tables))
    seen = first.seen | then.seen
    rows = first.tables[name].generator.isin(seen) & usable(first.tables[name]) & usable(then.tables[name])
    one, other = (model.tables[name][rows].reset_index(drop=True) for model in (first, then))
    if one.label.nunique() < 2:
        raise BandError("no generator in these data was seen by either detector: give the band, --when LOW,HIGH")
    low, high = needed_band(first.card, then.card)
    label, wrong, wrong_alone = one.label.to_numpy(), _wrong(one), _wrong(other)
    allowed = _error(wrong_alone, label) + loss
    # The widest band asks the second about all, which is always allowed.
    best, share = (0.0, 1.0), np.inf
    for down, up in product(ENDS, ENDS):
        if down > low or 1 - up < high or down >= 1 - up:
            continue
        second = _asks_second(one, first.card, then.card, down, 1 - up).to_numpy()
        if second.mean() < share and _error(np.where(second, wrong_alone, wrong), label) <= allowed:
            best, share = (down, 1 - up), second.mean()
    return Cascade(first=first.card, then=then.card, low=best[0], high=best[1])


def _wrong(table: pd.DataFrame) -> np.ndarray:
    """Which images have a verdict and a wrong one, bool (rows,)."""
    return (~table.measured_uncertain & (table.measured_ai != (table.label == 1))).to_numpy()


def _error(wrong: np.ndarray, label: np.ndarray) -> float:
    return float(np.mean([wrong[label == one].mean() for one in (0, 1)]))


def cost(
    cascade: Evaluated, runs: tuple[Path, Path], read: Callable[[str], bytes], protocol: str, engine: Engine | None
) -> dict[str, Any]:
    """Return what the cascade costs: by class, the share of scored images that the second detector is asked about, and
    the seconds of a core that the models take for an image: the first, the second, and both as a cascade. They are
    measured here on TIMED_IMAGES images, with `engine` (None: see `choose_engine`). A class of which nothing was scored
    is left out; where both are, the result is empty."""
    table = cascade.tables[protocol]
    table = table[usable(table)]
    if table.empty:
        return {}
    images = {path: read(path) for path in evenly_spread(table, TIMED_IMAGES).path}
    first_s, second_s = (_seconds(run, images, engine) for run in runs)
    parts = {name: table[BY_SECOND][table.label == label] for label, name in ((0, "real"), (1, "ai"))}
    asked = {name: float(part.mean()) for name, part in parts.items() if len(part)}
    return {
        "asked": asked,
        "first_s": first_s,
        "second_s": second_s,
        "cascade_s": {name: first_s + share * second_s for name, share in asked.items()},
    }


def _seconds(run: Path, images: dict[str, bytes], engine: Engine | None) -> float:
    detector = load_detector(run, engine=engine)
    crops = []
    for path, data in images.items():
        with telling_of_changes(path):
            crops.append(detector.prepare(data).crops.pixels)
    detector.logits(crops[:1])  # the first pass is slow
    before = detector.model_s
    detector.logits(crops)
    return (detector.model_s - before) / len(crops)


def cost_finding(cascade: Cascade, found: Mapping[str, Any], chosen: bool) -> str:
    """Return the finding about a cascade's cost; `chosen`: its band was, on these images."""
    first, then = cascade.first.name, cascade.then.name
    called = {"real": ("the real", "a real"), "ai": ("the AI", "an AI")}
    shares = " and ".join(
        f"{sentence(show(share, '%1'))} of {called[name][0]}" for name, share in found["asked"].items()
    )
    times = " and ".join(
        f"{called[name][1]} image {'takes ' * (not number)}{seconds * 1000:.1f} ms{' of a core' * (not number)}"
        for number, (name, seconds) in enumerate(found["cascade_s"].items())
    )
    doubt = " The band was chosen on the seen generators' images here: the cascade's seen figures may be too good."
    return (
        f"{cascade.card.name}: {first} settles what it gives a p_ai below {cascade.low:g} or from {cascade.high:g} up, "
        f"and {then} is asked about {shares} images. For the models {times}; {then} alone takes "
        f"{found['second_s'] * 1000:.1f} ms.{doubt * chosen}"
    )
