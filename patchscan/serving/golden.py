"""Golden images: a few small images in every archive, with the answers that the model gave when it was archived.

They are made from fixed random numbers and stored as BMP, which any library version decodes to the same pixels.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchscan.detector.answer import Answer
from patchscan.detector.base import BaseDetector
from patchscan.detector.images import encode

FOLDER = "golden"
ANSWERS = "answers.json"
# On one machine logits are equal to the bit. Other CPUs add up convolutions in another order, a GPU rounds to fp16, and
# OpenVINO may to bfloat16, of which an archive says what it was measured to change.
LOGIT_TOLERANCE = 1e-3
GPU_LOGIT_TOLERANCE = 0.05
BF16_LOGIT_TOLERANCE = 0.3
SIDE = 96


def images() -> dict[str, bytes]:
    """Return the images by file name: smooth, textured, noisy, and flat."""
    random = np.random.RandomState(20240201)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    smooth = np.stack([x, y, 255 - (x + y) / 2], axis=-1)
    texture = smooth / 2 + 60 * (np.sin(x / 3) * np.cos(y / 5))[..., None] + 64
    noise = random.random_sample((SIDE, SIDE, 3)) * 255
    flat = np.full((SIDE, SIDE, 3), 200.0) + random.random_sample((SIDE, SIDE, 3)) * 4
    pictures = {"smooth": smooth, "texture": texture, "noise": noise, "flat": flat}
    return {
        f"{name}.bmp": encode(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "BMP")
        for name, pixels in pictures.items()
    }


def write(folder: Path, detector: BaseDetector) -> None:
    """Write the golden images and this model's answers to them under `folder`/golden. Raises NotFiniteError where the
    model answers no number."""
    target = folder / FOLDER
    target.mkdir()
    answers = {}
    for name, data in images().items():
        (target / name).write_bytes(data)
        (answer,) = detector.score([data])
        if not isinstance(answer, Answer):
            raise answer  # a model whose output is no number; the images themselves are fine
        answers[name] = asdict(answer)
    (target / ANSWERS).write_text(json.dumps(answers, indent=1, sort_keys=True) + "\n")


def differences(golden: dict[str, bytes], ask: Callable[[bytes], dict[str, Any]], tolerance: float) -> list[str]:
    """Compare the answers of `ask` with those stored in the archive; return a line for each difference.

    golden: the files of the golden folder by name. ask: returns the answer to an encoded image. Model and patch must be
    equal, logits within `tolerance`. Raises KeyError where an image has no answer.
    """
    found, answers = [], json.loads(golden[ANSWERS])
    for name in sorted(golden.keys() - {ANSWERS}):
        expected, answer = answers[name], ask(golden[name])
        if answer.get("digest") != expected["digest"] or answer.get("patch") != expected["patch"]:
            found.append(f"{name}: answered by another model")
        elif not math.isclose(answer["logit"], expected["logit"], rel_tol=0, abs_tol=tolerance):
            found.append(f"{name}: logit {answer['logit']:.6f}, archived with {expected['logit']:.6f}")
    return found
