"""Score encoded images with a model. What detectors of all engines share, none of which needs torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from patchscan.detector.answer import Answer, EngineUsed
from patchscan.detector.card import Card, NotFiniteError
from patchscan.detector.decoders import BusyError
from patchscan.detector.images import ImageError, Limits
from patchscan.detector.prepared import Prepared, build_answer, prepare

# Why one image of a batch has no answer: the image's fault, the model's, or that of other images.
ScoreError = ImageError | NotFiniteError | BusyError


class BaseDetector(ABC):
    """A trained model with its card. Scoring is thread-safe, and an image's score has the same bits in any batch.

    `device_type`: `cpu` or `cuda`. `model_s` counts the seconds that forward passes have taken: CPU time on a CPU, wall
    time on a GPU (which includes time that other processes used the GPU).
    """

    engine: EngineUsed
    device_type: str
    model_s: float

    def __init__(self, card: Card, limits: Limits):
        self.card, self.limits, self.model_s = card, limits, 0.0

    @abstractmethod
    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        """Return one logit per image, AI positive: the mean over its crops, each uint8 (count, size, size, 3)."""

    def prepare(self, data: bytes) -> Prepared:
        """Decode one encoded image and choose its crops. Raises ImageError."""
        return prepare(data, self.card.preset, self.limits)

    def score(self, images: Sequence[bytes]) -> list[Answer | ScoreError]:
        """Score encoded images. Returns one answer per image, in order; its error where it cannot be scored."""
        prepared: list[Prepared | ImageError] = []
        for data in images:
            try:
                prepared.append(self.prepare(data))
            except ImageError as error:
                prepared.append(error)
        return self.decide(prepared)

    def decide(self, prepared: Sequence[Prepared | ImageError | BusyError]) -> list[Answer | ScoreError]:
        """Run the model on prepared images. Returns their answers in order; an error is passed through."""
        decoded = [image for image in prepared if isinstance(image, Prepared)]
        logits = iter(self.logits([image.crops.pixels for image in decoded]))
        answers: list[Answer | ScoreError] = []
        for image in prepared:
            try:
                answers.append(self.answer(image, next(logits)) if isinstance(image, Prepared) else image)
            except NotFiniteError as error:
                answers.append(error)
        return answers

    def answer(self, prepared: Prepared, logit: float) -> Answer:
        """Build the answer to a prepared image from its logit. Raises NotFiniteError if that is NaN or infinite."""
        return build_answer(prepared, logit, self.card, self.engine)
