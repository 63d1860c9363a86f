"""Turn a detector that somebody else trained, an ONNX file or a PyTorch program, into a run folder that scores like one
of ours."""

import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from patchscan.common.files import atomic_write, sha256_of
from patchscan.detector.card import IMPORTED, Card
from patchscan.detector.graph_check import GraphError, parse_graph, read_graph
from patchscan.detector.graph_detector import GRAPH_FILE, seal
from patchscan.detector.onnx_detector import OnnxDetector, open_session
from patchscan.detector.presets import noise_picture
from patchscan.training.hugging_face import read_export
from patchscan.training.import_config import (
    ImportConfig,
    Input,
    LinearHead,
    UnfitGraphError,
    naming_line,
    read_config,
)
from patchscan.training.onnx_graph import wrap, wrap_answers

LARGEST_ERROR = 1e-3  # of a probability


def import_onnx(model: Path, run: Path, config: Path | None = None) -> Card:
    """Write a run folder (card.json, model.onnx) from an ONNX file, a .pt2 file of torch.export or a TorchScript file
    and a page of YAML, or from the folder of a Hugging Face export (config.json, preprocessor_config.json, model.onnx).

    Nothing is calibrated until `evaluate` has done it. Raises ImportConfigError and GraphError.
    """
    folder, file = (model, model / GRAPH_FILE) if model.is_dir() else (model.parent, model)
    described = read_config(config) if config else read_export(folder)
    head = described.output.head.read(config.parent if config else folder) if described.output.head else None
    with naming_line(config):
        return write_run(described, file, read_model(file, described.input), head, run, {}, [_warning(described)])


def read_model(file: Path, given: Input) -> bytes:
    """Return somebody else's model, which takes what `given` says, as an ONNX file. Raises GraphError."""
    if not zipfile.is_zipfile(file):
        return read_graph(file)
    from patchscan.training.torch_program import to_onnx  # imports torch

    return to_onnx(file, given)


def write_run(
    described: ImportConfig,
    file: Path,
    data: bytes,
    head: LinearHead | None,
    run: Path,
    training: dict[str, Any],
    warnings: list[str],
) -> Card:
    """Write the run folder of a model as described, with this head: `data` is what `read_model` made of `file`;
    `training` is added to the card's. Raises GraphError."""
    wrapped = wrap(file, parse_graph(file, data), described.input, described.output, head)
    # The digest of what decides a score: the file, and what was put around it.
    digest = sha256(data + wrapped).hexdigest()
    card = Card(
        name=described.name,
        version=described.version,
        architecture=IMPORTED,
        preset=described.input.preset(),
        weights_sha256=digest,
        training=_training(described, file) | training,
        warnings=warnings,
    )
    pictures = _test_crops(card)
    _try(card, wrapped, file, pictures)
    answers = wrap_answers(file, parse_graph(file, data), described.input, described.output.name)
    _check_answers(file, answers, pictures, described.output.kind == "probabilities" and not head)
    run.mkdir(parents=True, exist_ok=True)
    with atomic_write(run / GRAPH_FILE) as out:
        out.write_bytes(seal(wrapped, digest))
    card.write(run)
    return card


def _training(described: ImportConfig, file: Path) -> dict[str, object]:
    return {
        "recipe": {"weights": file.name, "weights_sha256": sha256_of(file)},
        "seen": sorted(described.seen),
        "unseen": [],
        "source": described.source or "unknown",
        "licence": described.licence or "unknown",
        "trained_by": described.trained_by or "unknown",
        "trained_on": described.trained_on or "unknown",
    }


def _warning(described: ImportConfig) -> str:
    trained = f"trained by {described.trained_by or 'an unknown party'} on {described.trained_on or 'unknown data'}"
    return f"Imported from {described.source or 'an unknown source'}; {trained}; evaluate it on your data first."


def _test_crops(card: Card) -> list[np.ndarray]:
    """The crops of four pictures: two of one grey, two of noise."""
    side = card.preset.size + 8
    greys = [np.full((side, side, 3), value, np.uint8) for value in (96, 160)]
    return [
        card.preset.crops(rgb, 0).pixels for rgb in (*greys, *(noise_picture(card.preset, seed) for seed in (0, 1)))
    ]


def _try(card: Card, graph: bytes, file: Path, pictures: list[np.ndarray]) -> None:
    """Score the pictures. Raises GraphError where the graph fails on one, or is not finite."""
    try:
        logits = [OnnxDetector(card, graph).logits([crops])[0] for crops in pictures]
    except Exception as error:  # ONNX Runtime raises its own
        raise GraphError(f"{file} fails on a test picture: {error}") from error
    if not np.isfinite(logits).all():
        raise GraphError(f"{file} gives {logits} for test pictures, not finite numbers")


def _check_answers(file: Path, graph: bytes, pictures: list[np.ndarray], are_probabilities: bool) -> None:
    """Raise GraphError where the answers to the pictures, by a graph of `wrap_answers`, are not as described."""
    session = open_session(graph)
    answers = [session.run(None, {"crops": crops})[0] for crops in pictures]
    for crops, answer in zip(pictures, answers, strict=True):
        if len(answer) != len(crops):
            raise GraphError(
                f"{file} gives an answer of shape {list(answer.shape)} to {len(crops)} at a time: not rows"
            )
        wrong = answer[(answer < -LARGEST_ERROR) | (answer > 1 + LARGEST_ERROR)]
        if are_probabilities and wrong.size:
            why = f"{file} gives {wrong[0]:.3g}, which is no probability: is it of kind: logits?"
            raise UnfitGraphError(why, "output", "kind")
    if all(np.array_equal(answers[0], answer) for answer in answers):
        raise GraphError(f"{file} gives the same answer to {len(pictures)} pictures of grey and of noise")
