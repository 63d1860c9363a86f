"""The TorchServe handler of every archive: passes TorchServe's batches to the detector.

TorchServe requires exactly one class in this file, and one answer per request of the batch. A bad image or request gets
its own 4xx status; the other requests of its batch are answered normally.
"""

import math
import time
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchscan.detector.answer import DEVICE, MODEL_SECONDS, Answer, Engine
from patchscan.detector.base import BaseDetector, ScoreError
from patchscan.detector.card import IMPORTED, Card, NotFiniteError
from patchscan.detector.decoders import BusyError, decoder_pool
from patchscan.detector.engines import load_detector
from patchscan.detector.images import ImageError
from patchscan.detector.prepared import Prepared
from patchscan.detector.presets import has_fixed_count
from patchscan.serving.metrics import BatchWork, HandlerMetrics
from patchscan.serving.requests import CardQuestion, CutCrops, ManyImages, OneImage, Request, RequestError, parse

# Seconds that the images of a batch have together, so that its replies are within the archive's responseTimeout, after
# which TorchServe kills this worker. One image is decoded for IMAGE_S at most, and not begun where less than LEAST_S
# are left: it takes a hundredth of that where the machine is idle.
BATCH_S, IMAGE_S, LEAST_S = 105.0, 40.0, 30.0
# Images that are prepared and then scored together, by device: the crops of all those of a batch could be gigabytes.
PART = {"cpu": 8, "cuda": 64}


