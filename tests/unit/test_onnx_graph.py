"""A run folder's model.onnx scores as its weights do, without torch, and never for other weights."""

import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from handlers.image_detector import ImageDetector
from patchscan.common.errors import UserError
from patchscan.common.shipped import shipped
from patchscan.detector.answer import Answer, Engine
from patchscan.detector.card import Card, CardError
from patchscan.detector.detector import Detector
from patchscan.detector.engines import choose_engine, load_detector
from patchscan.detector.graph_detector import is_sealed, seal
from patchscan.detector.onnx_detector import OnnxDetector
from patchscan.detector.onnx_export import write_graph
from patchscan.detector.presets import PatchPreset
from patchscan.scanning.options import make_scorer
from patchscan.serving.archive import MODEL_CONFIG, archive
from patchscan.serving.verify import VerifyError, verify
from tests.serving_kit import png, rewritten, tiny_run

SHIPPED = [shipped("model_store") / name for name in ("starter", "ssp-lite")]
# Scores an image as a scan does, its decoding child included, and fails where torch was imported.
SCORE = """
import sys
from pathlib import Path
from patchscan.scanning.scorers import InProcessScorer
scorer = InProcessScorer(Path(sys.argv[1]))
print(scorer.answer(Path(sys.argv[2]).read_bytes()).logit)
sys.exit("torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its graph."""
    folder = tiny_run(tmp_path_factory.mktemp("run") / "tiny")
    write_graph(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("run", SHIPPED, ids=lambda run: run.name)
def test_the_shipped_graphs_score_as_their_weights_do(run: Path) -> None:
    graph, weights = OnnxDetector.load(run), Detector.load(run)
    images = [png(seed, 200 + 40 * seed, 180) for seed in range(4)]
    found, expected = graph.score(images), weights.score(images)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Answer)
        assert isinstance(other, Answer)
        assert one.p_ai == pytest.approx(other.p_ai, abs=1e-5, rel=0)
        assert (one.digest, one.verdict, one.patch, one.tier) == (other.digest, other.verdict, other.patch, other.tier)
    assert [graph.score([data])[0] for data in images] == found, "an image's score depends on its batch"
    assert graph.model_s > 0


