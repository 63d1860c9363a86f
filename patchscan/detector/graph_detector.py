"""What the engines share that score images from a run folder's `model.onnx`, on the CPU and without torch.

That file holds the whole model, normalisation included: crops uint8 (count, size, size, 3) to one logit, float64. Two
entries of ONNX metadata at its end bind it to the weights that it was made of and to its own content.
"""

import threading
import time
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Self

import numpy as np

from patchscan.common.processes import available_cpus
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import IMPORTED, Card, CardError
from patchscan.detector.images import Limits
from patchscan.detector.presets import has_fixed_count

GRAPH_FILE = "model.onnx"


class GraphDetector(BaseDetector):
    """A trained model as an ONNX graph, with its card. In float32 its p_ai differs from PyTorch's by less than 1e-5."""

    device_type = "cpu"

    def __init__(self, card: Card, graph: bytes, limits: Limits = Limits(), threads: int | None = None):
        """`graph`: an ONNX model from crops to a logit, as `onnx_export.export_graph` makes it. `threads`: the images
        scored at once (default: one for each CPU). Raises CardError where the engine cannot run the graph."""
        super().__init__(card, limits)
        self._open(graph)
        # A pass has one thread, and as many passes run at once as there are cores: no thread waits for another, and a
        # score has the same bits with any number of cores.
        self._pool = ThreadPoolExecutor(threads or available_cpus())
        self._model_s_lock = threading.Lock()

    @classmethod
    def load(
        cls, folder: Path, limits: Limits = Limits(), threads: int | None = None, data: bytes | None = None
    ) -> Self:
        """Load `card.json` and `model.onnx` of a run folder; `threads` as for a new one. `data`: the content of
        `model.onnx`, where it has been read already. Raises CardError if one is missing or damaged, or the graph was
        made of other weights or for other crops than the card's."""
        card = Card.read(folder)
        graph = folder / GRAPH_FILE
        imported = card.architecture == IMPORTED
        again = "import the detector again" if imported else f"`patchscan export {folder}` makes it again"
        if not graph.exists():
            other = "" if imported else ", or choose --engine torch"
            raise CardError(f"{graph} is missing: {again}{other}")
        data = data if data is not None else graph.read_bytes()
        if not is_sealed(data, card.weights_sha256):
            raise CardError(
                f"{graph} is damaged or was made of other weights than those of {folder}/card.json: {again}"
            )
        detector = cls(card, data, limits, threads)
        if not detector.takes_its_crops():
            raise CardError(f"{graph} was made for other crops than those of {folder}/card.json: {again}")
        return detector

    def takes_its_crops(self) -> bool:
        """Whether the graph takes the number and size of crops that the card's preset cuts."""
        preset = self.card.preset
        count, *shape = self._input_shape()
        fits = count is None or (has_fixed_count(preset) and count == preset.count)
        return fits and shape == [preset.size, preset.size, 3]

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        """Return one logit per image, AI positive, from crops uint8 (count, size, size, 3). Each image is a pass of its
        own on one thread."""
        if len(crops) == 1:
            return [self._logit(crops[0])]
        return list(self._pool.map(self._logit, crops))

    def _logit(self, crops: np.ndarray) -> float:
        started = time.thread_time()
        logit = self._run(np.ascontiguousarray(crops))
        with self._model_s_lock:
            self.model_s += time.thread_time() - started
        return logit

    @abstractmethod
    def _open(self, graph: bytes) -> None:
        """Make the graph ready to run."""

    @abstractmethod
    def _input_shape(self) -> list[int | None]:
        """The shape of the graph's `crops`; None for a number of crops that is not fixed."""

    @abstractmethod
    def _run(self, crops: np.ndarray) -> float:
        """The logit of one image, computed in the calling thread alone."""


def seal(graph: bytes, weights_sha256: str) -> bytes:
    """Return an ONNX model with its seal: the metadata that binds it to the weights that it was made of."""
    return graph + _seal_of(graph, weights_sha256)


def is_sealed(data: bytes, weights_sha256: str) -> bool:
    """Whether `seal` returned this for weights of this digest, and not a bit of it has changed since."""
    length = len(_seal_of(b"", weights_sha256))
    return data[-length:] == _seal_of(data[:-length], weights_sha256)


def _seal_of(graph: bytes, weights_sha256: str) -> bytes:
    return _metadata("patchscan.weights_sha256", weights_sha256) + _metadata(
        "patchscan.graph_sha256", sha256(graph).hexdigest()
    )


def _metadata(key: str, value: str) -> bytes:
    """An entry of ModelProto.metadata_props (field 14). Protocol buffers may be joined end to end, so no library is
    needed to add it; lengths below 128 are one byte."""
    entry = b"".join(bytes([tag, len(text)]) + text.encode() for tag, text in ((0x0A, key), (0x12, value)))
    return bytes([14 << 3 | 2, len(entry)]) + entry