class ImageDetector:
    """Answers requests as described in `docs/serve.md`: p_ai, verdict and patch of each image, or an error code."""

    detector: BaseDetector
    measures: HandlerMetrics

    def initialize(self, context: Any) -> None:
        """Load the run folder that TorchServe unpacked the archive to."""
        gpu = context.system_properties.get("gpu_id")
        # There is a worker process for every core. One thread per worker also gives every score the same bits.
        torch.set_num_threads(1)
        device = f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu"
        folder = Path(context.system_properties["model_dir"])
        self.detector = self._load(folder, device, context.model_yaml_config["handler"]["engine"])
        self.detector.score([path.read_bytes() for path in sorted(folder.glob("golden/*.bmp"))])  # the first is slow
        self.measures = HandlerMetrics(context.metrics, context.model_name)

    def _load(self, folder: Path, device: str, engine: Engine) -> BaseDetector:
        if Card.read(folder).architecture == IMPORTED:
            from patchscan.detector.graph_check import check_graph  # needs onnx, which our own models do not

            check_graph(folder)
            device = "cpu"  # the only place where a graph is run
        elif device != "cpu":
            engine = "torch"
        return load_detector(folder, device, engine, threads=1, bf16=True)

    def handle(self, rows: list[dict[str, Any]], context: Any) -> list[dict[str, Any]]:
        """Return one JSON object per row, in order."""
        work, ends, started = BatchWork(), time.monotonic() + BATCH_S, self.detector.model_s
        requests: list[Request | RequestError] = []
        results: dict[int, list[Answer | ScoreError]] = {}
        alone: dict[int, bytes] = {}
        for number, row in enumerate(rows):
            request = self._parse(row)
            if isinstance(request, ManyImages):
                # One archive after another: what all of them hold may be more than the machine's memory.
                results[number] = self._score([data for _, data in request.members], work, ends)
                request = ManyImages([(name, b"") for name, _ in request.members])
            elif isinstance(request, OneImage):
                alone[number] = request.data
            requests.append(request)
        for number, answer in zip(alone, self._score(list(alone.values()), work, ends), strict=True):
            results[number] = [answer]
        model_s = self.detector.model_s - started
        self.measures.batch(len(rows), work, model_s)
        share_s = model_s / max(1, sum(isinstance(answer, Answer) for answer in work.answers))
        replies = []
        for index, request in enumerate(requests):
            scored = results.get(index, [])
            before = self.detector.model_s
            status, reply = self._reply(request, scored, ends)
            model_s = self.detector.model_s - before  # of cut crops, on which _reply runs the model
            model_s += share_s * sum(isinstance(one, Answer) for one in scored)
            context.set_response_content_type(index, "application/json")
            context.set_response_header(index, MODEL_SECONDS, f"{model_s:.6f}")
            context.set_response_header(index, DEVICE, self.detector.device_type)
            if status != 200:
                context.set_response_status(code=status, phrase=HTTPStatus(status).phrase, idx=index)
            replies.append(reply)
        return replies

    def _score(self, images: list[bytes], work: BatchWork, ends: float) -> list[Answer | ScoreError]:
        """The answers to images, in parts; BusyError to those for which no time is left."""
        answers: list[Answer | ScoreError] = []
        size = PART[self.detector.device_type]
        for start in range(0, len(images), size):
            prepared = self._prepare(images[start : start + size], ends)
            decided = self.detector.decide(prepared)
            work.add(prepared, decided)
            answers += decided
        return answers

    def _prepare(self, images: list[bytes], ends: float) -> list[Prepared | ImageError | BusyError]:
        """Decode in a child process: an image on which the decoder dies must not end this worker."""
        prepared: list[Prepared | ImageError | BusyError] = []
        for data in images:
            left = ends - time.monotonic()
            try:
                if left < LEAST_S:
                    raise BusyError
                prepared.append(decoder_pool().prepare(data, self.detector.card.preset, time_s=min(left, IMAGE_S)))
            except (ImageError, BusyError) as error:
                prepared.append(error.with_traceback(None))  # which holds the file
        return prepared

    def _parse(self, row: dict[str, Any]) -> Request | RequestError:
        try:
            return parse(row, self.detector.limits, decoder_pool().decoded_bytes)
        except RequestError as error:
            return error

    def _reply(
        self, request: Request | RequestError, scored: list[Answer | ScoreError], ends: float
    ) -> tuple[int, dict[str, Any]]:
        """The status and the JSON for a request; `scored` are the answers to its images."""
        if isinstance(request, OneImage):
            return _status(scored[0]), _as_json(scored[0])
        if isinstance(request, ManyImages):
            named = zip(request.members, scored, strict=True)
            return 200, {"answers": [{"name": name, **_as_json(one)} for (name, _), one in named]}
        card = self.detector.card
        if isinstance(request, CardQuestion):
            takes = ["image", "crops"] if has_fixed_count(card.preset) else ["image"]
            return 200, {"card": asdict(card), "digest": card.digest, "takes": takes, "engine": self.detector.engine}
        if isinstance(request, CutCrops):
            try:
                # Of an image whose logit is NaN or infinite JSON has no number, and the others are answered.
                logits = [one if math.isfinite(one) else None for one in self._logits(request.crops, ends)]
                about = {"version": card.version, "digest": card.digest, "engine": self.detector.engine}
                return 200, {"logits": logits, **about}
            except BusyError as error:
                return _status(error), _as_json(error)
            except RequestError as error:
                request = error
        return 400, {"error": {"code": "bad_request", "message": str(request)}}

    def _logits(self, crops: np.ndarray, ends: float) -> list[float]:
        """The logit of each image whose crops a client has cut. Raises RequestError where the model takes others,
        BusyError where no time is left for all."""
        preset = self.detector.card.preset
        if not has_fixed_count(preset):
            raise RequestError("this model takes images, not crops, since their number depends on its size")
        size, count = preset.size, preset.count
        if crops.shape[1:3] != (size, size) or len(crops) % count:
            raise RequestError(f"this model takes {count} crops of {size} x {size} pixels an image")
        images, logits = list(crops.reshape(-1, count, size, size, 3)), list[float]()
        part = PART[self.detector.device_type]
        for start in range(0, len(images), part):
            if time.monotonic() > ends:
                raise BusyError
            logits += self.detector.logits(images[start : start + part])
        self.measures.crops(len(images))
        return logits


def _as_json(one: Answer | ScoreError) -> dict[str, Any]:
    if isinstance(one, Answer):
        return asdict(one)
    return {"error": {"code": str(one.code), "message": str(one)}}


def _status(one: Answer | ScoreError) -> int:
    if isinstance(one, Answer):
        return 200
    if isinstance(one, BusyError):
        return 503
    return 500 if isinstance(one, NotFiniteError) else 422
