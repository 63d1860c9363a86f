"""ONNX Runtime against OpenVINO in float32, bfloat16 and int8, in turns and in CPU time; RUN holds a model.onnx.

    python -m bench.engines model_store/starter model_store/ssp-lite
    python -m bench.engines model_store/starter --data genmix      also int8, and what fewer bits keep of the answers

int8 is made by NNCF (`pip install nncf`) and calibrated on train images; what is kept is measured on val images, by the
rule of patchscan.evaluation.precision. int8 is not offered to users: docs/performance.md says why. CPU time, so that
other work on the machine changes little.
"""

import argparse
import time
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.images import files_of, scored_images, spread
from bench.rounds import alternate, summary
from patchscan.dataset.source import DataSource
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import Card
from patchscan.detector.onnx_detector import OnnxDetector
from patchscan.detector.openvino_detector import NOISE_FILTERS, OpenVinoBf16Detector, OpenVinoDetector, Part, has_bf16
from patchscan.evaluation.evaluate import validation_images
from patchscan.evaluation.precision import compare_scores
from patchscan.evaluation.scoring import evenly_spread, score_images

if TYPE_CHECKING:
    from openvino import Model

ROUNDS, IMAGES = 5, 20
CALIBRATION_IMAGES, JUDGED_IMAGES = 100, 1_000


class Int8Detector(OpenVinoDetector):
    """A model in OpenVINO, quantised to int8 but for the noise filters; `calibration` holds crops of images."""

    calibration: list[np.ndarray]

    def _cut(self, model: "Model") -> list[Part]:
        import nncf

        nodes = [node.get_friendly_name() for node in model.get_ordered_ops()]
        filters = [name for name in nodes if any(part in name for part in NOISE_FILTERS)]
        crops = nncf.Dataset(self.calibration)
        made = nncf.quantize(
            model, crops, subset_size=len(self.calibration), ignored_scope=nncf.IgnoredScope(names=filters)
        )
        return [Part(made, "f32")]


def detectors(run: Path, data: Path | None) -> dict[str, BaseDetector]:
    """The run's model by engine, as far as this machine and `data` allow."""
    found: dict[str, BaseDetector] = {
        kind.engine: kind.load(run, threads=1) for kind in (OnnxDetector, OpenVinoDetector)
    }
    if has_bf16():
        found[OpenVinoBf16Detector.engine] = OpenVinoBf16Detector.load(run, threads=1)
    if data and find_spec("nncf"):
        files = spread(files_of(data, "train"), CALIBRATION_IMAGES)
        Int8Detector.calibration = _crops(found["onnx"], (file.read_bytes() for file in files))
        found["int8"] = Int8Detector.load(run, threads=1)
    return found


def compare(run: Path, data: Path | None) -> list[str]:
    """A line for each engine: images a second of a core's CPU time (median, least and greatest of the rounds) and the
    ratio to ONNX Runtime; with `data` also what it keeps."""
    by_engine = detectors(run, data)
    crops = _crops(by_engine["onnx"], scored_images(data, IMAGES)[0])
    rates = alternate({engine: partial(_rate, detector, crops) for engine, detector in by_engine.items()}, ROUNDS)
    kept = _kept(run, by_engine, data) if data else {}
    return [
        f"{run.name}: {engine} {summary(values)}, ratio "
        f"{summary([one / onnx for one, onnx in zip(values, rates['onnx'], strict=True)])}{kept.get(engine, '')}"
        for engine, values in rates.items()
    ]


def _rate(detector: BaseDetector, crops: list[np.ndarray]) -> float:
    """Images a second of CPU time."""
    began = time.process_time()
    for one in crops:
        detector.logits([one])
    return len(crops) / (time.process_time() - began)


def _kept(run: Path, by_engine: dict[str, BaseDetector], data: Path) -> dict[str, str]:
    rows, source, card = evenly_spread(validation_images(data), JUDGED_IMAGES), DataSource(data), Card.read(run)
    scores = {engine: score_images(one, source.read, rows, f"score with {engine}") for engine, one in by_engine.items()}
    kept = {engine: compare_scores(scores["onnx"], table, card.decision) for engine, table in scores.items()}
    return {
        engine: f"; of {one.images} images {one.answers * 100:.1f} % keep p_ai within 0.01, "
        f"of the generators {one.accuracies * 100:.0f} % their accuracy"
        for engine, one in kept.items()
    }


def _crops(detector: BaseDetector, images: Iterable[bytes]) -> list[np.ndarray]:
    return [np.ascontiguousarray(detector.prepare(image).crops.pixels) for image in images]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="bench.engines", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    for run in arguments.runs:
        print(*compare(run, arguments.data), sep="\n", flush=True)


if __name__ == "__main__":
    main()
