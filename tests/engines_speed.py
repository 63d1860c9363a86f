"""What an archive's two engines do a second, and how far apart they score: `python -m tests.engines_speed`.

One thread, untrained weights, noise; counts this process's CPU seconds, so that other work on the machine
matters little.
Run it with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1, as the server runs its workers.
"""

import time

import numpy as np
import torch

from detector.card import Card
from detector.detector import Detector
from detector.models import assemble
from detector.presets import PatchPreset, Preset, WholePreset
from handlers.engines import with_onnx

CASES: list[tuple[str, Preset]] = [
    ("ssp", PatchPreset()),
    ("ssp-lite", PatchPreset(count=16)),
    ("resnet50", WholePreset()),
    ("simplecnn", WholePreset()),
]


def images_a_second(detector: Detector, crops: list[np.ndarray]) -> float:
    """Images scored a CPU second, after three to warm up."""
    detector.logits(crops[:3])
    started = time.process_time()
    detector.logits(crops)
    return len(crops) / (time.process_time() - started)


def main() -> None:
    """Print one line an architecture."""
    torch.set_num_threads(1)
    for architecture, preset in CASES:
        torch.manual_seed(0)
        card = Card(name="m", version="1", architecture=architecture, preset=preset, weights_sha256="0" * 64)
        detector = Detector(card, assemble(architecture))
        random = np.random.default_rng(0)
        shape = (preset.count, preset.size, preset.size, 3)
        crops = [random.integers(0, 256, shape, dtype=np.uint8) for _ in range(30)]
        eager, logits = images_a_second(detector, crops), detector.logits(crops)
        detector.model = with_onnx(detector.model, preset)
        onnx, others = images_a_second(detector, crops), detector.logits(crops)
        p_ai = card.decision.p_ai
        apart = max(abs(p_ai(one) - p_ai(other)) for one, other in zip(logits, others, strict=True))
        print(f"{architecture:10} torch {eager:6.1f}  onnx {onnx:6.1f} images a CPU second, p_ai apart {apart:.1e}")


if __name__ == "__main__":
    main()
