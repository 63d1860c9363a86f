"""Two detectors as one: the first looks at every image, the second at those that the first leaves open."""

import hashlib
import json
import math
from dataclasses import dataclass, replace

from patchscan.common.errors import UserError
from patchscan.detector.answer import TIERS, Answer
from patchscan.detector.card import Card, Decision

CASCADE = "cascade"
# A logit beyond this is of a p_ai that is 0 or 1 in double precision.
LARGEST_LOGIT = 36.0


class CascadeError(UserError):
    """Two detectors cannot be joined so; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """The second detector (card `then`) decides where the first one's p_ai is from `low` to below `high`, where the
    first one's verdict is `uncertain`, and in tiers that the first may not settle because the second cannot judge them.
    Graphics, which get no verdict, are left to the first.

    The band holds all thresholds of both, so that what the first settles has the same verdict by either's. Raises
    CascadeError where it does not.
    """

    first: Card
    then: Card
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.first.name == self.then.name:
            raise CascadeError(f"both detectors are named {self.first.name}: change the name in one card.json")
        low, high = needed_band(self.first, self.then)
        if not 0 <= self.low < self.high <= 1:
            raise CascadeError(f"a band is two numbers from 0 to 1, not {self.low:g},{self.high:g}")
        if self.low > low or self.high < high:
            # Rounded outwards.
            wide = f"{math.floor(low * 1000) / 1000:g},{math.ceil(high * 1000) / 1000:g}"
            raise CascadeError(
                f"the band {self.low:g},{self.high:g} leaves out a threshold of {self.first.name} or {self.then.name}: "
                f"it must hold {wide}"
            )

    @property
    def card(self) -> Card:
        """The card of both as one model. Its logit is the log odds of the p_ai of whichever decided; its thresholds are
        the second one's."""
        band = [self.low, self.high]
        tiers = self.then.decision.tiers.items()
        return Card(
            name=f"{self.first.name}-then-{self.then.name}",
            version=f"{self.first.version}-{self.then.version}",
            architecture=CASCADE,
            preset=self.then.preset,
            weights_sha256=hashlib.sha256(json.dumps([self.first.digest, self.then.digest, band]).encode()).hexdigest(),
            decision=replace(_of_p_ai(self.then.decision), tiers={tier: one and _of_p_ai(one) for tier, one in tiers}),
            training={
                "seen": sorted({*self.first.training.get("seen", []), *self.then.training.get("seen", [])}),
                "members": [{"name": one.name, "digest": one.digest} for one in (self.first, self.then)],
                "band": band,
            },
            warnings=list(dict.fromkeys([*self.first.all_warnings, *self.then.all_warnings])),
        )

    def settles(self, answer: Answer) -> bool:
        """Whether this answer of the first detector stands."""
        if answer.reason == "out_of_domain" and self.first.decision.covers(answer.tier):
            return True  # a graphic, of which no detector gives a verdict
        is_clear = not self.low <= answer.p_ai < self.high
        return is_clear and answer.verdict != "uncertain" and self.then.decision.covers(answer.tier)


def parse_band(text: str) -> tuple[float, float]:
    """Read a band such as `0.1,0.9`. Raises CascadeError."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise CascadeError(f"a band is two numbers from 0 to 1, such as 0.1,0.9, not {text}") from None
    return low, high


def needed_band(first: Card, then: Card) -> tuple[float, float]:
    """Return the narrowest band that a cascade of these two may have: from the lowest to the highest p_ai at which the
    verdict of either changes, in any tier."""
    decisions = [card.decision.of(tier) for card in (first, then) for tier in TIERS]
    return (
        min(min(one.abstain_low, one.threshold) for one in decisions),
        max(max(one.abstain_high, one.threshold) for one in decisions),
    )


def log_odds(p_ai: float) -> float:
    """Return the logit of a probability, at most LARGEST_LOGIT away from 0."""
    if not 0 < p_ai < 1:
        return math.copysign(LARGEST_LOGIT, p_ai - 0.5)
    return math.log(p_ai) - math.log1p(-p_ai)


def _of_p_ai(decision: Decision) -> Decision:
    """The same thresholds, for a logit that is the log odds of p_ai."""
    return replace(decision, temperature=1.0, bias=0.0, tiers={})
