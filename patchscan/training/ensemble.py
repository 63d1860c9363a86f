"""Combine several runs into one run folder whose logit is the mean of the members' calibrated logits."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchscan.common.errors import UserError
from patchscan.common.files import atomic_write, sha256_of
from patchscan.detector.card import IMPORTED, WEIGHTS_FILE, Card, check_name
from patchscan.detector.detector import Detector
from patchscan.detector.ensemble_graph import join_graphs
from patchscan.detector.graph_detector import GRAPH_FILE, seal
from patchscan.detector.models import Ensemble
from patchscan.detector.onnx_detector import OnnxDetector
from patchscan.detector.onnx_export import write_graph
from patchscan.detector.presets import EnsemblePreset, noise_picture, with_fixed_count
from patchscan.training.checkpoint import write_weights
from patchscan.training.run_folder import check_free

LARGEST_DIFFERENCE = 1e-3  # of a logit, between a joined graph and its members


class EnsembleError(UserError):
    """The runs cannot be combined; the message says why."""


def build_ensemble(runs: list[Path], out: Path, name: str) -> Card:
    """Write an ensemble of `runs` into the run folder `out` and return its card. Its decision is not calibrated yet.

    The ensemble has seen a generator if any member has; a generator is unseen if a member names it as unseen and none
    has seen it. Members of one preset share the crops; of several, a member with a `max_count` of patches takes
    `count`. Where a member is an imported detector, the members' graphs are joined. Raises EnsembleError for fewer than
    two runs or an ensemble among them, GraphError for graphs that cannot be joined, and what loading a run raises.
    `out` may not be a member's folder, nor a trained run (RunFolderError).
    """
    if len(runs) < 2:
        raise EnsembleError("an ensemble needs at least two runs: repeat --run")
    if out.resolve() in {run.resolve() for run in runs}:
        raise EnsembleError(f"{out} is a member's own folder, which would be lost: choose another --out")
    check_free(out)
    try:
        check_name(name)
    except ValueError as error:
        raise EnsembleError(str(error)) from error
    cards = [Card.read(run) for run in runs]
    if any("+" in card.architecture or isinstance(card.preset, EnsemblePreset) for card in cards):
        raise EnsembleError("an ensemble cannot contain another ensemble: give --run its members instead")
    imported = any(card.architecture == IMPORTED for card in cards)
    write = _write_joined_graph if imported else _write_weights
    card = write(runs, cards, out, _described(cards, name))
    card.write(out)
    if not imported:
        write_graph(out)
    return card


def _joined_preset(cards: list[Card]) -> EnsemblePreset:
    presets = [with_fixed_count(card.preset) for card in cards]
    try:
        return EnsemblePreset(members=tuple(preset for preset in presets if not isinstance(preset, EnsemblePreset)))
    except ValueError as error:
        raise EnsembleError(str(error)) from error


def _described(cards: list[Card], name: str) -> dict[str, Any]:
    """What is on the card of an ensemble of any kind."""
    seen = sorted({generator for card in cards for generator in card.training.get("seen", [])})
    named = {generator for card in cards for generator in card.training.get("unseen", [])}
    return {
        "name": name,
        "version": "1.0",
        "training": {
            "seen": seen,
            "unseen": sorted(named - set(seen)),
            "members": [{"name": card.name, "version": card.version, "digest": card.digest} for card in cards],
        },
        "warnings": list(dict.fromkeys(warning for card in cards for warning in card.warnings)),
    }


def _write_weights(runs: list[Path], cards: list[Card], out: Path, described: dict[str, Any]) -> Card:
    """Write the weights of an ensemble of our own models, and return its card."""
    model = Ensemble([Detector.load(run).model for run in runs])
    preset = cards[0].preset
    if any(card.preset != preset for card in cards):
        preset = _joined_preset(cards)
        model.sizes = torch.tensor([member.size for member in preset.members])
        model.counts = torch.tensor([member.count for member in preset.members])
    model.temperatures = torch.tensor([card.decision.temperature for card in cards])
    model.biases = torch.tensor([card.decision.bias for card in cards])
    out.mkdir(parents=True, exist_ok=True)
    write_weights(out, model.state_dict())
    architecture = "+".join(card.architecture for card in cards)
    weights_sha256 = sha256_of(out / WEIGHTS_FILE)
    return Card(architecture=architecture, preset=preset, weights_sha256=weights_sha256, **described)


def _write_joined_graph(runs: list[Path], cards: list[Card], out: Path, described: dict[str, Any]) -> Card:
    """Write the graph of an ensemble with an imported member, and return its card: it is an imported detector too.
    Raises EnsembleError where the joined graph does not give the members' mean."""
    members, preset = [OnnxDetector.load(run) for run in runs], _joined_preset(cards)
    graphs = [(run / GRAPH_FILE).read_bytes() for run in runs]
    decisions = [card.decision for card in cards]
    graph = join_graphs([card.name for card in cards], graphs, decisions, preset)
    digest = hashlib.sha256(graph).hexdigest()
    card = Card(architecture=IMPORTED, preset=preset, weights_sha256=digest, **described)
    joined = OnnxDetector(card, graph)
    for seed in range(2):
        rgb = noise_picture(preset, seed)
        alone = [
            one.logits([part.crops(rgb, seed).pixels])[0] / decision.temperature + decision.bias
            for one, part, decision in zip(members, preset.members, decisions, strict=True)
        ]
        together = joined.logits([preset.crops(rgb, seed).pixels])[0]
        if abs(together - float(np.mean(alone))) > LARGEST_DIFFERENCE:
            raise EnsembleError(
                f"the joined graph gives {together:.4f} for a test picture, where its members' mean is "
                f"{np.mean(alone):.4f}: one of them does not bear conversion, as a quantised graph may not"
            )
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / GRAPH_FILE) as file:
        file.write_bytes(seal(graph, digest))
    return card
