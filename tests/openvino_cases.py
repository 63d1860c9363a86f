"""OpenVINO scores as PyTorch does; bfloat16 is for convolutions alone, and for models that it was measured to suit."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.common.errors import UserError
from patchscan.common.shipped import shipped
from patchscan.detector import openvino_detector
from patchscan.detector.card import Card, Decision
from patchscan.detector.detector import Detector
from patchscan.detector.engines import load_detector
from patchscan.detector.models import SSP, Ensemble, SSPLite, build_model
from patchscan.detector.onnx_export import export_graph, write_graph
from patchscan.detector.openvino_detector import OpenVinoBf16Detector, OpenVinoDetector, has_bf16
from patchscan.detector.presets import EnsemblePreset, PatchPreset, Preset, WholeImagePreset, to_tensor
from patchscan.evaluation import precision
from patchscan.evaluation.precision import compare
from patchscan.scanning.scorers import InProcessScorer
from patchscan.serving.verify import verify
from tests.image_tree import jpeg_versus_png
from tests.import_kit import imported_run
from tests.serving_kit import png, tiny_run

pytest.importorskip("openvino", reason="needs pip install 'patchscan[openvino]'")

STARTER, SSP_LITE = (shipped("model_store") / name for name in ("starter", "ssp-lite"))
ENSEMBLE = EnsemblePreset(members=(PatchPreset(count=4), WholeImagePreset(size=224)))


def untrained(architecture: str, preset: Preset) -> Detector:
    torch.manual_seed(0)
    model = build_model(architecture)
    if isinstance(model, Ensemble):
        model.sizes[:], model.counts[:] = torch.tensor([32, 224]), torch.tensor([4, 1])
    return Detector(
        Card(name="m", version="1", architecture=architecture, preset=preset, weights_sha256="0" * 64), model
    )


DETECTORS: dict[str, Callable[[], Detector]] = {
    "starter": lambda: Detector.load(STARTER),
    "ssp-lite": lambda: Detector.load(SSP_LITE),
    "ssp": lambda: untrained("ssp", PatchPreset()),
    "ensemble": lambda: untrained("ssp-lite+simplecnn", ENSEMBLE),
}


@cache
def made(name: str) -> tuple[Detector, bytes]:
    """A detector in PyTorch, and its graph."""
    detector = DETECTORS[name]()
    return detector, export_graph(detector.model, detector.card.preset)


@pytest.mark.parametrize("name", DETECTORS)
def test_scores_are_pytorchs_and_no_image_changes_a_bit_of_another(name: str) -> None:
    """Whole, and cut for bfloat16, which a CPU without it computes in float32."""
    detector, graph = made(name)
    crops = [detector.prepare(png(seed, 200 + 120 * seed, 230)).crops.pixels for seed in range(2)]
    p_ai = detector.card.decision.p_ai
    expected = [p_ai(logit) for logit in detector.logits(crops)]
    for kind in (OpenVinoDetector, OpenVinoBf16Detector):
        same = kind(detector.card, graph)
        found = same.logits(crops)
        near = 0.01 if kind is OpenVinoBf16Detector and has_bf16() else 1e-5
        assert [p_ai(logit) for logit in found] == pytest.approx(expected, abs=near, rel=0)
        assert same.logits(crops[::-1]) == found[::-1]
        assert [same.logits([one])[0] for one in crops] == found
        assert same.takes_its_crops()
        assert same.model_s > 0


@pytest.mark.parametrize("name", ["ssp-lite", "ssp"])
def test_the_noise_filters_are_in_the_part_that_stays_in_float32(name: str) -> None:
    detector, graph = made(name)
    assert isinstance(detector.model, SSP | SSPLite)
    cut = OpenVinoBf16Detector(detector.card, graph)
    assert [part.precision for part in cut._parts] == ["f32", "bf16", "f32"]
    before, *_ = cut._compile()
    crops = detector.prepare(png(1)).crops.pixels.copy()
    with torch.inference_mode():
        maps = detector.model.noise(to_tensor(crops)).numpy()
    (found,) = before.infer([crops]).values()
    assert np.abs(found - maps).max() < 1e-4
    told = before.get_compiled_model().get_runtime_model().get_ordered_ops()
    assert "bf16" not in {node.get_rt_info()["runtimePrecision"].value for node in told}


def test_all_layers_with_weights_but_the_last_are_in_the_part_for_bfloat16() -> None:
    detector, graph = made("starter")
    cut = OpenVinoBf16Detector(detector.card, graph)
    counts = [
        sum(node.get_type_name() in openvino_detector.CONVOLUTIONS for node in part.model.get_ordered_ops())
        for part in cut._parts
    ]
    assert counts == [0, sum(isinstance(module, nn.Conv2d) for module in detector.model.modules()), 0]


def test_an_imported_detector_runs_too(tmp_path: Path) -> None:
    run = imported_run(tmp_path / "run")
    expected = load_detector(run).score([png(1)])[0]
    for kind in (OpenVinoDetector, OpenVinoBf16Detector):
        assert vars(kind.load(run).score([png(1)])[0])["p_ai"] == pytest.approx(vars(expected)["p_ai"], abs=1e-5)


def test_a_model_of_which_nothing_would_be_in_bfloat16_is_not_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph has no convolutions."""
    run, data = imported_run(tmp_path / "run"), jpeg_versus_png(tmp_path / "data", count=1)
    monkeypatch.setattr(openvino_detector, "has_bf16", lambda: True)
    command = ["archive", str(run), "--model-store", str(tmp_path), "--engine", "openvino", "--data", str(data)]
    with pytest.raises(UserError, match="the model has no convolutions"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    card = Card.read(run)
    replace(card, bf16={"kept": True, "digest": card.digest}).write(run)  # as earlier versions measured it
    assert InProcessScorer(run, engine="openvino").engine == "openvino"


@pytest.mark.parametrize(
    ("after", "answers", "accuracies", "enough"),
    [
        ([0.1] * 99 + [0.3] + [0.9] * 100, 0.995, 1, True),
        ([0.1] * 97 + [0.3] * 3 + [0.9] * 100, 0.985, 1, False),
        ([0.1] * 98 + [np.nan] * 2 + [0.9] * 100, 0.99, 1, True),
        ([0.495] * 100 + [0.9] * 100, 0.5, 1, False),
        ([0.9] * 100 + [0.9] * 100, 0.5, 0.5, False),
    ],
)
def test_the_rule_for_fewer_bits(after: list[float], answers: float, accuracies: float, enough: bool) -> None:
    before = np.array([0.1] * 100 + [0.9] * 100)
    is_ai, generator = before > 0.5, np.repeat(["one", "two"], 100)
    kept = compare(before, np.array(after), is_ai, generator, 0.5)
    assert [kept.answers, kept.accuracies] == pytest.approx([answers, accuracies])
    assert kept.enough is enough


def test_an_accuracy_out_of_its_interval_breaks_the_rule() -> None:
    before, after = np.full(1000, 0.5), np.full(1000, 0.5)
    after[:8] -= 0.001  # 8 of 20 images of one generator, among 1,000
    generator = np.repeat(["small", "large"], [20, 980])
    kept = compare(before, after, np.ones(1000, bool), generator, 0.5)
    assert (kept.answers, kept.accuracies, kept.enough) == (1, 0.5, False)


def test_bfloat16_is_measured_at_archiving_and_used_where_it_was_found_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = tiny_run(tmp_path / "tiny"), jpeg_versus_png(tmp_path / "data", count=3)
    write_graph(run)
    command = ["archive", str(run), "--model-store", str(tmp_path), "--engine", "openvino"]
    monkeypatch.setattr(precision, "has_bf16", lambda: False)
    with pytest.raises(UserError, match="this CPU does not compute in bfloat16"):
        CliRunner().invoke(app, [*command, "--data", str(data)], catch_exceptions=False)
    for module in (precision, openvino_detector):
        monkeypatch.setattr(module, "has_bf16", lambda: True)
    assert InProcessScorer(run, engine="openvino").engine == "openvino", "bfloat16 was not measured"
    done = CliRunner().invoke(app, [*command, "--data", str(data)])
    assert done.exit_code == 0, done.output
    card = Card.read(run)
    assert (card.bf16["images"], card.bf16["answers"], card.allows_bf16) == (6, 1.0, True)
    assert verify(tmp_path / "tiny.mar").card.bf16 == card.bf16
    assert InProcessScorer(run, engine="openvino").engine == "openvino-bf16"
    assert load_detector(run, engine="openvino").engine == "openvino", "evaluation measures in float32"
    replace(card, decision=Decision(threshold=0.9)).write(run)
    assert InProcessScorer(run, engine="openvino").engine == "openvino", "measured with another decision"


def test_what_cannot_be_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--data is for --engine openvino"):
        CliRunner().invoke(app, ["archive", str(STARTER), "--data", "data"], catch_exceptions=False)
    with pytest.raises(UserError, match="--engine openvino runs on the CPU only"):
        load_detector(STARTER, "cuda", "openvino")
    with pytest.raises(UserError, match="OpenVINO cannot run this model, choose --engine onnx"):
        OpenVinoDetector(Card.read(STARTER), b"no graph")
    monkeypatch.setattr("patchscan.detector.engines.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'patchscan\[openvino\]'"):
        load_detector(STARTER, engine="openvino")


def test_a_scan_says_what_scored(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo.png").write_bytes(png(1))
    command = ["scan", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--engine", "openvino"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"]["engines"] == [{"engine": "openvino", "scored": 1}]


def test_nobody_is_told_that_openvino_is_used(tmp_path: Path) -> None:
    """Importing openvino alone sends an event to Google Analytics where its package for that is installed."""
    (tmp_path / "openvino_telemetry.py").write_text("raise SystemExit('telemetry')")
    score = "import sys; from pathlib import Path; from patchscan.detector.engines import load_detector as load; "
    score += "print(load(Path(sys.argv[1]), engine='openvino').engine)"
    path = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", score, str(STARTER)]
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "openvino\n", done.stderr
