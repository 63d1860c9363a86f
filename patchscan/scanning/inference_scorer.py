"""Score with any server of the Open Inference Protocol (version 2, REST) that serves a run folder's `model.onnx`.

The scan decodes and cuts crops, as the run folder's card says; the server gets an image's crops and answers its logit.
"""

import json
import math
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import urllib3

from patchscan.common.console import printable
from patchscan.common.retries import Retries, TransientError
from patchscan.detector.answer import JSON_LENGTH, Answer, EngineUsed
from patchscan.detector.card import NOT_FINITE, NotFiniteError
from patchscan.detector.decoders import decoder_pool
from patchscan.detector.engines import load_detector
from patchscan.detector.prepared import build_answer
from patchscan.detector.presets import noise_picture
from patchscan.scanning.scorers import (
    RefusedRequestError,
    ScorerError,
    Select,
    ServerScorer,
    ServerSettings,
    is_transient,
    json_object,
)

SCHEME = "v2+"  # before the address of such a server
# Logits of two pictures may differ by so much from the run folder's own: a GPU rounds to fp16.
LOGIT_TOLERANCE = 0.05


class InferenceScorer(ServerScorer):
    """Scores with the model `settings.model` of a server at `settings.url`, which serves the graph of the run folder
    `run`: input `crops`, UINT8 (count, size, size, 3), output `logit`, one number.

    Raises ScorerError where it does not, or gives other logits than the folder's model does here.
    """

    device = "cpu"  # what the server uses is unknown; so each request is of one image
    engine: EngineUsed | None = None
    select: Select = "worker"

    def __init__(self, settings: ServerSettings, run: Path, retries: Retries | None = None):
        super().__init__(settings, retries, "server")
        self.model_s: dict[str, float] = {}
        self._path = f"{self.prefix}/v2/models/{settings.model}"
        detector = load_detector(run)
        self.card = detector.card
        try:
            about = self.first(lambda: self._call("GET", f"{self.prefix}/v2"))
            self._binary = "binary_tensor_data" in _list(about, "extensions")
            self._check_tensors(self.first(lambda: self._call("GET", self._path)))
            self._version = self.first(lambda: self._infer(self._picture(0)))[1]
            for picture in map(self._picture, range(2)):
                self._compare(detector.logits([picture])[0], self.first(partial(self._logit, picture)), run)
        except RefusedRequestError as error:
            raise ScorerError(f"{self.at} refuses a test picture: {error}") from error

    def answer(self, data: bytes) -> Answer:
        """Score one encoded image, which is decoded here."""
        prepared = decoder_pool().prepare(data, self.card.preset)
        return build_answer(prepared, self._logit(prepared.crops.pixels), self.card, self.engine)

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        """Score crops, with a request for each image."""
        return [self._logit(one) for one in crops]

    def probe(self) -> object:
        """Ask whether the model is ready."""
        return self._call("GET", f"{self._path}/ready", wants_json=False)

    def _check_tensors(self, about: dict[str, Any]) -> None:
        for kind, name in (("inputs", "crops"), ("outputs", "logit")):
            if name not in [tensor.get("name") for tensor in _list(about, kind) if isinstance(tensor, dict)]:
                raise ScorerError(
                    f"{self.at} has no {name} among its {kind}: serve the run folder's model.onnx, which takes crops "
                    "and gives a logit"
                )

    def _compare(self, here: float, there: float, run: Path) -> None:
        if not math.isclose(here, there, abs_tol=LOGIT_TOLERANCE):
            raise ScorerError(
                f"{self.at} is not the model of {run}: its logit of a test picture is {there:.4f}, not {here:.4f}; "
                "serve the folder's model.onnx"
            )

    def _picture(self, seed: int) -> np.ndarray:
        """The crops of a picture of noise, uint8 (count, size, size, 3)."""
        return self.card.preset.crops(noise_picture(self.card.preset, seed), seed).pixels

    def _logit(self, crops: np.ndarray) -> float:
        try:
            logit, version = self._infer(crops)
        except NotFiniteError:
            return math.nan  # one of many images, perhaps
        if version != self._version:
            raise ScorerError(
                f"the server now serves another version of {self.settings.model}; run the same command again"
            )
        return logit

    def _infer(self, crops: np.ndarray) -> tuple[float, str | None]:
        """The logit of an image's crops, and the version of the model that the server names."""
        tensor: dict[str, Any] = {"name": "crops", "datatype": "UINT8", "shape": list(crops.shape)}
        raw = crops.tobytes()
        content = {"parameters": {"binary_data_size": len(raw)}} if self._binary else {"data": crops.ravel().tolist()}
        # The id may be left out, but not where a model in KServe's own server answers with the request's.
        asked = {"id": uuid.uuid4().hex, "inputs": [tensor | content], "outputs": [{"name": "logit"}]}
        head = json.dumps(asked).encode()
        reply = self._call("POST", f"{self._path}/infer", head, raw if self._binary else None)
        try:
            (logit,) = (output for output in reply["outputs"] if output["name"] == "logit")
            (value,) = np.ravel(logit["data"])
            return float(value), reply.get("model_version")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ScorerError(f"{self.at} answers no logit of one number") from error

    def _call(
        self, method: str, path: str, head: bytes | None = None, raw: bytes | None = None, wants_json: bool = True
    ) -> dict[str, Any]:
        headers = {} if head is None else {"Content-Type": "application/json"}
        if head is not None and raw is not None:
            headers = {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(head))}
        reply = self.send(method, path, None if head is None else head + (raw or b""), headers)
        if reply.status != 200:
            raise self._error(reply)
        if not wants_json:
            return {}
        content = json_object(reply)
        if content is None:
            raise ScorerError(f"{self.settings.url} does not speak the Open Inference Protocol, version 2")
        return content

    def _error(self, reply: urllib3.BaseHTTPResponse) -> Exception:
        at, model = self.settings.url, self.settings.model
        if (json_object(reply) or {}).get("code") == NotFiniteError.code:  # as our own server says it
            return NotFiniteError(NOT_FINITE)
        if is_transient(reply.status):
            return TransientError(f"the server answers {reply.status}")
        if reply.status in (401, 403):
            return ScorerError(f"{at} refuses the token; pass the right one with --token-file")
        if reply.status == 404:
            return ScorerError(f"{at} serves no model {model}, or does not speak the Open Inference Protocol")
        said = " ".join(reply.data[:200].decode(errors="replace").split())
        return RefusedRequestError(f"the server answers {reply.status} {printable(said)}")


def _list(about: dict[str, Any], key: str) -> list[Any]:
    """What a server says under this key; nothing where that is no list."""
    found = about.get(key)
    return found if isinstance(found, list) else []
