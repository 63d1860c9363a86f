"""Read and write the model card, card.json: preset, decision thresholds, training data and measured error rates."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_origin

from patchscan.common.errors import UserError
from patchscan.common.files import atomic_write
from patchscan.detector.answer import TIERS, Tier, Verdict
from patchscan.detector.presets import Preset, preset_from_dict, preset_to_dict

CARD_FILE = "card.json"
WEIGHTS_FILE = "model.safetensors"
# The architecture of a detector that somebody else trained: its run folder holds an ONNX graph and no weights.
IMPORTED = "imported"
# Raised whenever the same card is scored otherwise than before: 1 chose patches by the file, 2 by the pixels, 3 gives
# no verdict on graphics, and 4 scores the pixels of a TIFF as they are stored.
SCORING = 4

# Of p_ai: what another draw of patches may change on 95 % of images without a warning.
NOTABLE_DRAWS = 0.02

MAX_NAME_BYTES = 200
# What reports read of each row of a card's robustness.
ROBUSTNESS_ROW = {"family", "level", "label", "group", "auc", "auc_change", "fake_detection", "real_detection"}

NOT_CALIBRATED = (
    "This model's threshold was never calibrated: it calls an image AI from p_ai 0.5 up, however often that is wrong. "
    "`patchscan evaluate` measures the error rates and calibrates the threshold on the generators it was trained on."
)


class CardError(UserError):
    """card.json is missing, malformed or does not belong to the weights beside it."""


def check_name(name: str) -> str:
    """Return a model's name if files can be called by it. Raises ValueError."""
    if not (name.strip() and name.isprintable() and "/" not in name and len(name.encode()) <= MAX_NAME_BYTES):
        raise ValueError(f"a model's name is one line of at most {MAX_NAME_BYTES} bytes without a slash, not {name!r}")
    return name


NOT_FINITE = "the model's output for this image is NaN or infinite: its weights may be damaged"


