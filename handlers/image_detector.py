"""The TorchServe handler of every archive: passes TorchServe's batches to the detector.

TorchServe requires exactly one class in this file, and one answer per request of the batch. A bad image or request gets
its own 4xx status; the other requests of its batch are answered normally.
"""

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
from patchscan.serving.metrics import HandlerMetrics
from patchscan.serving.requests import CardQuestion, CutCrops, ManyImages, OneImage, Request, RequestError, parse

# Seconds for decoding all images of a batch, so that its model passes too end within the archive's responseTimeout. One
# image gets IMAGE_S at most, and LEAST_S at least: it is decoded in a hundredth of that where the machine is idle.
DECODE_S, IMAGE_S, LEAST_S = 75.0, 40.0, 30.0


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
        requests = [self._parse(row) for row in rows]
        images = [data for request in requests for data in _images(request)]
        prepared = self._prepare(images)
        before = self.detector.model_s
        answers = self.detector.decide(prepared)
        model_s = self.detector.model_s - before
        self.measures.batch(len(rows), prepared, answers, model_s)
        share_s = model_s / max(1, sum(isinstance(answer, Answer) for answer in answers))
        scored = iter(answers)
        replies = []
        for index, request in enumerate(requests):
            results = [next(scored) for _ in _images(request)]
            before = self.detector.model_s
            status, reply = self._reply(request, results)
            model_s = self.detector.model_s - before  # of cut crops, on which _reply runs the model
            model_s += share_s * sum(isinstance(result, Answer) for result in results)
            context.set_response_content_type(index, "application/json")
            context.set_response_header(index, MODEL_SECONDS, f"{model_s:.6f}")
            context.set_response_header(index, DEVICE, self.detector.device_type)
            if status != 200:
                context.set_response_status(code=status, phrase=HTTPStatus(status).phrase, idx=index)
            replies.append(reply)
        return replies

    def _prepare(self, images: list[bytes]) -> list[Prepared | ImageError | BusyError]:
        """Decode in a child process: an image on which the decoder dies must not end this worker."""
        deadline = time.monotonic() + DECODE_S
        prepared: list[Prepared | ImageError | BusyError] = []
        for data in images:
            left = deadline - time.monotonic()
            try:
                if left < LEAST_S:
                    raise BusyError
                prepared.append(decoder_pool().prepare(data, self.detector.card.preset, time_s=min(left, IMAGE_S)))
            except (ImageError, BusyError) as error:
                prepared.append(error)
        return prepared

    def _parse(self, row: dict[str, Any]) -> Request | RequestError:
        try:
            return parse(row, self.detector.limits, decoder_pool().decoded_bytes)
        except RequestError as error:
            return error

    def _reply(self, request: Request | RequestError, scored: list[Answer | ScoreError]) -> tuple[int, dict[str, Any]]:
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
                logits = self._logits(request.crops)
                about = {"version": card.version, "digest": card.digest, "engine": self.detector.engine}
                return 200, {"logits": logits, **about}
            except RequestError as error:
                request = error
        return 400, {"error": {"code": "bad_request", "message": str(request)}}

    def _logits(self, crops: np.ndarray) -> list[float]:
        """The logit of each image whose crops a client has cut. Raises RequestError where the model takes others."""
        preset = self.detector.card.preset
        if not has_fixed_count(preset):
            raise RequestError("this model takes images, not crops, since their number depends on its size")
        size, count = preset.size, preset.count
        if crops.shape[1:3] != (size, size) or len(crops) % count:
            raise RequestError(f"this model takes {count} crops of {size} x {size} pixels an image")
        images = list(crops.reshape(-1, count, size, size, 3))
        self.measures.crops(len(images))
        return self.detector.logits(images)


def _images(request: Request | RequestError) -> list[bytes]:
    if isinstance(request, OneImage):
        return [request.data]
    return [data for _, data in request.members] if isinstance(request, ManyImages) else []


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
