"""Score images with TorchServe over HTTP, or with a run folder in this process, through one protocol: `Scorer`.

The only file of the scan that knows TorchServe. Errors: ImageError where the image cannot be scored, TransientError
where trying again may help, RefusedRequestError where the server does not accept this one image, ScorerError where it
cannot score any.
"""

import io
import json
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import urllib3
from urllib3.exceptions import HTTPError, LocationParseError

from patchscan.common.errors import UserError
from patchscan.common.processes import available_cpus
from patchscan.common.retries import OutageError, Retries, TransientError
from patchscan.common.tokens import read_tokens
from patchscan.detector.answer import DEVICE, MODEL_SECONDS, Answer, Engine, EngineUsed
from patchscan.detector.card import Card, NotFiniteError
from patchscan.detector.decoders import decoder_pool
from patchscan.detector.engines import load_detector
from patchscan.detector.images import ErrorCode, ImageError
from patchscan.detector.prepared import build_answer
from patchscan.detector.presets import crop_bytes

Result = TypeVar("Result")
# Where images are decoded and their crops cut: in the scan worker or in the server.
Select = Literal["worker", "server"]

# How long a server may take to answer for the first time: it may be starting.
CARD_DEADLINE_S = 60
# urllib3's connect timeout also limits the sending of the body, for which the gate allows 30 seconds.
TIMEOUT = urllib3.Timeout(connect=30.0, read=60.0)
CARD_REQUEST = json.dumps({"card": True}).encode()

NPY = "application/x-npy"
# Crops are sent instead of the encoded file up to this size per image; most files are about as large.
MAX_CROP_BYTES = 128 * 1024
NOT_AN_IMAGE = "the bytes are not an image of any known format"  # as patchscan.detector.images says it


class ScorerError(UserError):
    """The server or run folder cannot score anything: wrong address, name or token, or another model than planned."""


class RefusedRequestError(Exception):
    """The server does not accept this image, although nothing is wrong with it."""


class Scorer(Protocol):
    """Scores images with the model of `card`. Safe to use from many threads.

    `parallel`: with more calls at once nothing gets faster. `select`: where crops should be cut; the rows are the same.
    `device`: `cpu` or `cuda`. `engine`: what has computed `logits` so far (None: unknown, or several). `model_s`:
    seconds of forward passes so far, by device: of one core or of the GPU.
    """

    card: Card
    parallel: int
    select: Select
    device: str
    engine: EngineUsed | None

    @property
    def model_s(self) -> Mapping[str, float]: ...

    def answer(self, data: bytes) -> Answer:
        """Score one encoded image. Raises ImageError, NotFiniteError, TransientError, RefusedRequestError,
        ScorerError."""

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        """Score images by their crops, each uint8 (count, size, size, 3). Returns one logit for each image."""

    def has_room(self) -> bool:
        """Whether the server would answer more calls than it gets now."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server and its model are reached. The token file is read for every request, so that a renewed token is used
    at once."""

    url: str
    model: str
    token_file: Path | None = None
    connections: int = 64

    def authorization(self) -> dict[str, str]:
        """The header with the first token of the token file; none without one."""
        if self.token_file is None:
            return {}
        return {"Authorization": f"Bearer {read_tokens(self.token_file)[0].decode()}"}


def _read_card(values: dict[str, Any], model: str) -> Card:
    """Read the card that `model` has answered with. Raises ScorerError where another version has written it."""
    try:
        return Card.from_dict(values)
    except ValueError as error:
        raise ScorerError(
            f"{model} has a card that this version of patchscan cannot read ({error}): scan with the version that made "
            "its archive, or make the archive anew with this one"
        ) from error


class ServerScorer:
    """Reaches the server of a model for a scorer; `server` is what messages call it. `prefix` is the path that its
    address begins with, `at` says in messages which model it is. Raises ScorerError where that is no address."""

    def __init__(self, settings: ServerSettings, retries: Retries | None, server: str):
        address = _address(settings.url)
        self.settings, self.prefix = settings, (address.path or "").rstrip("/")
        self.at = f"{settings.model} at {settings.url}"
        self.parallel = settings.connections
        self._server = server
        self._retries = retries or Retries(deadline_s=CARD_DEADLINE_S, other_side=settings.url)
        # The worker's window limits the requests in flight, so the pool may wait for a connection without limit.
        self._http = urllib3.connection_from_url(
            address.url, maxsize=settings.connections, block=True, timeout=TIMEOUT, retries=False
        )

    def has_room(self) -> bool:
        """Whether the server answers a small request just now. False where it is overloaded (503), away, or refuses."""
        try:
            self.probe()
        except (TransientError, ScorerError, RefusedRequestError):
            return False
        return True

    def probe(self) -> object:
        """Send a small request. Raises what any other raises."""
        raise NotImplementedError

    def first(self, question: Callable[[], Result]) -> Result:
        """Ask a server that may be starting. Raises OutageError where it does not answer within CARD_DEADLINE_S."""
        try:
            return self._retries.call(question)[0]
        except TransientError as error:
            raise OutageError(
                f"no {self._server} answers for {self.at} ({error}); start it, or run the same command again when it "
                "is back"
            ) from error

    def send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        """Send one request. Raises TransientError where there is no reply."""
        try:
            return self._http.urlopen(method, path, body=body, headers=headers | self.settings.authorization())
        except HTTPError as error:
            raise TransientError(f"the server: {type(error).__name__}") from None


def json_object(reply: urllib3.BaseHTTPResponse) -> dict[str, Any] | None:
    """Return the JSON object of a reply; None where it is none: a proxy's may be anything."""
    try:
        content = json.loads(reply.data)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


