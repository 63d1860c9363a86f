"""Two detectors as one: which decides, what the rows say, and which band is chosen."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.detector.card import Card, Decision
from patchscan.detector.cascade import Cascade, CascadeError, log_odds, needed_band, parse_band
from patchscan.evaluation.calibration import Target
from patchscan.evaluation.cascade import BY_SECOND, BandError, choose_band, cost, cost_finding, join
from patchscan.evaluation.evaluate import EvaluationError, Options, evaluate
from patchscan.evaluation.results import Evaluated
from patchscan.evaluation.scoring import apply_decision
from patchscan.scanning.cascade_scorer import CascadeAnswer, CascadeScorer
from patchscan.storage import open_store
from tests.import_kit import imported_run
from tests.scan_kit import StubScorer, card, image, table_of
from tests.serving_kit import png

ABSTAINS = Decision(threshold=0.7, abstain_low=0.4, abstain_high=0.7)


def named(name: str, **values: Any) -> Card:
    return replace(card(**values), name=name)


class Says(StubScorer):
    """Gives every image one logit."""

    def __init__(self, card: Card, logit: float):
        super().__init__(card)
        self.logit = logit

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        super().logits(crops)
        return [self.logit] * len(crops)


@pytest.mark.parametrize(
    ("first_p", "decision", "decided_by"),
    [
        (0.05, Decision(), "small"),
        (0.1, Decision(), "strong"),
        (0.5, Decision(), "strong"),
        (0.89, Decision(), "strong"),
        (0.95, Decision(), "small"),
        (0.05, replace(ABSTAINS, tiers={"native": None, "web": None, "hard": None, "enlarged": None}), "strong"),
    ],
)
def test_the_second_decides_what_the_first_leaves_open(first_p: float, decision: Decision, decided_by: str) -> None:
    first = Says(named("small", decision=decision), log_odds(first_p))
    second = Says(named("strong"), 2.0)
    scorer = CascadeScorer(first, second, 0.1, 0.9)
    answer = scorer.answer(image(1))
    assert isinstance(answer, CascadeAnswer)
    assert answer.decided_by == decided_by
    p_ai = first_p if decided_by == "small" else Decision().p_ai(2.0)
    assert (answer.p_ai, answer.logit) == pytest.approx((p_ai, log_odds(p_ai)))
    assert (answer.model, answer.digest) == ("small-then-strong", scorer.card.digest)
    assert second.scored == (decided_by == "strong")


def test_where_the_second_cannot_judge_the_first_may_not_settle() -> None:
    blind = Decision(tiers={"native": None, "web": None, "hard": None, "enlarged": None})
    scorer = CascadeScorer(Says(named("small"), 9.0), Says(named("strong", decision=blind), 9.0), 0.1, 0.9)
    answer = scorer.answer(image(1))
    assert isinstance(answer, CascadeAnswer)
    assert (answer.decided_by, answer.verdict, answer.reason) == ("strong", "uncertain", "out_of_domain")


def test_graphics_which_get_no_verdict_are_left_to_the_first() -> None:
    cascade = Cascade(first=named("small"), then=named("strong"), low=0.1, high=0.9)
    unsure = replace(Says(named("small"), 0.0).answer(image(1)), verdict="uncertain")
    assert cascade.settles(replace(unsure, reason="out_of_domain"))
    assert not cascade.settles(replace(unsure, reason="small_image"))
    blind = Decision(tiers={"native": None, "web": None, "hard": None, "enlarged": None})
    cascade = Cascade(first=named("small", decision=blind), then=named("strong"), low=0.1, high=0.9)
    assert not cascade.settles(replace(unsure, reason="out_of_domain"))
    first, then = evaluated("small", 1.0, 1), evaluated("strong", 3.0, 2)
    first.tables["raw"].loc[:9, "graphic"] = True
    first.tables["raw"].loc[5:9, "small"] = True
    first.tables["raw"].loc[:9, "measured_uncertain"] = True
    table = join(Cascade(first=first.card, then=then.card, low=0.2, high=0.9), first, then).tables["raw"]
    assert table[BY_SECOND][:10].tolist() == [False] * 5 + [True] * 5


def test_the_band_holds_all_thresholds() -> None:
    strong = named("strong", decision=replace(ABSTAINS, tiers={"web": Decision(threshold=0.8, abstain_high=0.8)}))
    assert needed_band(named("small"), strong) == (0.4, 0.8)
    assert Cascade(first=named("small"), then=strong, low=0.4, high=0.8).card.decision.tiers["web"]
    for low, high in ((0.41, 0.9), (0.1, 0.79)):
        with pytest.raises(CascadeError, match=r"leaves out a threshold of small or strong: it must hold 0\.4,0\.8"):
            Cascade(first=named("small"), then=strong, low=low, high=high)
    with pytest.raises(CascadeError, match="both detectors are named strong"):
        Cascade(first=strong, then=strong, low=0.1, high=0.9)
    with pytest.raises(CascadeError, match="two numbers from 0 to 1"):
        Cascade(first=named("small"), then=strong, low=0.1, high=1.1)
    for text in ("0.1", "a,b", "0.1,0.2,0.3"):
        with pytest.raises(CascadeError, match="two numbers from 0 to 1"):
            parse_band(text)


def test_another_band_or_member_is_another_model() -> None:
    cards = [
        Cascade(first=named("small"), then=named("strong"), low=0.1, high=0.9).card,
        Cascade(first=named("small"), then=named("strong"), low=0.1, high=0.95).card,
        Cascade(first=named("small", version="2"), then=named("strong"), low=0.1, high=0.9).card,
    ]
    assert len({one.digest for one in cards}) == 3


@pytest.mark.parametrize("p_ai", [0.0, 1e-300, 0.2, 0.5, 1 - 1e-12, 1.0])
def test_log_odds_give_p_ai_again(p_ai: float) -> None:
    assert Decision().p_ai(log_odds(p_ai)) == pytest.approx(p_ai, abs=1e-15)


@pytest.mark.slow
def test_a_folder_is_scanned_with_a_cascade(tmp_path: Path) -> None:
    small = imported_run(tmp_path / "small", 2, "small")
    strong = imported_run(tmp_path / "strong", 3, "strong")
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(6):
        (photos / f"{seed}.png").write_bytes(png(seed, 30 + 20 * seed, 40))
    out = tmp_path / "out"
    names = ["--first", str(small), "--then", str(strong), "--when"]
    arguments = ["scan", str(photos), "--out", str(out), *names]
    done = CliRunner().invoke(app, [*arguments, "0.4,0.6"])
    assert done.exit_code == 0, done.output
    (folder,) = (out / "scans").iterdir()
    rows = table_of(open_store(str(out)), folder.name)
    assert {row["decided_by"] for row in rows.values()} <= {"small", "strong"}
    assert {row["model"] for row in rows.values()} == {"small-then-strong"}
    again = CliRunner().invoke(app, [*arguments, "0.4,0.6"])
    assert "6 unchanged" in again.output
    wider = CliRunner().invoke(app, [*arguments, "0,1"])
    assert "6 scored" in wider.output
    for options, why in (
        (["--first", str(small)], "needs all of"),
        ([*names, "0.4,0.6", "--run", str(small)], "takes no --run"),
        ([*names, "0.6,0.7"], "leaves out a threshold"),
    ):
        assert why in str(CliRunner().invoke(app, ["scan", str(photos), "--out", str(out), *options]).exception)


def test_a_detector_that_comes_with_patchscan_goes_by_its_name_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("photos/one.png").write_bytes(png(1, 40, 40))
    arguments = ["scan", "photos", "--out", "out", "--first", "ssp-lite", "--then", "starter", "--when", "0,1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (folder,) = Path("out/scans").iterdir()
    assert table_of(open_store("out"), folder.name)["one.png"]["model"] == "ssp-lite-then-starter"
    shutil.copytree(imported_run(tmp_path / "mine", 2, "mine"), "starter")  # a folder of one's own goes first
    assert "unknown party" in CliRunner().invoke(app, ["scan", "photos", "--out", "other", "--run", "starter"]).output
    done = CliRunner().invoke(app, ["scan", "photos", "--out", "none", "--run", "stater"])
    assert "stater" in str(done.exception)


def scores(skill: float, seed: int) -> pd.DataFrame:
    """Scores of 400 images of one seen and one unseen generator."""
    rng = np.random.default_rng(seed)
    label = np.tile([0, 1], 200)
    table = pd.DataFrame({"label": label, "logit": rng.normal(0, 1, 400) + skill * (2 * label - 1)})
    table = table.assign(path=[f"{n}.png" for n in range(400)], generator=np.repeat(["sd", "other"], 200), split="val")
    codes = pd.Series([None] * 400, dtype="string")
    tier = pd.Series(["native"] * 400, dtype="string")
    return table.assign(small=False, graphic=False, tier=tier, status="scored", error_code=codes)


def evaluated(name: str, skill: float, seed: int, decision: Decision = Decision()) -> Evaluated:
    one = Card(
        name=name,
        version="1",
        architecture="ssp",
        preset=card().preset,
        weights_sha256="",
        decision=decision,
        training={"seen": ["sd"]},
    )
    return Evaluated(one, {"raw": apply_decision(scores(skill, seed), decision)}, None, Target())


def test_joined_tables_hold_each_ones_part() -> None:
    first, then = evaluated("small", 1.0, 1, ABSTAINS), evaluated("strong", 3.0, 2)
    table = join(Cascade(first=first.card, then=then.card, low=0.2, high=0.9), first, then).tables["raw"]
    one, other = first.tables["raw"], then.tables["raw"]
    assert table[BY_SECOND].equals((one.p_ai >= 0.2) & (one.p_ai < 0.9))
    assert table.p_ai.equals(one.p_ai.where(~table[BY_SECOND], other.p_ai))
    assert table.verdict.equals(one.verdict.where(~table[BY_SECOND], other.verdict))
    assert [Decision().p_ai(logit) for logit in table.logit] == pytest.approx(table.p_ai.tolist())
    assert table.dtypes[one.columns].equals(one.dtypes)


@pytest.mark.slow
def test_the_band_asks_the_second_no_more_than_the_loss_needs() -> None:
    first, then = evaluated("small", 1.0, 1), evaluated("strong", 3.0, 2)
    shares = []
    for loss in (0.0, 0.01, 0.05, 1.0):
        cascade = choose_band(first, then, loss)
        table = join(cascade, first, then).tables["raw"]
        seen, alone = table[table.generator == "sd"], then.tables["raw"][table.generator == "sd"]
        errors = [float((one.measured_ai != (one.label == 1)).mean()) for one in (seen, alone)]
        assert errors[0] <= errors[1] + loss + 1e-12
        shares.append(float(seen[BY_SECOND].mean()))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.3 > 0.1 > shares[3]
    unseen = replace(first, card=replace(first.card, training={}))
    with pytest.raises(BandError, match="no generator in these data was seen"):
        choose_band(unseen, replace(then, card=replace(then.card, training={})), 0.01)


def test_a_class_without_scores_costs_nothing_that_could_be_told() -> None:
    first, then = evaluated("first", 1.0, 1), evaluated("then", 2.0, 2)
    cascade = Cascade(first=first.card, then=then.card, low=0.0, high=1.0)
    both = join(cascade, first, then)
    none = replace(both, tables={"raw": both.tables["raw"].assign(logit=np.nan)})
    assert cost(none, (Path("first"), Path("then")), str.encode, "raw", None) == {}
    figures = {"asked": {"ai": 0.5}, "first_s": 0.001, "second_s": 0.004, "cascade_s": {"ai": 0.003}}
    chosen = cost_finding(cascade, figures, True).removeprefix(cost_finding(cascade, figures, False))
    assert "chosen on the seen generators' images here" in chosen
    assert cost_finding(cascade, figures, False).endswith(
        "then is asked about 50.0 % of the AI images. For the models an AI image takes 3.0 ms of a core; then alone"
        " takes 4.0 ms."
    )


def test_a_cascade_of_one_detector_is_refused_before_anything_is_scored(tmp_path: Path) -> None:
    card().write(tmp_path)
    with pytest.raises(EvaluationError, match="give --run twice"):
        evaluate([tmp_path], {"raw": tmp_path / "none"}, tmp_path / "out", Options(when_loss=0.01))
