"""Combine several runs into one run folder whose logit is the mean of the members' calibrated logits."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from patchscan.common.errors import UserError
from patchscan.common.files import sha256_of
from patchscan.detector.card import WEIGHTS_FILE, Card
from patchscan.detector.detector import Detector
from patchscan.detector.models import Ensemble
from patchscan.detector.onnx_export import write_graph
from patchscan.detector.presets import EnsemblePreset, with_fixed_count


class EnsembleError(UserError):
    """The runs cannot be combined; the message says why."""


def build_ensemble(runs: list[Path], out: Path, name: str) -> Card:
    """Write an ensemble of `runs` into the run folder `out` and return its card. Its decision is not calibrated yet.

    The ensemble has seen a generator if any member has; a generator is unseen if a member names it as unseen and none
    has seen it. A member with a `max_count` of patches takes `count`. Raises EnsembleError for fewer than two runs or
    an ensemble among them, and what loading a run raises.
    """
    if len(runs) < 2:
        raise EnsembleError("an ensemble needs at least two runs: repeat --run")
    members = [Detector.load(run) for run in runs]
    cards = [member.card for member in members]
    fixed = [with_fixed_count(card.preset) for card in cards]
    presets = tuple(preset for preset in fixed if not isinstance(preset, EnsemblePreset))
    if len(presets) < len(cards):
        raise EnsembleError("an ensemble cannot contain another ensemble: give --run its members instead")
    model = Ensemble([member.model for member in members])
    model.sizes = torch.tensor([preset.size for preset in presets])
    model.counts = torch.tensor([preset.count for preset in presets])
    model.temperatures = torch.tensor([card.decision.temperature for card in cards])
    model.biases = torch.tensor([card.decision.bias for card in cards])
    out.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, out / WEIGHTS_FILE)
    seen = sorted({generator for card in cards for generator in card.training.get("seen", [])})
    named = {generator for card in cards for generator in card.training.get("unseen", [])}
    card = Card(
        name=name,
        version="1.0",
        architecture="+".join(card.architecture for card in cards),
        preset=EnsemblePreset(members=presets),
        weights_sha256=sha256_of(out / WEIGHTS_FILE),
        training={
            "seen": seen,
            "unseen": sorted(named - set(seen)),
            "members": [{"name": card.name, "version": card.version, "digest": card.digest} for card in cards],
        },
        warnings=list(dict.fromkeys(warning for card in cards for warning in card.warnings)),
    )
    card.write(out)
    write_graph(out)
    return card