class TorchServeScorer(ServerScorer):
    """Scores with a model on TorchServe 0.12, through its inference API only."""

    def __init__(self, settings: ServerSettings, retries: Retries | None = None):
        super().__init__(settings, retries, "TorchServe")
        self.model_s: defaultdict[str, float] = defaultdict(float)
        self._counting = threading.Lock()
        self._path = f"{self.prefix}/predictions/{settings.model}"
        try:
            reply = self.first(self.probe)
            self.card = _read_card(dict(reply["card"]), self.at)
            crops = "crops" in reply.get("takes", ()) and crop_bytes(self.card.preset) <= MAX_CROP_BYTES
            self.select: Select = "worker" if crops else "server"
            self.device = next(iter(self.model_s), "cpu")
            self.engine: EngineUsed | None = reply.get("engine")
        except (KeyError, TypeError, ValueError, RefusedRequestError) as error:
            raise ScorerError(f"{self.at} is not a patchscan model: it has no card") from error

    def probe(self) -> dict[str, Any]:
        """Ask for the model's card."""
        return self._post(CARD_REQUEST, "application/json")

    def answer(self, data: bytes) -> Answer:
        """Send the encoded bytes, and let the server decode them."""
        reply = self._post(data, "application/octet-stream")
        # The server also accepts tars, zips and arrays of crops, but such an object of a bucket is not an image.
        if "p_ai" not in reply:
            raise ImageError(ErrorCode.NOT_AN_IMAGE, NOT_AN_IMAGE)
        _check_digest(self.card, reply["digest"])
        return Answer(**{"engine": self.engine} | reply)  # a server of an earlier version does not say it here

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        """Send the crops of several images as one array, uint8 (images x count, size, size, 3)."""
        body = io.BytesIO()
        np.save(body, np.concatenate(crops))
        reply = self._post(body.getvalue(), NPY)
        _check_digest(self.card, reply["digest"])
        if reply.get("engine") != self.engine:
            self.engine = None  # the server has workers of several kinds, as on nodes with other CPUs
        return [math.nan if logit is None else float(logit) for logit in reply["logits"]]

    def close(self) -> None:
        """Close the connections that no request uses."""
        self._http.close()

    def _post(self, body: bytes, content_type: str) -> dict[str, Any]:
        reply = self.send("POST", self._path, body, {"Content-Type": content_type})
        if DEVICE in reply.headers:
            with self._counting:
                self.model_s[reply.headers[DEVICE]] += float(reply.headers[MODEL_SECONDS])
        if reply.status != 200:
            raise self._error(reply, len(body))
        answer = json_object(reply)
        if answer is None:
            raise ScorerError(f"{self.settings.url} answers with what is not TorchServe's: a page of a proxy, perhaps")
        return answer

    def _error(self, reply: urllib3.BaseHTTPResponse, sent: int) -> Exception:
        """Turn a reply other than 200 into an error (docs/serve.md; as measured on TorchServe 0.12)."""
        if reply.status == 413:
            return RefusedRequestError(f"{sent:,} bytes are more than the server's max_request_size")
        problem = json_object(reply) or {}
        error = problem["error"] if isinstance(problem.get("error"), dict) else {}
        code, message = str(error.get("code")), str(error.get("message"))
        if code == NotFiniteError.code:
            return NotFiniteError(message)
        if is_transient(reply.status):
            return TransientError(f"the server answers {reply.status}")
        if code == "bad_request":
            return ImageError(ErrorCode.NOT_AN_IMAGE, NOT_AN_IMAGE)
        if code in set(ErrorCode):
            return ImageError(ErrorCode(code), message)
        kind = problem.get("type", "")
        if kind == "InvalidKeyException" or reply.status in (401, 403):
            return ScorerError(f"{self.settings.url} refuses the token; pass the inference token with --token-file")
        if kind in ("ModelNotFoundException", "ModelVersionNotFoundException") or reply.status == 404:
            return ScorerError(
                f"{self.settings.url} serves no model {self.settings.model}; `patchscan status` lists those it serves"
            )
        return RefusedRequestError(f"the server answers {reply.status} {kind}".rstrip())


class InProcessScorer:
    """Scores with a run folder in this process, with the engine of `choose_engine`: without torch, or with the `train`
    extra. Each image uses one core."""

    parallel = available_cpus()
    select: Select = "worker"

    def __init__(self, run: Path, device: str = "cpu", engine: Engine | None = None):
        self._detector = load_detector(run, device, engine, bf16=True)
        self.card = self._detector.card
        self.device = self._detector.device_type
        self.engine: EngineUsed | None = self._detector.engine

    @property
    def model_s(self) -> dict[str, float]:
        """Seconds of forward passes so far."""
        return {self.device: self._detector.model_s}

    def answer(self, data: bytes) -> Answer:
        prepared = decoder_pool().prepare(data, self.card.preset)
        return build_answer(prepared, self.logits([prepared.crops.pixels])[0], self.card, self.engine)

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        return self._detector.logits(crops)

    def has_room(self) -> bool:
        return True


def is_transient(status: int) -> bool:
    """Whether a server that answers with this HTTP status may answer the same request later."""
    return status >= 500 or status in (408, 429)


def _check_digest(card: Card, digest: str) -> None:
    """Raise ScorerError where an answer comes from another model than the card's, because it was replaced mid-scan."""
    if digest != card.digest:
        raise ScorerError(f"the server now serves another version of {card.name}; run the same command again")


def _address(url: str) -> urllib3.util.Url:
    try:
        address = urllib3.util.parse_url(url)
    except LocationParseError:
        address = urllib3.util.Url()
    if address.scheme not in ("http", "https") or not address.host or address.auth:
        raise ScorerError(f"{url} is not an address such as http://127.0.0.1:8080")
    return address
