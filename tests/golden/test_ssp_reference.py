"""SSP answers what the authors' own code answers for the same weights.

data/ssp_golden.npz was computed once with github.com/bcmi/SSP-AI-Generated-Image-Detection; its logit is that of a REAL
photograph, so ours has the opposite sign.
"""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.detector.detector import Detector
from patchscan.detector.models import SSP, ai_logit
from patchscan.detector.patches import complexity
from patchscan.detector.presets import to_tensor
from patchscan.detector.weights import WeightsError
from patchscan.training.import_ssp import load_official_ssp
from tests.golden.weights_from_names import tensor_for

GOLDEN = np.load(Path(__file__).parent / "data" / "ssp_golden.npz")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like the authors' published ones: their names, their label sign."""
    shapes = [tuple(ast.literal_eval(str(shape))) for shape in GOLDEN["shapes"]]
    state = {str(name): tensor_for(str(name), shape) for name, shape in zip(GOLDEN["keys"], shapes, strict=True)}
    state["srm.kernel"] = SSP().srm.kernel
    path = tmp_path_factory.mktemp("official") / "Network_best.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> SSP:
    model = SSP()
    load_official_ssp(model, checkpoint)
    return model.eval()


def test_complexity_is_exact() -> None:
    assert complexity(GOLDEN["patches"]).tolist() == GOLDEN["complexity"].tolist()


@pytest.mark.slow
@torch.inference_mode()
def test_noise_maps(model: SSP) -> None:
    noise = model.noise(to_tensor(GOLDEN["patches"])).numpy()
    np.testing.assert_allclose(noise[:, :, 128, ::16], GOLDEN["srm_row"], atol=TOLERANCE)
    np.testing.assert_allclose(noise.mean(axis=(2, 3)), GOLDEN["srm_mean"], atol=TOLERANCE)


@pytest.mark.slow
@torch.inference_mode()
def test_logits_have_the_authors_value_and_our_sign(model: SSP) -> None:
    logits = ai_logit(model(to_tensor(GOLDEN["patches"]))).numpy()
    np.testing.assert_allclose(logits, -GOLDEN["logit_real"], atol=TOLERANCE)


@pytest.mark.slow
def test_an_imported_run_folder_scores_like_the_checkpoint(checkpoint: Path, model: SSP, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["import-ssp", str(checkpoint), "--run", str(tmp_path), "--trained-on", "nothing: made from names"]
    )
    assert done.exit_code == 0, done.output
    detector = Detector.load(tmp_path)
    logits = detector.logits(list(GOLDEN["patches"][:2, None]))
    np.testing.assert_allclose(logits, -GOLDEN["logit_real"][:2], atol=TOLERANCE)
    assert "trained on nothing: made from names" in detector.card.warnings[0]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"disc.conv1.weight": torch.zeros(1)}, other)
    with pytest.raises(WeightsError, match="not an official SSP checkpoint"):
        load_official_ssp(SSP(), other)
