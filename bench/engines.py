"""ONNX Runtime against OpenVINO in turns, in CPU time: `python -m bench.engines RUN...`; RUN holds a model.onnx.

For machines that other work uses too, where images a second of wall time mean little.
"""

import sys
import time
from pathlib import Path
from statistics import median

from bench.images import scored_images
from patchscan.detector.answer import Engine
from patchscan.detector.engines import load_detector

ROUNDS, IMAGES = 5, 20
ENGINES: tuple[Engine, ...] = ("onnx", "openvino")


def compare(run: Path) -> str:
    """Score the same images with both engines in alternating order. Returns a line: images a second of a core's CPU
    time (median, least and greatest of the rounds), the ratio, and the largest change of p_ai."""
    detectors = {engine: load_detector(run, engine=engine, threads=1) for engine in ENGINES}
    card = detectors["onnx"].card
    crops = [detectors["onnx"].prepare(data).crops.pixels for data in scored_images(None, IMAGES)[0]]
    rates: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    answers: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):
        for engine in ENGINES if number % 2 else ENGINES[::-1]:
            began = time.process_time()
            answers[engine] = [card.decision.p_ai(detectors[engine].logits([one])[0]) for one in crops]
            rates[engine].append(len(crops) / (time.process_time() - began))
    changed = max(abs(one - other) for one, other in zip(*answers.values(), strict=True))
    ratios = [other / one for one, other in zip(*rates.values(), strict=True)][1:]  # the first round warms up
    told = ", ".join(f"{engine} {_spread(values[1:])}" for engine, values in rates.items())
    return f"{run.name}: {told}, ratio {_spread(ratios)}, largest change of p_ai {changed:.0e}"


def _spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    for run in sys.argv[1:]:
        print(compare(Path(run)), flush=True)
