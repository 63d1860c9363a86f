"""A run folder loaded and ready to score: the one path from bytes to answers, in serving and in evaluation alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from detector.answer import Answer
from detector.card import WEIGHTS_FILE, Card, CardError
from detector.images import ImageError, Limits, RGBImage, decode
from detector.models import ai_logit, build
from detector.patches import Patches, seed_from_bytes
from detector.presets import to_tensor
from detector.weights import read_safetensors, sha256_of


@dataclass(frozen=True)
class Prepared:
    """One decoded image and its crops, ready for the model."""

    image: RGBImage
    crops: Patches


class Detector:
    """A trained model with its card. Thread-safe for scoring; holds no state between calls."""

    def __init__(self, card: Card, model: torch.nn.Module, device: str = "cpu", limits: Limits = Limits()):
        self.card = card
        self.device = torch.device(device)
        self.limits = limits
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", limits: Limits = Limits()) -> "Detector":
        """Load `card.json` and `model.safetensors` of a run folder.

        Raises CardError where the card is missing or the weights are not the ones it names, WeightsError where the
        weights cannot be read.
        """
        card = Card.read(folder)
        weights = folder / WEIGHTS_FILE
        if not weights.exists():
            raise CardError(f"{weights} is missing")
        if sha256_of(weights) != card.weights_sha256:
            raise CardError(f"{weights} is not the file that {folder}/card.json describes: its sha256 differs")
        model = build(card.architecture)
        model.load_state_dict(read_safetensors(weights))
        return cls(card, model, device, limits)

    def prepare(self, data: bytes) -> Prepared:
        """Decode one encoded image and choose its crops. Raises ImageError."""
        image = decode(data, self.limits)
        return Prepared(image, self.card.preset.crops(image.rgb, seed_from_bytes(data)))

    @torch.inference_mode()
    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        """One logit an image, AI positive: the mean over its crops (each uint8 (count, size, size, 3)).

        On a CPU each image is its own forward pass, so that its score has the same bits in any batch; on a GPU the
        images share one pass.
        """
        if self.device.type == "cpu":
            return [self._crop_logits(one).mean().item() for one in crops]
        together = self._crop_logits(np.concatenate(crops))
        return [part.mean().item() for part in together.split([len(one) for one in crops])]

    def _crop_logits(self, crops: np.ndarray) -> torch.Tensor:
        inputs = to_tensor(crops).to(self.device, memory_format=torch.channels_last)
        return ai_logit(self.model(inputs)).double()

    def score(self, images: Sequence[bytes]) -> list[Answer | ImageError]:
        """Score encoded images: one answer each, in order; an image that cannot be scored is its ImageError."""
        prepared: list[Prepared | ImageError] = []
        for data in images:
            try:
                prepared.append(self.prepare(data))
            except ImageError as error:
                prepared.append(error)
        good = [one for one in prepared if isinstance(one, Prepared)]
        logits = iter(self.logits([one.crops.pixels for one in good]))
        return [self.answer(one, next(logits)) if isinstance(one, Prepared) else one for one in prepared]

    def answer(self, prepared: Prepared, logit: float) -> Answer:
        """The answer to a prepared image whose logit is known."""
        decision = self.card.decision
        p_ai = decision.p_ai(logit)
        verdict = decision.verdict(p_ai)
        reason = "abstain_band" if verdict == "uncertain" else None
        if prepared.crops.upscaled:
            verdict, reason = "uncertain", "small_image"
        x, y = (int(value) for value in prepared.crops.corners[0])
        return Answer(
            p_ai=p_ai,
            logit=logit,
            verdict=verdict,
            reason=reason,
            patch={
                "x": x,
                "y": y,
                "size": self.card.preset.size,
                "complexity": int(prepared.crops.complexity[0]),
            },
            image={
                "width": prepared.image.width,
                "height": prepared.image.height,
                "format": prepared.image.format,
                "frames": prepared.image.frames,
            },
            model=self.card.name,
            version=self.card.version,
            digest=self.card.digest,
        )