def test_a_scan_without_torch_scores_as_with_it(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png(1))
    command = [sys.executable, "-c", SCORE, str(SHIPPED[0]), str(tmp_path / "photo.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr or "torch was imported"
    expected = make_scorer(None, None, None, SHIPPED[0], engine="torch").answer(png(1))
    assert float(done.stdout) == pytest.approx(expected.logit, abs=1e-4)


def test_a_graph_of_other_weights_or_a_damaged_one_is_refused(run: Path, tmp_path: Path) -> None:
    other = tiny_run(tmp_path / "other", seed=1)
    shutil.copy(run / "model.onnx", other)
    with pytest.raises(CardError, match=r"other weights than those of .* `patchscan export .*/other` makes it again"):
        load_detector(other)
    damaged = shutil.copytree(run, tmp_path / "damaged")
    data = bytearray((run / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "model.onnx").write_bytes(data)
    with pytest.raises(CardError, match="is damaged"):
        load_detector(damaged)
    assert load_detector(damaged, engine="torch").engine == "torch"


def test_a_graph_for_other_crops_than_the_cards_is_refused(run: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(run, tmp_path / "changed")
    card = Card.read(run)
    assert isinstance(card.preset, PatchPreset)
    replace(card, preset=replace(card.preset, count=card.preset.count + 1)).write(changed)
    with pytest.raises(CardError, match="made for other crops"):
        load_detector(changed)
    write_graph(changed)
    assert load_detector(changed).engine == "onnx"


def test_a_graph_that_onnx_runtime_cannot_run_is_one_line(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    card = Card.read(run)
    (tmp_path / "run" / "model.onnx").write_bytes(seal(b"no graph", card.weights_sha256))
    with pytest.raises(CardError, match="ONNX Runtime cannot run this model: "):
        OnnxDetector.load(tmp_path / "run")


def test_a_seal_holds_for_its_weights_and_its_graph() -> None:
    sealed = seal(b"graph", "a" * 64)
    assert is_sealed(sealed, "a" * 64)
    assert not any(is_sealed(one, "a" * 64) for one in (b"", b"graph", sealed[1:], sealed + b"\0", b"x" + sealed))
    assert not is_sealed(sealed, "b" * 64)


def test_the_same_weights_make_the_same_graph(run: Path) -> None:
    before = (run / "model.onnx").read_bytes()
    assert write_graph(run).read_bytes() == before


@pytest.mark.parametrize(
    ("asked", "device", "graph", "chosen"),
    [
        (None, "cpu", True, "onnx"),
        (None, "cpu", False, "torch"),
        (None, "cuda", True, "torch"),
        ("torch", "cpu", True, "torch"),
        ("onnx", "cpu", False, "onnx"),
    ],
)
def test_the_engine_is_onnx_where_there_is_a_graph(
    asked: Engine | None, device: str, graph: bool, chosen: Engine, tmp_path: Path
) -> None:
    if graph:
        (tmp_path / "model.onnx").touch()
    assert choose_engine(tmp_path, device, asked) == chosen


def test_an_engine_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"`patchscan export .*tiny` makes it again, or choose --engine torch"):
        load_detector(tiny_run(tmp_path / "tiny"), engine="onnx")
    with pytest.raises(UserError, match="--engine onnx runs on the CPU only"):
        load_detector(SHIPPED[0], device="cuda", engine="onnx")
    with pytest.raises(UserError, match="--engine is for --run"):
        make_scorer("http://127.0.0.1:9", "m", None, None, engine="onnx")


def test_many_images_at_once_get_the_scores_that_each_gets_alone(run: Path) -> None:
    detector, preset = OnnxDetector.load(run), Card.read(run).preset
    random = np.random.RandomState(0)
    crops = list(random.randint(0, 256, (40, preset.count, preset.size, preset.size, 3)).astype(np.uint8))
    assert detector.logits(crops) == [detector.logits([one])[0] for one in crops]
    assert detector.logits([]) == []


@pytest.mark.slow
def test_an_archive_for_onnx_runtime_holds_the_runs_graph_which_its_worker_loads(run: Path, tmp_path: Path) -> None:
    mar = archive(run, tmp_path, engine="onnx")
    assert zipfile.ZipFile(mar).read("model.onnx") == (run / "model.onnx").read_bytes()
    plain = archive(tiny_run(tmp_path / "tiny"), tmp_path / "plain", engine="onnx")
    assert zipfile.ZipFile(plain).read("model.onnx") == (run / "model.onnx").read_bytes(), "it was not exported"
    assert "model.onnx" not in zipfile.ZipFile(archive(run, tmp_path / "torch")).namelist()
    assert verify(mar).card == Card.read(run)
    zipfile.ZipFile(mar).extractall(tmp_path / "unpacked")
    handler = ImageDetector()
    with patch("torch.onnx.export", side_effect=AssertionError("the worker exports")):
        handler.detector = handler._load(tmp_path / "unpacked", "cpu", "onnx")
    (found,), (expected,) = (one.score([png(1)]) for one in (handler.detector, OnnxDetector.load(run)))
    assert found == expected


def test_an_archives_graph_must_score_as_its_weights_do(run: Path, tmp_path: Path) -> None:
    mar = archive(run, tmp_path, engine="onnx")
    other = tiny_run(tmp_path / "other", seed=1)
    forged = seal(write_graph(other).read_bytes(), Card.read(run).weights_sha256)
    with pytest.raises(VerifyError, match=r"does not score as when it was archived: .*\.bmp: logit"):
        verify(rewritten(mar, tmp_path / "forged.mar", {"model.onnx": forged}))
    with pytest.raises(VerifyError, match="is damaged or was made of other weights"):
        verify(rewritten(mar, tmp_path / "damaged.mar", {"model.onnx": forged[:-1] + b"x"}))
    config = {"model-config.yaml": MODEL_CONFIG.format(engine="torch").encode()}
    with pytest.raises(VerifyError, match=r"holds model\.onnx, which is not a file of a model like its card's"):
        verify(rewritten(mar, tmp_path / "torch.mar", config))
    shutil.copy(other / "model.onnx", run_of_two := shutil.copytree(run, tmp_path / "two"))
    with pytest.raises(CardError, match=r"was made of other weights than those of .*two"):
        archive(run_of_two, tmp_path, engine="onnx")


def test_where_no_detector_is_a_scan_says_what_to_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the scan image, which has no torch either: nobody is told to install it."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "patchscan.detector.detector", raising=False)
    with pytest.raises(CardError, match=r"card\.json is missing"):
        make_scorer(None, None, None, tmp_path)
    monkeypatch.setattr("patchscan.scanning.options.STARTER", tmp_path / "starter")
    with pytest.raises(UserError, match="give --run a run folder, or --server"):
        make_scorer(None, None, None, None)
