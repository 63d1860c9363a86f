"""Load a run folder and score encoded images with it. Serving, scanning and evaluation all use this code."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from patchscan.common.files import sha256_of
from patchscan.detector.answer import Answer
from patchscan.detector.card import WEIGHTS_FILE, Card, CardError, NotFiniteError
from patchscan.detector.decoders import BusyError
from patchscan.detector.images import ImageError, Limits
from patchscan.detector.models import ai_logit, build_model
from patchscan.detector.prepared import Prepared, build_answer, prepare
from patchscan.detector.presets import to_tensor
from patchscan.detector.weights import read_safetensors

# Why one image of a batch has no answer: the image's fault, the model's, or that of other images.
ScoreError = ImageError | NotFiniteError | BusyError


class Detector:
    """A trained model with its card. Scoring is thread-safe.

    `model_s` counts the seconds that forward passes have taken: CPU time on a CPU, wall time on a GPU (which includes
    time that other processes used the GPU).
    """

    def __init__(self, card: Card, model: torch.nn.Module, device: str = "cpu", limits: Limits = Limits()):
        self.card = card
        self.device = torch.device(device)
        self.limits = limits
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        # The number of threads in one convolution changes the last bits of its result, so each image gets one thread.
        self._pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
        self.model_s = 0.0
        self._model_s_lock = threading.Lock()

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", limits: Limits = Limits()) -> "Detector":
        """Load `card.json` and `model.safetensors` of a run folder.

        Raises CardError if the card is missing or the weights do not match its checksum or architecture, WeightsError
        if the weights cannot be read.
        """
        card = Card.read(folder)
        weights = folder / WEIGHTS_FILE
        if not weights.exists():
            raise CardError(f"{weights} is missing")
        if sha256_of(weights) != card.weights_sha256:
            raise CardError(f"{weights} does not match {folder}/card.json: its sha256 differs")
        try:
            model = build_model(card.architecture)
            model.load_state_dict(read_safetensors(weights))
        except (ValueError, RuntimeError) as error:
            raise CardError(
                f"{weights} does not fit the architecture in {folder}/card.json, {card.architecture}"
            ) from error
        return cls(card, model, device, limits)

    def prepare(self, data: bytes) -> Prepared:
        """Decode one encoded image and choose its crops. Raises ImageError."""
        return prepare(data, self.card.preset, self.limits)

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        """Return one logit per image, AI positive: the mean over its crops, each uint8 (count, size, size, 3).

        On a CPU every image is a forward pass of its own on one thread, with as many passes in parallel as torch has
        threads: a score has the same bits in any batch, with any number of threads. On a GPU all images share one pass
        in fp16, except that the noise filters run in fp32.
        """
        if not crops:
            return []
        if self.device.type == "cpu":
            return list(self._pool.map(lambda image_crops: self._crop_logits(image_crops).mean().item(), crops))
        with torch.autocast(self.device.type, torch.float16):
            logits = self._crop_logits(np.concatenate(crops))
        return [part.mean().item() for part in logits.split([len(image_crops) for image_crops in crops])]

    @torch.inference_mode()
    def _crop_logits(self, crops: np.ndarray) -> torch.Tensor:
        clock = time.thread_time if self.device.type == "cpu" else time.perf_counter
        started = clock()
        logits = ai_logit(self.model(to_tensor(torch.tensor(crops, device=self.device)))).double().cpu()
        with self._model_s_lock:
            self.model_s += clock() - started
        return logits

    def score(self, images: Sequence[bytes]) -> list[Answer | ScoreError]:
        """Score encoded images. Returns one answer per image, in order; its error where it cannot be scored."""
        return self.decide(self.prepare_all(images))

    def prepare_all(self, images: Sequence[bytes]) -> list[Prepared | ImageError]:
        """Decode all images and choose their crops: the part of `score` before the model. Errors are returned."""
        prepared: list[Prepared | ImageError] = []
        for data in images:
            try:
                prepared.append(self.prepare(data))
            except ImageError as error:
                prepared.append(error)
        return prepared

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
        return build_answer(prepared, logit, self.card)
