"""A run folder loaded and ready to score: the one path from bytes to answers, in serving and in evaluation alike."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from patchscan.common.files import sha256_of
from patchscan.detector.answer import Answer
from patchscan.detector.card import WEIGHTS_FILE, Card, CardError
from patchscan.detector.images import ImageError, Limits
from patchscan.detector.models import ai_logit, assemble
from patchscan.detector.prepared import Prepared, answer, prepare
from patchscan.detector.presets import to_tensor
from patchscan.detector.weights import read_safetensors


class Detector:
    """A trained model with its card. Thread-safe for scoring.

    `model_s` counts the seconds that forward passes have taken: of a core where `device` is a CPU, else of the GPU (of
    which another process may have had a part meanwhile).
    """

    def __init__(self, card: Card, model: torch.nn.Module, device: str = "cpu", limits: Limits = Limits()):
        self.card = card
        self.device = torch.device(device)
        self.limits = limits
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        # How many threads share a convolution decides its last bits: here images share the threads instead.
        self._pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
        self.model_s = 0.0
        self._counting = threading.Lock()

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", limits: Limits = Limits()) -> "Detector":
        """Load `card.json` and `model.safetensors` of a run folder.

        Raises CardError where the card is missing or the weights are not the ones it names or not of its architecture,
        WeightsError where the weights cannot be read.
        """
        card = Card.read(folder)
        weights = folder / WEIGHTS_FILE
        if not weights.exists():
            raise CardError(f"{weights} is missing")
        if sha256_of(weights) != card.weights_sha256:
            raise CardError(f"{weights} is not the file that {folder}/card.json describes: its sha256 differs")
        try:
            model = assemble(card.architecture)
            model.load_state_dict(read_safetensors(weights))
        except (ValueError, RuntimeError) as error:
            raise CardError(f"{weights} does not hold what {folder}/card.json says, a {card.architecture}") from error
        return cls(card, model, device, limits)

    def prepare(self, data: bytes) -> Prepared:
        """Decode one encoded image and choose its crops. Raises ImageError."""
        return prepare(data, self.card, self.limits)

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        """One logit an image, AI positive: the mean over its crops (each uint8 (count, size, size, 3)).

        On a CPU each image is its own forward pass on one thread, and as many pass at once as torch has threads: a
        score has the same bits in any batch, with any number of threads. On a GPU the images share one pass in fp16,
        the noise filters excepted.
        """
        if not crops:
            return []
        if self.device.type == "cpu":
            return list(self._pool.map(lambda one: self._crop_logits(one).mean().item(), crops))
        with torch.autocast(self.device.type, torch.float16):
            together = self._crop_logits(np.concatenate(crops))
        return [part.mean().item() for part in together.split([len(one) for one in crops])]

    @torch.inference_mode()
    def _crop_logits(self, crops: np.ndarray) -> torch.Tensor:
        now = time.thread_time if self.device.type == "cpu" else time.perf_counter
        started = now()
        logits = ai_logit(self.model(to_tensor(torch.tensor(crops, device=self.device)))).double().cpu()
        with self._counting:
            self.model_s += now() - started
        return logits

    def score(self, images: Sequence[bytes]) -> list[Answer | ImageError]:
        """Score encoded images: one answer each, in order; an image that cannot be scored is its ImageError."""
        return self.decide(self.prepare_all(images))

    def prepare_all(self, images: Sequence[bytes]) -> list[Prepared | ImageError]:
        """The first half of `score`, which needs no model: `prepare` for each image, or its ImageError."""
        prepared: list[Prepared | ImageError] = []
        for data in images:
            try:
                prepared.append(self.prepare(data))
            except ImageError as error:
                prepared.append(error)
        return prepared

    def decide(self, prepared: Sequence[Prepared | ImageError]) -> list[Answer | ImageError]:
        """The second half of `score`: the answers to prepared images, in order; an ImageError stays itself."""
        good = [one for one in prepared if isinstance(one, Prepared)]
        logits = iter(self.logits([one.crops.pixels for one in good]))
        return [self.answer(one, next(logits)) if isinstance(one, Prepared) else one for one in prepared]

    def answer(self, prepared: Prepared, logit: float) -> Answer:
        """The answer to a prepared image whose logit is known."""
        return answer(prepared, logit, self.card)
