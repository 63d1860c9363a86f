"""Report the handler's metrics to Prometheus through TorchServe's custom metrics.

The server records the names that `handlers/metrics.yaml` lists; a TorchServe without that file ignores them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ts.metrics.metric_type_enum import MetricTypes

from patchscan.detector.answer import Answer
from patchscan.detector.base import ScoreError
from patchscan.detector.prepared import Prepared

COUNTERS = {
    "patchscan_images_total": "Verdict",
    "patchscan_errors_total": "Code",
    "patchscan_scores_total": "PAi",
    "patchscan_batches_total": None,
    "patchscan_batch_requests_total": None,
}
HISTOGRAMS = ("patchscan_decode_seconds", "patchscan_patch_seconds", "patchscan_model_seconds")


@dataclass
class BatchWork:
    """What a batch has come to: the answers to its images, and the seconds of decoding and of choosing patches."""

    answers: list[Answer | ScoreError] = field(default_factory=list)
    decode_s: float = 0.0
    patch_s: float = 0.0

    def add(self, prepared: Sequence[Prepared | ScoreError], answers: Sequence[Answer | ScoreError]) -> None:
        """Add images that were prepared, and their answers."""
        decoded = [image for image in prepared if isinstance(image, Prepared)]
        self.decode_s += sum(image.decode_s for image in decoded)
        self.patch_s += sum(image.patch_s for image in decoded)
        self.answers.extend(answers)


class HandlerMetrics:
    """Counts images by verdict, errors by code, scores by tenths of p_ai, requests and batches; measures the seconds of
    decoding, choosing patches and running the model per batch. `cache` is TorchServe's metrics cache."""

    def __init__(self, cache: Any, model: str):
        self._model = model
        self._metrics = {}
        for name, label in COUNTERS.items():
            labels = ["ModelName", label] if label else ["ModelName"]
            self._metrics[name] = cache.add_metric_to_cache(name, "count", labels, MetricTypes.COUNTER)
        for name in HISTOGRAMS:
            self._metrics[name] = cache.add_metric_to_cache(name, "s", ["ModelName"], MetricTypes.HISTOGRAM)

    def batch(self, requests: int, work: BatchWork, model_s: float) -> None:
        """Record one batch: its number of requests, what it came to, and the model's seconds for all its images."""
        scored = [answer for answer in work.answers if isinstance(answer, Answer)]
        errors = [answer for answer in work.answers if not isinstance(answer, Answer)]
        self._add("patchscan_batches_total", 1)
        self._add("patchscan_batch_requests_total", requests)
        self._count("patchscan_images_total", (answer.verdict for answer in scored))
        self._count("patchscan_errors_total", (str(error.code) for error in errors))
        self._count("patchscan_scores_total", (f"{min(int(answer.p_ai * 10), 9) / 10:.1f}" for answer in scored))
        if scored:
            self._add("patchscan_decode_seconds", work.decode_s)
            self._add("patchscan_patch_seconds", work.patch_s)
            self._add("patchscan_model_seconds", model_s)

    def crops(self, images: int) -> None:
        """Record images that were decoded, cropped and decided by the client."""
        self._add("patchscan_images_total", images, "by_client")

    def _count(self, name: str, labels: Any) -> None:
        for label, count in Counter(labels).items():
            self._add(name, count, label)

    def _add(self, name: str, value: float, *labels: str) -> None:
        self._metrics[name].add_or_update(value, [self._model, *labels])
