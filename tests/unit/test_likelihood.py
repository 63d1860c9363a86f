"""Likelihood ratios: our functions against those of the Netherlands Forensic Institute, bounds, and what is stated."""

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from patchscan.detector.card import Card
from patchscan.evaluation.calibration import Target, fit_decision
from patchscan.evaluation.evidence import Weight, evidence, fit_bounds, weight_of
from patchscan.evaluation.results import Evaluated
from patchscan.evaluation.scoring import apply_decision
from patchscan.reporting.likelihood import cllr, cross_entropy, elub, pav
from tests.golden.lir_answers import FILE, PRIORS, cases
from tests.scan_kit import card

ANSWERS: dict[str, Any] = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", cases())
def test_lir_gives_the_same_answers(name: str) -> None:
    llr, label = cases()[name]
    theirs = ANSWERS["cases"][name]
    assert cllr(llr, label)[0] == pytest.approx(theirs["cllr"])
    best = pav(llr, label)
    assert cllr(best, label)[0] == pytest.approx(theirs["cllr_min"])
    assert best[:: len(llr) // 10] == pytest.approx(theirs["pav"])
    assert elub(llr, label) == pytest.approx(theirs["elub"])
    assert cross_entropy(llr, label, np.array(PRIORS)) == pytest.approx(theirs["cross_entropy"])


def table(seen_images: int = 300, unseen_power: float = 1.0, sources: int | None = None) -> pd.DataFrame:
    """Deliveries as evaluation makes them, of a seen and an unseen generator; of a few graphics no LR is stated."""
    rng = np.random.default_rng(3)
    parts = []
    for name, power in (("seen", 3.0), ("unseen", unseen_power)):
        label = np.repeat([1, 0], seen_images)
        path = [f"{name}/{number}" for number in range(len(label))]
        part = pd.DataFrame({"path": path, "generator": name, "label": label, "split": "val", "error_code": None})
        source = path if sources is None else [f"{name}{one}/{n % sources}" for n, one in enumerate(label)]
        parts.append(part.assign(logit=rng.normal(power * (label - 0.5), 1), source=source, collection=source))
    scores = pd.concat(parts, ignore_index=True).assign(
        small=False, graphic=False, tier="native", status="scored", delivered="native", data="data", source_known=True
    )
    scores.loc[::50, "graphic"] = True
    return scores


def evaluated(scores: pd.DataFrame) -> Evaluated:
    """A model that was calibrated on the seen generator."""
    fitted_on = scores.generator == "seen"
    part = scores[fitted_on]
    decision = fit_decision(part.logit.to_numpy(), part.label.to_numpy(), Target(), "a test")
    decided = apply_decision(scores, decision, fitted_on, Target())
    bounds = fit_bounds(decided[fitted_on], decision)
    model = card(decision=decision, evidence=bounds, training={"seen": ["seen"]})
    return Evaluated(model, {"data": decided}, "data", Target(), decided)


def test_the_bounds_are_what_the_images_and_their_sources_carry() -> None:
    bounds = evaluated(table()).card.evidence["native"]
    assert bounds["ai"] == bounds["real"] == 294, "graphics are left out"
    assert -np.log10(295) - 0.01 <= bounds["lower"] < -1
    assert 1 < bounds["upper"] <= np.log10(295) + 0.01
    few = evaluated(table(sources=5)).card.evidence["native"]
    assert few["real_sources"] == few["ai_sources"] == 5
    assert (few["lower"], few["upper"]) == pytest.approx((-np.log10(6), np.log10(6)))
    assert set(evaluated(table()).card.evidence) == {"native"}, "no bounds for a tier without images"


def test_bounds_do_not_change_what_a_model_answers() -> None:
    model = evaluated(table()).card
    assert model.digest == replace(model, evidence={}).digest
    assert Card.from_dict(json.loads(json.dumps(asdict(model)))) == model


def test_a_weight_is_stated_within_the_bounds_or_not_at_all() -> None:
    model = card(evidence={"native": {"lower": -1.5, "upper": 2.0, "ai": 30, "real": 99}})
    middle = weight_of(10 / 11, "native", None, model)
    assert isinstance(middle, Weight)
    assert middle.log10_lr == pytest.approx(1)
    assert not middle.at_bound
    for p_ai, end in ((1.0, 2.0), (0.999999, 2.0), (0.0, -1.5)):
        bounded = weight_of(p_ai, "native", None, model)
        assert isinstance(bounded, Weight)
        assert bounded.log10_lr == end
        assert bounded.at_bound
        assert abs(bounded.unbounded) > abs(end)
    assert "enlarged, which" in str(weight_of(0.9, "native", "small_image", model))
    assert "cannot tell" in str(weight_of(0.9, "native", "out_of_domain", model))
    assert "no bounds for images that look hard" in str(weight_of(0.9, "hard", None, model))


def test_calibrated_lrs_are_worth_what_they_say_and_unseen_ones_are_not() -> None:
    found = evidence(evaluated(table(unseen_power=-1.0)))
    assert found is not None
    rows = {row["name"]: row for row in found["sets"][0]["rows"]}
    seen, unseen = rows["seen"], rows["unseen"]
    assert seen["not_stated"] == 12
    assert seen["cllr_min"] <= seen["cllr"]["value"] < seen["cllr_min"] + 0.08
    assert seen["misleading_real"]["method"] == "wilson"
    few = evidence(evaluated(table(sources=20)))
    assert few is not None
    assert few["sets"][0]["rows"][0]["misleading_real"]["method"] == "wilson, by source"
    assert seen["cllr"]["low"] < seen["cllr"]["value"] < seen["cllr"]["high"] < 0.5
    assert unseen["cllr"]["value"] > 1, "they mislead"
    assert unseen["cllr_min"] == pytest.approx(1, abs=0.1)
    assert unseen["misleading_ai"]["value"] > 0.5 > seen["misleading_ai"]["value"]
    assert rows["overall"]["kind"] == "group"


def test_without_bounds_no_ratio_is_judged() -> None:
    model = evaluated(table(60))
    assert evidence(replace(model, card=replace(model.card, evidence={}))) is None


def test_a_set_of_one_class_has_no_cost_and_still_shows_what_misleads() -> None:
    real_only = table().query("label == 0").reset_index(drop=True)
    model = evaluated(table())
    decided = apply_decision(real_only, model.card.decision)
    found = evidence(replace(model, tables={"data": decided}, deliveries=decided))
    assert found is not None
    row = found["sets"][0]["rows"][0]
    assert row["cllr"]["value"] is row["cllr_min"] is None
    assert row["strongly_misleading_real"]["value"] is not None
    assert [(one["name"], one["kind"]) for one in found["sets"][0]["rows"]] == [
        ("seen", "seen"),
        ("unseen", "real"),
        ("overall", "group"),
    ]
