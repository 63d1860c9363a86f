"""Load a run folder and score encoded images with PyTorch: on a CPU, to the bit as in training, or on a GPU."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from patchscan.common.files import sha256_of
from patchscan.detector.answer import EngineUsed
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import IMPORTED, WEIGHTS_FILE, Card, CardError
from patchscan.detector.device import check_device
from patchscan.detector.images import Limits
from patchscan.detector.models import NoInitialWeights, ai_logit, build_model
from patchscan.detector.presets import to_tensor
from patchscan.detector.weights import read_safetensors


class Detector(BaseDetector):
    """A trained model in PyTorch, with its card."""

    def __init__(self, card: Card, model: torch.nn.Module, device: str = "cpu", limits: Limits = Limits()):
        super().__init__(card, limits)
        self.device = torch.device(device)
        self.device_type = self.device.type
        self.engine: EngineUsed = "torch" if self.device_type == "cpu" else "torch-fp16"
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        # The number of threads in one convolution changes the last bits of its result, so each image gets one thread.
        self._pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
        self._model_s_lock = threading.Lock()

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", limits: Limits = Limits()) -> "Detector":
        """Load `card.json` and `model.safetensors` of a run folder.

        Raises CardError if the card is missing or the weights do not match its checksum or architecture, WeightsError
        if the weights cannot be read, DeviceError if the device cannot compute.
        """
        card = Card.read(folder)
        weights = folder / WEIGHTS_FILE
        if card.architecture == IMPORTED:
            raise CardError(
                f"{folder} is an imported detector: it can be evaluated and scanned with, with --engine onnx on a CPU"
            )
        if not weights.exists():
            raise CardError(f"{weights} is missing")
        if sha256_of(weights) != card.weights_sha256:
            raise CardError(f"{weights} does not match {folder}/card.json: its sha256 differs")
        try:
            with NoInitialWeights():
                model = build_model(card.architecture)
            model.load_state_dict(read_safetensors(weights))
        except (ValueError, RuntimeError) as error:
            raise CardError(
                f"{weights} does not fit the architecture in {folder}/card.json, {card.architecture}"
            ) from error
        check_device(device)
        return cls(card, model, device, limits)

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