class NotFiniteError(UserError):
    """The model's output for an image is NaN or infinite: no verdict can be made of it. The image is not at fault."""

    code = "not_finite"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The numbers that turn a logit into a verdict.

    p_ai = sigmoid(logit / temperature + bias). The verdict is `uncertain` where abstain_low <= p_ai < abstain_high,
    otherwise `ai` from `threshold` up and `real` below. `chosen_by` says in words how the numbers were found.

    These numbers are for images of the tier `native`. `tiers` holds those for the others, by name: None for a tier in
    which the model cannot tell AI from real, so that every verdict is `uncertain`. A tier that is not named (older
    cards name none) is decided as `native`.
    """

    temperature: float = 1.0
    bias: float = 0.0
    threshold: float = 0.5
    abstain_low: float = 0.5
    abstain_high: float = 0.5
    chosen_by: str = "default: p_ai 0.5, not calibrated"
    tiers: "dict[str, Decision | None]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (self.temperature, self.bias, self.threshold, self.abstain_low, self.abstain_high)
        if not all(map(math.isfinite, numbers)) or self.temperature <= 0:
            raise ValueError("a decision's numbers must be finite, and its temperature positive")
        if not set(self.tiers) <= set(TIERS) or any(one is not None and one.tiers for one in self.tiers.values()):
            raise ValueError(f"a decision's tiers must be of {', '.join(TIERS)}, and have none of their own")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Decision":
        """Return the decision that `asdict` wrote."""
        tiers = {tier: one and cls.from_dict(one) for tier, one in values.get("tiers", {}).items()}
        return cls(**(values | {"tiers": tiers}))

    def covers(self, tier: Tier) -> bool:
        """Return whether the model can tell AI from real in this tier, so that its error rates mean something."""
        return self.tiers.get(tier, self) is not None

    def of(self, tier: Tier) -> "Decision":
        """Return the numbers for images of this tier; where it is not covered, the plain ones."""
        return self.tiers.get(tier) or self

    def p_ai(self, logit: float) -> float:
        """Return the calibrated probability that the image is AI-generated, 0..1.

        Raises NotFiniteError if the logit is NaN or infinite.
        """
        if not math.isfinite(logit):
            raise NotFiniteError(f"the model's output for this image is {logit}: its weights may be damaged")
        z = logit / self.temperature + self.bias
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))

    def verdict(self, p_ai: float) -> Verdict:
        """Return the verdict at this probability."""
        if self.abstain_low <= p_ai < self.abstain_high:
            return "uncertain"
        return "ai" if p_ai >= self.threshold else "real"


@dataclass(frozen=True, kw_only=True)
class Card:
    """The content of card.json.

    `training` holds the data (digest, seen and unseen generators), the recipe and its outcome; `bf16` how far bfloat16
    changes the answers (`patchscan.evaluation.precision`), `draws` how far another draw of patches does
    (`patchscan.evaluation.draws`); `metrics`, `scoreboard` and `robustness` are what evaluation measured, `evidence`
    the bounds of likelihood ratios by tier (log10 `lower` and `upper`, and the numbers of images that they rest on);
    `warnings` were found in training.
    """

    name: str
    version: str
    architecture: str
    preset: Preset
    weights_sha256: str
    decision: Decision = field(default_factory=Decision)
    training: dict[str, Any] = field(default_factory=dict)
    bf16: dict[str, Any] = field(default_factory=dict)
    draws: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    scoreboard: list[dict[str, Any]] = field(default_factory=list)
    robustness: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over architecture, preset, weights, decision and SCORING: equal digests give equal answers.
        Between engines p_ai differs by less than 1e-5, in half precision by up to 0.01."""
        parts = [self.architecture, preset_to_dict(self.preset), self.weights_sha256, asdict(self.decision), SCORING]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def allows_bf16(self) -> bool:
        """Whether bfloat16 was measured to keep the answers of this model with this decision."""
        return self.bf16.get("digest") == self.digest and self.bf16.get("kept") is True

    @property
    def all_warnings(self) -> list[str]:
        """The warnings to show with every verdict: `warnings`, NOT_CALIBRATED where that applies, and by how much p_ai
        depends on the draw of patches where it does."""
        found = [NOT_CALIBRATED] if self.decision.chosen_by == Decision.chosen_by else []
        moved = self.draws.get("p_ai_95", 0.0)
        if moved > NOTABLE_DRAWS and self.draws.get("digest") == self.digest:
            found.append(
                "p_ai depends on which patches the pixels happen to draw: another draw moved it by more than "
                f"{moved:.2f} on 5 % of {self.draws['images']} images, and gave "
                f"{self.draws['other_verdict'] * 100:.1f} % of them another verdict."
            )
        return [*found, *self.warnings]

    def write(self, folder: Path) -> None:
        """Write card.json into the run folder, atomically."""
        with atomic_write(folder / CARD_FILE) as file:
            file.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Card":
        """Build a card from the parsed card.json. Raises ValueError on missing, unknown or wrong values."""
        try:
            preset, decision = preset_from_dict(values["preset"]), Decision.from_dict(values["decision"])
            card = cls(**(values | {"preset": preset, "decision": decision}))
            card._check_types()
            return card
        except (TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def _check_types(self) -> None:
        """Raise ValueError or TypeError where a value is not of the kind that the others of this class rely on."""
        for one in fields(self):
            kind = get_origin(one.type) or one.type
            if kind in (str, dict, list) and not isinstance(getattr(self, one.name), cast("type", kind)):
                raise ValueError(f"{one.name} is not a {cast('type', kind).__name__}")
        if not all(isinstance(text, str) for text in (self.decision.chosen_by, *self.all_warnings)):
            raise ValueError("warnings must be texts")
        check_name(self.name)
        for key in ("seen", "unseen"):
            names = self.training.get(key, [])
            if not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
                raise ValueError(f"training: {key} is not a list of generators")
        recipe, protocol = self.training.get("recipe", {}), self.training.get("protocol", "raw")
        if not (isinstance(recipe, dict) and isinstance(protocol, str)):
            raise ValueError("training: recipe is not a dict, or protocol not a str")
        for bounds in self.evidence.values():
            if not all(math.isfinite(bounds[key]) for key in ("lower", "upper", "ai", "real")):
                raise ValueError("evidence has bounds that are not finite")
        if self.robustness and not all(row.keys() >= ROBUSTNESS_ROW for row in self.robustness["rows"]):
            raise ValueError("robustness has a row that lacks a figure")

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """Read card.json from a run folder. Raises CardError, naming the file and what is wrong with it."""
        path = folder / CARD_FILE
        try:
            return cls.from_dict(json.loads(path.read_text("utf-8")))
        except FileNotFoundError as error:
            raise CardError(f"{path} is missing: is {folder} a run folder made by `patchscan train`?") from error
        except (ValueError, RecursionError) as error:
            raise CardError(f"{path} is not a card that this version can read: {error}") from error
