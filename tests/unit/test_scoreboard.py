"""The scoreboard counts sources, not images, and weighs what each bootstrap sample holds."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from patchscan.dataset.matched import SETTINGS_FILE, Settings, build_matched
from patchscan.dataset.sources import SourcesError, add_sources, find_sources
from patchscan.detector.answer import TIERS
from patchscan.detector.card import Card, Decision
from patchscan.detector.presets import PatchPreset
from patchscan.evaluation.calibration import Target
from patchscan.evaluation.evaluate import tell_unknown_sources
from patchscan.evaluation.findings import scoreboard_findings, single_collections
from patchscan.evaluation.markdown import _percent, results_tables
from patchscan.evaluation.results import Evaluated, operating_points, result_rows
from patchscan.evaluation.scoreboard import bounds_by_tier, card_scoreboard, scoreboard, source_counts, weighted_auc
from patchscan.evaluation.scoring import apply_decision
from patchscan.reporting.pages import show_estimate
from tests.image_tree import picture, write


def deliveries(skill: float = 2.0, images: int = 60, copies: int = 1) -> pd.DataFrame:
    """Two generators and photographs in every tier, and a data set of photographs alone; `copies` images a source."""
    rng = np.random.default_rng(0)
    parts = []
    for data, generator, label in (
        ("mix", "seen", 1),
        ("mix", "seen", 0),
        ("mix", "other", 1),
        ("mix", "other", 0),
        ("alarms", "art", 0),
        ("alarms", "night", 0),
    ):
        source = np.arange(images) // copies
        logit = rng.normal(skill * label, 1, images)[source * copies]
        table = pd.DataFrame(
            {
                "path": [f"{generator}/{label}/{number}" for number in range(images)],
                "generator": generator,
                "split": "val",
                "label": label,
                "logit": logit,
                "small": False,
                "graphic": False,
                "status": "scored",
                "error_code": None,
                "data": data,
                "source": [f"{generator}/{label}/{one}" for one in source],
                "collection": [f"{generator}/{label}/{one}" for one in source],
                "source_known": True,
            }
        )
        parts += [table.assign(tier=tier, delivered=tier) for tier in TIERS]
    return pd.concat(parts, ignore_index=True)


def evaluated(table: pd.DataFrame, decision: Decision = Decision(threshold=0.8)) -> Evaluated:
    card = Card(name="test", version="1", architecture="ssp-lite", preset=PatchPreset(), weights_sha256="0",
                decision=decision, training={"seen": ["seen"]})  # fmt: skip
    return Evaluated(card, {}, None, Target(), apply_decision(table, decision))


def test_rows_name_seen_unseen_and_means_and_photographs_alone_have_false_alarms_by_kind() -> None:
    mix, alarms = scoreboard(evaluated(deliveries()), {"both": ["seen", "other"]})
    assert [(row["name"], row["kind"]) for row in mix["rows"]] == [
        ("seen", "seen"),
        ("other", "unseen"),
        ("both", "group"),
    ]
    auc = [row["tiers"]["web"]["auc"] for row in mix["rows"]]
    assert auc[2]["value"] == pytest.approx((auc[0]["value"] + auc[1]["value"]) / 2)
    assert auc[2]["high"] - auc[2]["low"] < auc[0]["high"] - auc[0]["low"]
    assert [row["name"] for row in alarms["rows"]] == ["art", "night", "mean of the kinds"]
    night = alarms["rows"][1]["tiers"]["hard"]
    assert night["auc"]["value"] is None
    assert 0 < night["false_alarms"]["value"] < 0.5
    assert mix["estimated"]["web"] == {"native": 0.0, "web": 1.0, "hard": 0.0, "enlarged": 0.0}
    assert len(card_scoreboard([mix, alarms])) == 6 * len(TIERS)


def test_a_group_has_a_row_where_all_its_members_are() -> None:
    groups = {"solo": ["other"], "across": ["seen", "night"], "dark": ["night", "art"]}
    mix, alarms = scoreboard(evaluated(deliveries()), groups)
    assert [row["name"] for row in mix["rows"]] == ["seen", "other", "solo"]
    assert [row["name"] for row in alarms["rows"]] == ["art", "night", "mean of the kinds", "dark"]


def test_markdown_says_neither_all_nor_none_where_it_is_not() -> None:
    """997 and 3 of 1,000 are not 100 and 0 %, and 99,999 of 100,000 no accuracy of 100.00 %."""
    assert (_percent(0.997, "0"), _percent(0.003, "0"), _percent(1.0, "0"), _percent(0.0, "0")) == (
        "> 99", "< 1", "100", "0"
    )  # fmt: skip
    assert (_percent(0.99999, "2"), _percent(0.98765, "2")) == ("> 99.99", "98.77")
    estimate = {"value": 0.997, "low": 0.9, "high": 0.9999}
    assert show_estimate(estimate, "0", _percent) == "> 99 (90 to > 99)"


def test_no_kind_is_called_ai_most_often_where_none_is() -> None:
    table = deliveries()
    _, alarms = scoreboard(evaluated(table.assign(logit=table.logit.where(table.data == "mix", -9.0))), {})
    assert scoreboard_findings("m", alarms) == ["[alarms] m calls no real image of any kind AI, as stored."]


def test_findings_tell_what_delivery_costs_and_which_kind_is_called_ai_most_often() -> None:
    table = deliveries()
    table.loc[(table.generator == "night") & (table.delivered == "native"), "logit"] = 9.0
    mix, alarms = scoreboard(evaluated(table), {})
    mix["rows"].append(mix["rows"][1] | {"name": "mean of unseen", "kind": "group"})
    (delivered,) = scoreboard_findings("m", mix)
    assert re.fullmatch(
        r"\[mix\] m's AUC, mean of unseen generators, by delivery: "
        r"0\.\d\d \(.*\) as native, 0\.\d\d .* as web, .* as hard, .* as enlarged\.",
        delivered,
    )
    mix["rows"][-1]["tiers"]["native"]["auc"] = {"value": 1.0, "low": None, "high": None}  # all resamples are equal
    assert "by delivery: 1.00 as native, 0." in scoreboard_findings("m", mix)[0]
    (worst,) = scoreboard_findings("m", alarms)
    assert worst == "[alarms] Of the kinds of real images m calls night AI most often: 100.0\u00a0% of them as stored."


def test_markdown_has_the_auc_of_generators_and_the_false_alarms_of_kinds() -> None:
    mix, alarms = scoreboard(evaluated(deliveries()), {"both": ["seen", "other"]})
    text = results_tables({"protocols": [], "models": [{"name": "m", "scoreboard": [mix, alarms]}]})
    of_mix, of_alarms = text.split("m on alarms: ", 1)
    assert of_mix.startswith("m on mix: AUC.\n\n|  | native | web | hard | enlarged |\n| --- |")
    assert re.search(r"^\| other \| 0\.\d\d \(0\.\d\d to [01]\.\d\d\) \|", of_mix, re.MULTILINE)
    assert re.search(r"found at the threshold, %\.\n\n.*\n.*\n\| both \| \d+ \(\d+ to \d+\) \|", of_mix)
    assert re.search(
        r"calibration error \(ECE\) of p_ai\.\n\n.*\n.*\n\| both \| 0\.\d{3} \(0\.\d{3} to 0\.\d{3}\) \|", of_mix
    )
    assert re.search(r"^real images called AI, %\.\n\n.*\n.*\n\| art \|", of_alarms)
    assert "AUC" not in of_alarms


def test_markdown_says_why_a_cell_of_the_scoreboard_is_empty() -> None:
    table = deliveries()
    table = table[(table.data == "mix") & ~((table.generator == "other") & (table.label == 0))]
    (mix,) = scoreboard(evaluated(table), {"both": ["seen", "other"]})
    text = results_tables({"protocols": [], "models": [{"name": "m", "scoreboard": [mix]}]})
    assert "| other | – | – | – | – |" in text
    assert "\n\n– other: no photographs; both: one of its generators has no figure.\n\n" in text
    title = "AI images found where 0.1 % of the photographs are called AI, %"
    assert f"{title}.\n\nNot given: these data have 60 photographs, and at least 1,000 are needed.\n" in text


def test_markdown_has_detection_at_a_thousandth_of_a_thousand_photographs() -> None:
    table = deliveries(images=500)
    table = table[(table.data == "mix") & table.delivered.isin(["native", "web"])]
    (mix,) = scoreboard(evaluated(table), {"both": ["seen", "other"]})
    text = results_tables({"protocols": [], "models": [{"name": "m", "scoreboard": [mix]}]})
    title = "AI images found where 0.1 % of the photographs are called AI, %"
    assert re.search(rf"{title}\.\n\n.*\n.*\n\| both \| \d+ \(\d+ to \d+\) \|", text)


def test_a_thousandth_needs_a_thousand_photographs() -> None:
    mix, _ = scoreboard(evaluated(deliveries()), {})
    values = mix["rows"][0]["tiers"]["native"]
    assert values["tpr_at_fpr_1"]["value"] is not None  # 120 photographs of the data set together
    assert values["tpr_at_fpr_01"]["value"] is None


def test_false_alarms_count_verdicts_and_not_what_is_uncertain() -> None:
    tiers = {"hard": None, "enlarged": Decision(threshold=0.8)}
    _, alarms = scoreboard(evaluated(deliveries(), Decision(threshold=0.8, tiers=tiers)), {})
    night = alarms["rows"][1]["tiers"]
    assert night["hard"]["false_alarms"]["value"] == 0
    assert night["enlarged"]["false_alarms"]["value"] == night["native"]["false_alarms"]["value"] > 0
    bounds = {row["tier"]: row for row in bounds_by_tier(evaluated(deliveries(), Decision(tiers={"hard": None})))}
    assert (bounds["hard"]["covered"], bounds["hard"]["seen"]["called_ai"]) == (False, 0.0)
    assert bounds["web"]["seen"]["images"] == 60


def test_a_share_is_promised_only_of_tiers_with_enough_photographs_to_fit_to() -> None:
    """5 % takes 19 photographs. Without AI images a tier has the numbers of native, which were fitted to others."""
    table = deliveries()
    few = (table.tier == "hard") & (table.label == 0) & ~table.path.isin([f"seen/0/{number}" for number in range(18)])
    table = table[~few & ~((table.tier == "web") & (table.label == 1))]
    fitted = replace(evaluated(table), calibrated_on="mix")
    assert fitted.deliveries is not None
    promised = {row["tier"]: row["promised"] for row in bounds_by_tier(fitted)}
    assert promised == {"native": 0.05, "web": None, "hard": None, "enlarged": 0.05}
    stored = replace(fitted, deliveries=fitted.deliveries[fitted.deliveries.delivered == "native"])
    assert {row["promised"] for row in bounds_by_tier(stored)} == {None}, "all images were fitted together"
    assert {row["promised"] for row in bounds_by_tier(replace(fitted, calibrated_on=None))} == {None}


def test_images_of_one_source_widen_the_interval() -> None:
    widths = []
    for copies in (1, 12):
        mix, _ = scoreboard(evaluated(deliveries(images=120, copies=copies)), {})
        auc = mix["rows"][0]["tiers"]["native"]["auc"]
        widths.append(auc["high"] - auc["low"])
    assert widths[1] > 2 * widths[0]


def test_collections_are_drawn_and_then_their_sources() -> None:
    images = pd.DataFrame(
        {
            "generator": "g",
            "label": 1,
            "collection": ["a"] * 4 + ["b"] * 2,
            "source": ["a1", "a1", "a2", "a2", "b1", "b2"],
        }
    )
    counts = source_counts(images, resamples=4000)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(6), abs=0.06)
    # Both draws of a collection are a in a quarter of the samples; then nothing of b is there.
    assert (counts[:, 4:].sum(axis=1) == 0).mean() == pytest.approx(0.25, abs=0.03)


def test_a_collection_beside_several_generators_is_drawn_as_one() -> None:
    """The photographs of one collection are alike, whichever generator they stand beside: otherwise the mean over the
    generators, and a threshold from all photographs, would look surer than they are."""
    images = pd.DataFrame(
        {
            "generator": np.repeat(["g", "h"], 6),
            "label": 0,
            "collection": ["a", "a", "b", "b", "c", "c"] * 2,
            "source": ["a1", "a1", "b1", "b1", "c1", "c1"] * 2,
        }
    )
    counts = source_counts(images, resamples=300)
    assert (counts[:, :6] == counts[:, 6:]).all()
    assert (counts.sum(axis=1) == 12).all()


def one_ai_collection() -> pd.DataFrame:
    """A generator whose AI images are one gallery of single pictures, beside photographs of six photographers, some of
    whom are often taken for AI."""
    table = deliveries(images=60).query("generator == 'seen' and delivered == 'native'").reset_index(drop=True)
    photographer = np.arange(len(table)) % 6
    collection = np.where(table.label == 0, [f"p{one}" for one in photographer], "gallery")
    logit = table.logit + np.where(table.label == 0, photographer * 0.5 - 1, 0)
    return table.assign(collection=collection, logit=logit)


def test_a_rate_has_the_same_interval_by_threshold_as_in_its_generators_row() -> None:
    """Of several generators each AI gallery is a collection, but alone it is counted by its pictures, everywhere."""
    other = one_ai_collection()
    for column in ("path", "source", "collection", "generator"):
        other[column] = "other-" + other[column]
    table = pd.concat([one_ai_collection(), other], ignore_index=True)
    model = evaluated(table)
    model = replace(model, tables={"mix": apply_decision(table, model.card.decision)})
    unseen = operating_points(model, "mix")[0]["groups"]["unseen"]
    (row,) = (one for one in result_rows(model, "mix") if one["name"] == "other-seen")
    assert unseen["fake_detection"] == row["metrics"]["fake_detection"]


def test_a_finding_says_whose_images_come_from_one_collection() -> None:
    (mix,) = scoreboard(evaluated(one_ai_collection()), {})
    told = "[mix] From one collection each, so that no interval covers other collections: the AI images of seen."
    assert single_collections(mix) == [told]
    assert single_collections(mix | {"sources_known": 0}) == []
    table = deliveries()
    table = table.assign(collection=table.collection.where(table.generator != "night", "owner/night"))
    assert [single_collections(data) for data in scoreboard(evaluated(table), {})] == [
        [],
        ["[alarms] From one collection each, so that no interval covers other collections: the real images of night."],
    ]


def test_weighted_auc_is_that_of_repeated_images() -> None:
    rng = np.random.default_rng(0)
    ai, real = rng.integers(0, 9, 40).astype(float), rng.integers(0, 7, 30).astype(float)
    ai_counts, real_counts = rng.integers(0, 4, (5, 40)), rng.integers(0, 4, (5, 30))
    for row, value in enumerate(weighted_auc(ai, ai_counts, real, real_counts)):
        label = np.repeat([1, 0], [40, 30])
        weight = np.concatenate([ai_counts[row], real_counts[row]])
        assert value == pytest.approx(roc_auc_score(label, np.concatenate([ai, real]), sample_weight=weight))


@pytest.mark.parametrize("place", ["mix/sources.csv", "sources.csv", "elsewhere.csv"])
def test_sources_are_named_below_the_data_or_below_its_folder(place: str, tmp_path: Path) -> None:
    data, file = tmp_path / "mix", tmp_path / place
    data.mkdir()
    prefix = "" if file.parent == data else "mix/"
    file.write_text(
        f"file,source\n{prefix}g/val/ai/1.png,owner/set/one.png\n{prefix}g/val/ai/2.png,owner/set/two.png\n"
    )
    images = pd.DataFrame({"path": ["g/val/ai/1.png", "g/val/ai/2.png", "g/val/ai/3.png"]})
    found = add_sources(images, data, find_sources(data) or file)
    assert found.source.tolist() == ["owner/set/one.png", "owner/set/two.png", "mix/g/val/ai/3.png"]
    assert found.collection.tolist() == ["owner/set", "owner/set", "mix/g/val/ai/3.png"]
    assert found.source_known.tolist() == [True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_crops_of_a_matched_version_have_the_sources_of_their_originals(named: bool, tmp_path: Path) -> None:
    """Also where the version was made by 0.1, which did not name the data set it was made of."""
    data, matched = tmp_path / "mix", tmp_path / "mix-matched"
    for label in ("ai", "nature"):
        for number in range(3):
            write(data / "g" / "val" / label / f"{number}.png", picture(number))
    crops = build_matched(data, matched, Settings(size=32), workers=1).crops
    if not named:
        kept = json.loads((matched / SETTINGS_FILE).read_text())
        (matched / SETTINGS_FILE).write_text(json.dumps({key: kept[key] for key in kept if key != "source"}))
        build_matched(data, matched, Settings(size=32), workers=1)
    lines = [
        f"mix/g/val/{label}/{number}.png,owner/set/{label}{number}" for label in ("ai", "nature") for number in (0, 1)
    ]
    (tmp_path / "sources.csv").write_text("file,source\n" + "\n".join(lines))
    found = add_sources(
        crops[["path", "source"]].rename(columns={"source": "original"}), matched, find_sources(matched)
    )
    assert found.source_known.sum() == 4
    expected = {
        f"g/val/{label}/{number}.png": f"owner/set/{label}{number}" for label in ("ai", "nature") for number in (0, 1)
    }
    assert [expected.get(one, f"mix/{one}") for one in found.original] == found.source.tolist()
    assert (found[found.source_known].collection == "owner/set").all()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("file,origin\n", "columns"),
        ("", "columns"),
        ("file,source\na,one, two\n", "line 2: more values than columns"),
        ("file,source\na,one\nb,two\na,three\n", "line 4: a has another source further up"),
        ("file,source\n\xe9,one\n", "cannot read .*sources.csv: 'utf-8'"),
    ],
)
def test_a_file_of_sources_that_cannot_be_relied_on_is_refused(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "sources.csv").write_bytes(text.encode("latin1"))
    with pytest.raises(SourcesError, match=why):
        add_sources(pd.DataFrame({"path": ["a"]}), tmp_path, find_sources(tmp_path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_sources_are_read_as_they_are_written(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photographer may be called NA; the data folder may be the one that a person is in."""
    lines = "file,source\n./a,NA\nb,\nc,owner/set/3\nc,owner/set/3\nd\n,x\n,y\n"
    (tmp_path / "sources.csv").write_text(lines, encoding)
    monkeypatch.chdir(tmp_path)
    found = add_sources(pd.DataFrame({"path": ["a", "b", "c", "d"]}), ".", tmp_path / "sources.csv")
    assert found.source.tolist() == ["NA", f"{tmp_path.name}/b", "owner/set/3", f"{tmp_path.name}/d"]
    assert found.source_known.tolist() == [True, False, True, False]


@pytest.mark.parametrize("named", ["genmix", "genmix-2026"])
def test_a_link_to_the_data_and_what_it_leads_to_are_both_their_name(named: str, tmp_path: Path) -> None:
    (tmp_path / "genmix-2026").mkdir()
    (tmp_path / "genmix").symlink_to("genmix-2026")
    (tmp_path / "sources.csv").write_text(f"file,source\n{named}/a,owner\n")
    found = add_sources(pd.DataFrame({"path": ["a"]}), tmp_path / "genmix", tmp_path / "sources.csv")
    assert found.source.tolist() == ["owner"]


def test_a_file_that_names_none_of_the_images_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sources.csv"
    for named, told in (("elsewhere/a", True), ("a", False)):
        file.write_text(f"file,source\n{named},owner\n")
        tell_unknown_sources(add_sources(pd.DataFrame({"path": ["a"]}), tmp_path, file), tmp_path, file)
        assert ("sources.csv names no source of the 1 images" in capsys.readouterr().err) == told
