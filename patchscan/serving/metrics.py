"""What the handler tells Prometheus about its images, through TorchServe's custom metrics.

The server records the names that `metrics.yaml` lists; a stock TorchServe, which does not know them, ignores them.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ts.metrics.metric_type_enum import MetricTypes

from patchscan.detector.answer import Answer
from patchscan.detector.detector import ScoreError
from patchscan.detector.images import ImageError
from patchscan.detector.prepared import Prepared

COUNTERS = {
    "patchscan_images_total": "Verdict",
    "patchscan_errors_total": "Code",
    "patchscan_scores_total": "PAi",
    "patchscan_batches_total": None,
    "patchscan_batch_requests_total": None,
}
HISTOGRAMS = ("patchscan_decode_seconds", "patchscan_patch_seconds", "patchscan_model_seconds")


class HandlerMetrics:
    """Counts images by verdict, errors by code, scores by tenths of p_ai and requests by batch; times each batch's
    decoding, choice of patches, and model. `cache` is TorchServe's metrics cache."""

    def __init__(self, cache: Any, model: str):
        self._model = model
        self._metrics = {}
        kinds = dict.fromkeys(COUNTERS, MetricTypes.COUNTER) | dict.fromkeys(HISTOGRAMS, MetricTypes.HISTOGRAM)
        for name, kind in kinds.items():
            names = ["ModelName", label] if (label := COUNTERS.get(name)) else ["ModelName"]
            unit = "count" if kind is MetricTypes.COUNTER else "s"
            self._metrics[name] = cache.add_metric_to_cache(name, unit, names, kind)

    def batch(
        self,
        requests: int,
        prepared: Sequence[Prepared | ImageError],
        answers: Sequence[Answer | ScoreError],
        model_s: float,
    ) -> None:
        """One batch: its requests, its images prepared and answered, and the seconds the model took for all."""
        good = [one for one in answers if isinstance(one, Answer)]
        self._add("patchscan_batches_total", 1)
        self._add("patchscan_batch_requests_total", requests)
        self._count("patchscan_images_total", (one.verdict for one in good))
        self._count("patchscan_errors_total", (str(one.code) for one in answers if not isinstance(one, Answer)))
        self._count("patchscan_scores_total", (f"{min(int(one.p_ai * 10), 9) / 10:.1f}" for one in good))
        if good:
            ready = [one for one in prepared if isinstance(one, Prepared)]
            self._add("patchscan_decode_seconds", sum(one.decode_s for one in ready))
            self._add("patchscan_patch_seconds", sum(one.patch_s for one in ready))
            self._add("patchscan_model_seconds", model_s)

    def crops(self, images: int) -> None:
        """Images whose crops the client cut, and whose verdict it makes."""
        self._add("patchscan_images_total", images, "by_client")

    def _count(self, name: str, labels: Any) -> None:
        for label, count in Counter(labels).items():
            self._add(name, count, label)

    def _add(self, name: str, value: float, *labels: str) -> None:
        self._metrics[name].add_or_update(value, [self._model, *labels])
