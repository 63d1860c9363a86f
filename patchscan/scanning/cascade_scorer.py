"""Score with two detectors as one: the first on every image, the second on those that the first leaves open."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from patchscan.detector.answer import Answer, EngineUsed
from patchscan.detector.cascade import Cascade, log_odds
from patchscan.scanning.scorers import Scorer, Select


@dataclass(frozen=True, kw_only=True)
class CascadeAnswer(Answer):
    """An answer of a cascade. `decided_by` is the name of the detector whose verdict it is."""

    decided_by: str


class CascadeScorer:
    """Scores with `first`, and with `then` what that does not settle (patchscan.detector.cascade). It takes images, not
    crops, since the two detectors cut different ones."""

    select: Select = "server"

    def __init__(self, first: Scorer, then: Scorer, low: float, high: float):
        self._first, self._then = first, then
        self._cascade = Cascade(first=first.card, then=then.card, low=low, high=high)
        self.card = self._cascade.card
        self.parallel, self.device = min(first.parallel, then.parallel), first.device
        self.engine: EngineUsed | None = first.engine if first.engine == then.engine else None

    @property
    def model_s(self) -> Mapping[str, float]:
        """Seconds of forward passes of both so far."""
        return Counter(self._first.model_s) + Counter(self._then.model_s)

    def answer(self, data: bytes) -> Answer:
        scorer, answer = self._first, self._first.answer(data)
        if not self._cascade.settles(answer):
            scorer, answer = self._then, self._then.answer(data)
        decided = vars(answer) | {"logit": log_odds(answer.p_ai), "model": self.card.name}
        decided |= {"version": self.card.version, "digest": self.card.digest, "decided_by": scorer.card.name}
        return CascadeAnswer(**decided)

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        raise NotImplementedError("a cascade scores images, not crops")

    def has_room(self) -> bool:
        return self._first.has_room() and self._then.has_room()
