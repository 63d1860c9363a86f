"""`patchscan evaluate`, `ensemble`, `explain` and `scan-video` on real run folders, files and videos."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.common.errors import UserError
from patchscan.common.files import sha256_of
from patchscan.common.shipped import shipped
from patchscan.detector.answer import Answer
from patchscan.detector.card import CARD_FILE, WEIGHTS_FILE, Card
from patchscan.detector.cascade import needed_band
from patchscan.detector.detector import Detector
from patchscan.detector.models import build_network
from patchscan.detector.presets import PatchPreset, Preset, WholeImagePreset
from patchscan.evaluation.tiers import deliver
from tests import no_pictures

PER_CLASS = 8
EACH = ("--data", "{data}", "--data", "{more}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generators of smooth pictures against noisy photographs, one file cut short and one image too small."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for generator in ("smooth", "other"):
        for kind, noise in (("ai", 2.0), ("nature", 12.0)):
            place = folder / generator / "val" / kind
            place.mkdir(parents=True)
            for number in range(PER_CLASS):
                pixels = np.linspace(40, 200, 80 * 80 * 3).reshape(80, 80, 3) + rng.normal(0, noise, (80, 80, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number}.png")
    whole = (folder / "other/val/ai/0.png").read_bytes()
    (folder / "other/val/ai/cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def make_run(folder: Path, seed: int, architecture: str = "ssp-lite", preset: Preset = PatchPreset(count=2)) -> Path:
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    save_file(build_network(architecture).state_dict(), folder / WEIGHTS_FILE)
    Card(
        name=folder.name,
        version="1.0",
        architecture=architecture,
        preset=preset,
        weights_sha256=sha256_of(folder / WEIGHTS_FILE),
        training={"seen": ["smooth"], "unseen": ["other"]},
        warnings=["a warning from training"],
    ).write(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "first", 1), make_run(folder / "second", 2)]


def patchscan(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def report(data: Path, runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    with no_pictures.replaced(no_pictures.COMPOSE):
        patchscan("evaluate", "--run", runs[0], "--run", runs[1], "--data", data, "--out", out, "--robustness", 2)
    return out


def test_a_cascade_is_judged_as_one_model_and_scans_alike(
    data: Path, runs: list[Path], report: Path, tmp_path: Path
) -> None:
    copies = [shutil.copytree(run, tmp_path / run.name) for run in runs]
    for copy in copies:  # every tier is decided alike, so that none is out of the domain
        card = Card.read(copy)
        replace(card, decision=replace(card.decision, tiers={})).write(copy)
    low, high = needed_band(*(Card.read(copy) for copy in copies))
    band = f"{low!r},{high!r}"
    two = ["--run", copies[0], "--run", copies[1], "--data", data, "--out", tmp_path / "out"]
    said = patchscan("evaluate", *two, "--no-calibrate", "--tier", "native", "--when", band)
    assert "first-then-second: first settles what it gives a p_ai below" in said
    judged = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [model["name"] for model in judged["models"]] == ["first", "second", "first-then-second"]
    cost, rows = judged["cascade"], _rows(judged["models"][2])
    assert cost["cascade_s"]["ai"] == pytest.approx(cost["first_s"] + cost["asked"]["ai"] * cost["second_s"])
    two = ["--first", copies[0], "--then", copies[1], "--when", band]
    patchscan("scan", data, *two, "--out", tmp_path / "scan", "--labels", "folders")
    (folder,) = (tmp_path / "scan" / "scans").iterdir()
    scanned = _rows(json.loads((folder / "evaluation" / "report.json").read_text())["models"][0])
    for name in ("smooth", "other", "overall"):
        assert scanned[name]["confusion"] == rows[name]["confusion"]
        assert scanned[name]["counts"]["uncertain"] == rows[name]["counts"]["uncertain"]
    deciders = json.loads((folder / "report.json").read_text())["model"]["deciders"]
    asked = sum(cost["asked"][name] * rows["overall"]["counts"][name] for name in ("real", "ai"))
    assert {one["name"]: one["scored"] for one in deciders}.get("second", 0) == round(asked)


def test_labels_name_the_images_that_are_judged_and_change_no_card(
    data: Path, runs: list[Path], tmp_path: Path
) -> None:
    run = shutil.copytree(runs[0], tmp_path / "run")
    card = (run / "card.json").read_bytes()
    images = sorted(path.relative_to(data).as_posix() for path in data.rglob("val/*/*") if path.is_file())
    lines = [f"{key},{'ai' if '/ai/' in key else 'real'}" for key in images]
    (tmp_path / "labels.csv").write_text("\n".join(["key,label", *lines, "gone.png,ai", "odd.png,cannot_tell"]))
    two = ["--run", run, "--data", data, "--tier", "native", "--out", tmp_path / "out"]
    patchscan("evaluate", *two, "--labels", tmp_path / "labels.csv")
    judged = json.loads((tmp_path / "out" / "report.json").read_text())
    labels = {"file": str(tmp_path / "labels.csv"), "labelled": len(images) + 1, "cannot_tell": 1}
    labels |= {"unavailable": 1, "unavailable_keys": {"gone.png": "vanished"}}
    assert judged["data"]["labels"] == labels
    assert (judged["data"]["images"], judged["data"]["in_train"]) == (len(images), None)
    assert "not weighted" in (tmp_path / "out" / "report.html").read_text()
    assert (run / "card.json").read_bytes() == card
    patchscan("evaluate", *two, "--no-calibrate", "--limit", 1000)
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert again["data"]["labels"] is None
    confusion = [_rows(one["models"][0])["overall"]["confusion"] for one in (judged, again)]
    assert confusion[0] == confusion[1]
    refused = CliRunner().invoke(app, [*map(str, ("evaluate", *two, "--labels", "x.csv", "--protocol", "both"))])
    assert refused.exit_code == 2


def _rows(model: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in model["results"]["raw"]["rows"]}


def test_report_counts_every_file_and_the_card_carries_what_was_measured(report: Path, runs: list[Path]) -> None:
    content = json.loads((report / "report.json").read_text())
    for model, run in zip(content["models"], runs, strict=True):
        rows = {row["name"]: row for row in model["results"]["raw"]["rows"]}
        assert rows["smooth"]["kind"] == "seen"
        assert rows["other"]["kind"] == "unseen"
        assert rows["other"]["counts"]["rejected"] == 1
        assert rows["overall"]["counts"]["images"] == 4 * PER_CLASS + 1
        card = Card.read(run)
        assert card.digest == model["digest"]
        assert f"{PER_CLASS} AI and {PER_CLASS} real images (smooth" in card.decision.chosen_by
        assert card.metrics["raw"]["other"]["auc"][0] == rows["other"]["metrics"]["auc"]["value"]
        assert card.robustness["images"] == 8
        assert (card.draws["digest"], card.draws["images"] > 0) == (card.digest, True)
        families = {row["family"] for row in card.robustness["rows"]}
        assert families == {"undisturbed", "jpeg", "double jpeg", "blur", "resize", "crop", "noise", "screenshot"}
        assert card.warnings == ["a warning from training"]


def test_scores_are_what_serving_answers(report: Path, runs: list[Path], data: Path) -> None:
    scores = pd.read_parquet(report / "scores" / "first-raw.parquet")
    assert len(scores) == 4 * PER_CLASS + 1
    assert scores.error_code.dropna().tolist() == ["truncated"]
    detector = Detector.load(runs[0])
    for row in scores[scores.status == "scored"].iloc[::7].itertuples():
        answer = detector.score([(data / str(row.path)).read_bytes()])[0]
        assert isinstance(answer, Answer)
        assert (answer.logit, answer.verdict) == (row.logit, row.verdict)
        assert answer.p_ai == pytest.approx(row.p_ai, abs=1e-12)


def test_a_second_evaluation_scores_nothing_and_says_the_same(
    report: Path, runs: list[Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((report / "report.json").read_text())
    monkeypatch.setattr(Detector, "logits", None)
    patchscan("evaluate", "--run", runs[0], "--run", runs[1], "--data", data, "--out", report, "--robustness", 2)
    after = json.loads((report / "report.json").read_text())
    assert {**before, "created": ""} == {**after, "created": ""}


def test_keeping_the_decision_leaves_the_digest(report: Path, runs: list[Path], data: Path, tmp_path: Path) -> None:
    digest = Card.read(runs[0]).digest
    same = ["--run", runs[0], "--data", data, "--out", tmp_path, "--limit", 4]
    assert f"\nfigures written to {runs[0] / CARD_FILE}\n" in patchscan("evaluate", *same, "--no-calibrate")
    assert Card.read(runs[0]).digest == digest
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["models"][0]["calibrated_on"] is None
    assert content["data"]["images"] == 16


def test_a_detector_that_comes_with_patchscan_is_evaluated_by_name_and_keeps_its_card(
    data: Path, tmp_path: Path
) -> None:
    card = shipped("model_store") / "ssp-lite" / CARD_FILE
    before = card.read_bytes()
    said = patchscan("evaluate", "--run", "ssp-lite", "--data", data, "--out", tmp_path, "--tier", "native")
    assert f"{card} came with patchscan, and stays as it is" in said
    assert card.read_bytes() == before


def test_several_data_sets_and_photographs_alone_make_one_scoreboard(
    data: Path, runs: list[Path], tmp_path: Path
) -> None:
    """A folder of both classes and one of real images by kind; the sources of some are named beside them."""
    both, kinds = tmp_path / "mix", tmp_path / "alarms"
    (tmp_path / "mix").symlink_to(data)
    night = kinds / "night/val/nature"
    night.mkdir(parents=True)
    for number in range(4):
        (night / f"{number}.png").write_bytes((data / f"other/val/nature/{number}.png").read_bytes())
    names = [f"alarms/night/val/nature/{number}.png,owner/night/{number}.png\n" for number in range(4)]
    (tmp_path / "sources.csv").write_text("file,source\n" + "".join(names))
    run = make_run(tmp_path / "run", 4)
    arguments = ("--run", run, "--data", both, "--data", kinds, "--out", tmp_path / "out", "--limit", 6)
    patchscan("evaluate", *arguments, "--tier", "web", "--group", "all of them=smooth,other")

    model = json.loads((tmp_path / "out/report.json").read_text())["models"][0]
    mix, alarms = model["scoreboard"]
    assert (mix["name"], alarms["name"]) == ("mix", "alarms")
    assert [(row["name"], row["kind"]) for row in mix["rows"]] == [
        ("smooth", "seen"),
        ("other", "unseen"),
        ("all of them", "group"),
    ]
    assert list(mix["rows"][0]["tiers"]) == ["native", "web"]
    assert (mix["sources_known"], alarms["sources_known"], alarms["real_collections"]) == (0, 4, 1)
    assert list(model["results"]) == ["mix"]
    card = Card.read(run)
    assert {(row["data"], row["tier"]) for row in card.scoreboard} == {
        (name, tier) for name in ("mix", "alarms") for tier in ("native", "web")
    }
    detector = Detector.load(run)
    scores = pd.read_parquet(tmp_path / "out/scores/run-alarms.web.parquet")
    for row in scores.itertuples():
        answer = detector.score([deliver((kinds / str(row.path)).read_bytes(), "web")])[0]
        assert isinstance(answer, Answer)
        assert (answer.logit, answer.tier, answer.verdict) == (row.logit, row.tier, row.verdict)
        assert answer.jpeg_quality in (75, None)


def test_data_sets_of_one_name_are_refused(data: Path, runs: list[Path], tmp_path: Path) -> None:
    arguments = ["evaluate", "--run", runs[0], "--data", data, "--data", f"{data}/", "--out", tmp_path]
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 2
    assert "same name" in result.output


def test_an_ensemble_is_evaluated_like_any_other(report: Path, runs: list[Path], data: Path, tmp_path: Path) -> None:
    patchscan("ensemble", "--run", runs[0], "--run", runs[1], "--out", tmp_path / "both", "--name", "both")
    patchscan("evaluate", "--run", tmp_path / "both", "--data", data, "--out", tmp_path / "report")
    card = Card.read(tmp_path / "both")
    assert card.metrics["raw"]["overall"]["counts"]["scored"] == 4 * PER_CLASS
    assert card.decision.threshold > 0


def test_explain_agrees_with_serving(
    report: Path, runs: list[Path], data: Path, pictures: None, tmp_path: Path
) -> None:
    image = data / "smooth/val/ai/3.png"
    figures = json.loads(patchscan("explain", image, "--run", runs[0], "--out", tmp_path / "why.png"))
    answer = Detector.load(runs[0]).score([image.read_bytes()])[0]
    assert isinstance(answer, Answer)
    assert (figures["logit"], figures["patch"]) == (answer.logit, answer.patch)
    (view,) = figures["views"]
    assert view["p_ai"] == answer.p_ai
    assert min(view["complexity"]) == answer.patch["complexity"]
    assert len(figures["p_ai_of_other_choices"]) == 20
    with Image.open(tmp_path / "why.png") as picture:
        assert picture.width > 400


def test_whole_images_and_ensembles_are_explained_by_what_each_model_saw(
    report: Path, runs: list[Path], data: Path, tmp_path: Path
) -> None:
    whole = make_run(tmp_path / "whole", 3, "efficientnet-lite0", WholeImagePreset())
    patchscan("ensemble", "--run", runs[0], "--run", whole, "--out", tmp_path / "both", "--name", "both")
    image = data / "smooth/val/ai/3.png"
    figures = json.loads(patchscan("explain", image, "--run", tmp_path / "both", "--out", tmp_path / "why.png"))
    patches, seen = figures["views"]
    assert (patches["architecture"], seen["architecture"]) == ("ssp-lite", "efficientnet-lite0")
    alone = [Detector.load(run).score([image.read_bytes()])[0] for run in (runs[0], whole)]
    assert [patches["p_ai"], seen["p_ai"]] == pytest.approx([one.p_ai for one in alone if isinstance(one, Answer)])
    assert np.shape(seen["weight"]) == (7, 7)
    assert np.ptp(seen["weight"]) > 0
    figures = json.loads(patchscan("explain", image, "--run", whole, "--out", tmp_path / "alone.png"))
    assert figures["views"] == [seen]


def make_video(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        rng = np.random.default_rng(0)
        for _ in range(50):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_damaged_video_is_scored_as_far_as_it_goes(runs: list[Path], tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    patchscan("scan-video", tmp_path / "cut.avi", "--run", runs[0], "--out", tmp_path / "out", "--frames", 10)
    content = json.loads((tmp_path / "out" / "video.json").read_text())
    assert content["scored"] == len(content["rows"]) > 0
    assert content["rows"][-1]["second"] < 3


def test_video_is_sampled_evenly_and_scored(report: Path, runs: list[Path], tmp_path: Path) -> None:
    video = make_video(tmp_path / "clip.mp4")
    patchscan("scan-video", video, "--run", runs[0], "--out", tmp_path / "out", "--frames", 25)
    content = json.loads((tmp_path / "out" / "video.json").read_text())
    assert content["scored"] == 25
    assert [row["frame"] for row in content["rows"]] == np.linspace(0, 49, 25).round().astype(int).tolist()
    assert content["rows"][-1]["second"] == pytest.approx(4.9)
    mean = content["mean_p_ai"]
    assert mean["low"] <= mean["value"] <= mean["high"]
    assert "data-json" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluate", "--run", "{run}", "--data", "{empty}", "--out", "{out}"], "no image is in <generator>"),
        (["evaluate", "--run", "{empty}", "--data", "{data}", "--out", "{out}"], "is missing"),
        (["evaluate", "--run", "{run}", "--run", "{run}", "--data", "{data}", "--out", "{out}"], "same name"),
        (
            ["evaluate", "--run", "{run}", "--data", "{data}", "--out", "{out}", "--group", "two=smooth,othr"],
            "the group two: there are no images of othr; these data have other, smooth",
        ),
        (
            ["evaluate", "--run", "{run}", "--data", "{data}", "--out", "{out}", "--group", "smooth=smooth,other"],
            "the report has a row smooth without --group",
        ),
        (
            ["evaluate", "--run", "{run}", *EACH, "--out", "{out}", "--group", "both=other,alone"],
            "the group both: no data set has all of other, alone",
        ),
        (["evaluate", "--run", "{run}", "--data", "{taken}", "--out", "{out}"], "reports have a row all seen of their"),
        (["explain", "{data}/other/val/ai/cut.png", "--run", "{run}", "--out", "{out}/why.png"], "truncated"),
        (["explain", "{data}/nowhere.png", "--run", "{run}", "--out", "{out}/why.png"], "cannot read"),
        (["scan-video", "{data}/other/val/ai/cut.png", "--run", "{run}", "--out", "{out}"], "damaged"),
        (["scan-video", "{data}/nowhere.mp4", "--run", "{run}", "--out", "{out}"], "cannot read"),
    ],
)
def test_what_a_user_got_wrong_is_one_clear_line(
    arguments: list[str], says: str, data: Path, runs: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(data / "other", tmp_path / "taken" / "all seen")
    shutil.copytree(data / "other", tmp_path / "more" / "alone")
    places = {"run": runs[0], "data": data, "empty": tmp_path / "empty", "out": tmp_path / "out"}
    places |= {name: tmp_path / name for name in ("taken", "more")}
    with pytest.raises(UserError, match=says):
        CliRunner().invoke(app, [one.format(**places) for one in arguments], catch_exceptions=False)
