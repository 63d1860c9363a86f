"""A logit that is NaN or infinite is an error of its own, never a verdict, and costs its neighbours nothing."""

import io
import json
import math
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from handlers import image_detector
from handlers.image_detector import ImageDetector
from patchscan.common.files import sha256_of
from patchscan.detector.answer import Answer
from patchscan.detector.card import WEIGHTS_FILE, Card, Decision, NotFiniteError
from patchscan.detector.detector import Detector
from patchscan.detector.weights import read_safetensors
from patchscan.evaluation.explain import explain
from patchscan.scanning.plan import ScanSource
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.serving.archive import archive
from patchscan.storage import open_store
from tests.scan_kit import StubScorer, card, image, table_of
from tests.serving_kit import encoded, png, tiny_run, zip_of

NO_NUMBERS = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("logit", NO_NUMBERS)
def test_a_decision_refuses_what_is_no_number(logit: float) -> None:
    with pytest.raises(NotFiniteError, match="its weights may be damaged"):
        Decision().p_ai(logit)


class Fails(torch.nn.Module):
    """Gives `logit` at the `bad` of its calls (from 0), else 1."""

    def __init__(self, logit: float, bad: set[int]):
        super().__init__()
        self.logit, self.bad, self.calls = logit, bad, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = torch.full((len(x), 1), self.logit if self.calls in self.bad else 1.0)
        self.calls += 1
        return found


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images reach the model in their order."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("logit", NO_NUMBERS)
def test_one_image_of_a_batch_fails_alone(logit: float) -> None:
    detector = Detector(card(), Fails(logit, {1}))
    found = detector.score([png(1), png(2), b"no image", png(3)])
    assert [type(one).__name__ for one in found] == ["Answer", "NotFiniteError", "ImageError", "Answer"]
    assert all(one.p_ai == pytest.approx(0.731, abs=1e-3) for one in found if isinstance(one, Answer))
    with pytest.raises(NotFiniteError):
        explain(Detector(card(), Fails(logit, {0})), png(1))


class Context:
    """What TorchServe hands the handler, as far as it is used here."""

    def __init__(self) -> None:
        self.status: dict[int, int] = {}

    def set_response_status(self, code: int, phrase: str, idx: int) -> None:
        self.status[idx] = code

    def set_response_content_type(self, *_: Any) -> None: ...

    def set_response_header(self, *_: Any) -> None: ...


@pytest.mark.usefixtures("one_thread")
def test_the_server_answers_500_with_the_code() -> None:
    errors: list[Any] = []
    context, handler = Context(), handler_of(Fails(math.nan, {1, 3}))  # the archive's second image, the second alone
    handler.measures = SimpleNamespace(batch=lambda requests, work, seconds: errors.extend(work.answers))  # type: ignore[assignment]
    rows = [{"body": one} for one in (png(1), png(2), b"no image", zip_of({"a.png": png(3), "b.png": png(4)}))]
    fine, bad, no_image, both = handler.handle(rows, context)
    assert context.status == {1: 500, 2: 422}
    assert "verdict" in fine
    assert (bad["error"]["code"], no_image["error"]["code"]) == ("not_finite", "not_an_image")
    assert ["error" in one for one in both["answers"]] == [False, True]
    assert sum(isinstance(one, NotFiniteError) for one in errors) == 2
    json.dumps([fine, bad, no_image, both], allow_nan=False)


def handler_of(model: torch.nn.Module) -> ImageDetector:
    handler = ImageDetector()
    handler.detector = Detector(card(), model)
    handler.measures = SimpleNamespace(batch=lambda *_: None, crops=lambda _: None)  # type: ignore[assignment]
    return handler


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("logit", NO_NUMBERS)
def test_crops_are_answered_in_json_that_every_client_reads(logit: float) -> None:
    preset, body = card().preset, io.BytesIO()
    np.save(body, np.zeros((3 * preset.count, preset.size, preset.size, 3), np.uint8))
    (reply,) = handler_of(Fails(logit, {1})).handle([{"body": body.getvalue()}], Context())
    assert reply["logits"] == [1.0, None, 1.0]


class Slow(torch.nn.Module):
    """Takes three seconds of `clock` for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock += 3
        return torch.ones((len(x), 1))


@pytest.mark.usefixtures("one_thread")
def test_a_batch_ends_before_torchserve_kills_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    model, context = Slow(), Context()
    monkeypatch.setattr(image_detector, "time", SimpleNamespace(monotonic=lambda: model.clock))
    handler, size, count = handler_of(model), card().preset.size, card().preset.count
    many = zip_of({f"{number}.png": png(number) for number in range(48)})
    archive_reply, alone = handler.handle([{"body": many}, {"body": png(1)}], context)
    codes = [answer.get("error", {}).get("code") for answer in archive_reply["answers"]]
    assert codes == [None] * 32 + ["busy"] * 16
    assert (alone["error"]["code"], context.status) == ("busy", {1: 503})
    crops = io.BytesIO()
    np.save(crops, np.zeros((48 * count, size, size, 3), np.uint8))
    (reply,) = handler.handle([{"body": crops.getvalue()}], context)
    assert (reply["error"]["code"], context.status) == ("busy", {0: 503, 1: 503})
    assert model.clock < 2 * 120


def test_of_a_batch_of_archives_one_is_unpacked_at_a_time() -> None:
    handler, size = handler_of(Fails(1.0, set())), 16 * 2**20
    rows = [{"body": zip_of({"zeros": bytes(size)})} for _ in range(8)]
    tracemalloc.start()
    try:
        replies = handler.handle(rows, Context())
        assert tracemalloc.get_traced_memory()[1] < 4 * size
    finally:
        tracemalloc.stop()
    assert [reply["answers"][0]["error"]["code"] for reply in replies] == ["not_an_image"] * 8


class OverflowingScorer(StubScorer):
    """Its model gives NaN for dark pictures."""

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        return [logit if one.mean() > 40 else math.nan for one, logit in zip(crops, super().logits(crops), strict=True)]


@pytest.mark.parametrize("select", ["worker", "server"])
def test_a_scan_has_a_failed_row_of_it_and_goes_on(tmp_path: Path, select: Any) -> None:
    photos, out, scorer = tmp_path / "photos", open_store(str(tmp_path / "out")), OverflowingScorer()
    photos.mkdir()
    for number in range(6):
        (photos / f"{number}.png").write_bytes(image(number))
    (photos / "dark.png").write_bytes(encoded(Image.new("RGB", (40, 40)), "PNG"))
    made = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card), out)
    Worker(made, out, scorer, WorkSettings(select=select)).work(0)
    rows = table_of(out, made.scan)
    failed = {key: row["error_code"] for key, row in rows.items() if row["status"] == "failed"}
    assert failed["dark.png"] == "not_finite"
    assert set(failed.values()) == {"not_finite"}
    assert rows["dark.png"]["verdict"] is None
    assert any(row["status"] == "scored" for row in rows.values())


def test_a_model_of_no_numbers_is_not_archived(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    weights = read_safetensors(run / WEIGHTS_FILE)
    weights["fc.bias"].fill_(math.nan)
    save_file(weights, run / WEIGHTS_FILE)
    values = json.loads((run / "card.json").read_text()) | {"weights_sha256": sha256_of(run / WEIGHTS_FILE)}
    Card.from_dict(values).write(run)
    with pytest.raises(NotFiniteError):
        archive(run, tmp_path)
