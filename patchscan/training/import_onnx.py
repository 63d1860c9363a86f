"""Turn a detector that somebody else trained, an ONNX file or a PyTorch program, into a run folder that scores like one
of ours."""

import zipfile
from collections.abc import Callable
from copy import deepcopy
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
from patchscan.training.hugging_face import find_export, read_export
from patchscan.training.import_config import (
    ImportConfig,
    Input,
    Kind,
    LinearHead,
    UnfitGraphError,
    naming_line,
    read_config,
)
from patchscan.training.onnx_graph import answer_shape, wrap, wrap_answers
from patchscan.training.run_folder import check_free

LARGEST_ERROR = 1e-3  # of a probability, and of an answer as a share of the largest
LEAST_DIFFERENCE = 1e-4  # of logits that are not the same


def import_onnx(model: Path, run: Path, config: Path | None = None) -> Card:
    """Write a run folder (card.json, model.onnx) from an ONNX file, a .pt2 file of torch.export or a TorchScript file
    and a page of YAML, or from the folder of a Hugging Face export (config.json, preprocessor_config.json, model.onnx).

    Nothing is calibrated until `evaluate` has done it. Raises ImportConfigError, GraphError and RunFolderError.
    """
    folder, file = find_export(model)
    check_free(run, file)
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
    theirs = parse_graph(file, data)
    wrapped = wrap(file, deepcopy(theirs), described.input, described.output, head)
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
    shape = answer_shape(file, theirs, described.output)
    session = open_session(wrap_answers(file, theirs, described.input, described.output.name))

    def answer(crops: np.ndarray) -> np.ndarray:
        values: np.ndarray = session.run(None, {"crops": crops})[0]
        return values

    _check_answers(
        file, [answer(crops) for crops in pictures], pictures, shape, None if head else described.output.kind
    )
    if described.input.views == "grid":
        _check_crops_apart(file, answer, pictures)
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
        logits = OnnxDetector(card, graph).logits(pictures)
    except Exception as error:  # ONNX Runtime raises its own
        raise GraphError(f"{file} fails on a test picture: {' '.join(str(error).split())}") from error
    if not np.isfinite(logits).all():
        raise GraphError(f"{file} gives {logits} for test pictures, not finite numbers")


def _check_answers(
    file: Path, answers: list[np.ndarray], pictures: list[np.ndarray], shape: list[int], kind: Kind | None
) -> None:
    """Raise GraphError where the answers to the pictures' crops are not of `shape`, as `answer_shape` returns it, or
    not of this kind; None is a vector."""
    for crops, answer in zip(pictures, answers, strict=True):
        given = list(answer.shape)
        if given[:1] != [len(crops)]:
            raise GraphError(f"{file} gives an answer of shape {given} to {len(crops)} at a time: not rows")
        if len(given) != len(shape) or any(
            side not in (0, got) for side, got in zip(shape[1:], given[1:], strict=True)
        ):
            raise GraphError(f"{file} says that its output is {shape} (0: any), but gives {given}: export it again")
        wrong = answer[(answer < -LARGEST_ERROR) | (answer > 1 + LARGEST_ERROR)]
        if kind == "probabilities" and wrong.size:
            why = f"{file} gives {wrong[0]:.3g}, which is no probability: is it of kind: logits?"
            raise UnfitGraphError(why, "output", "kind")
    if kind in ("logits", "sigmoid") and all(map(_add_up_to_one, answers)):
        why = f"{file} gives numbers that add up to 1, which are probabilities already: say kind: probabilities"
        raise UnfitGraphError(why, "output", "kind")
    # Logits that differ by rounding alone are the same; probabilities may all be next to 0.
    atol = LEAST_DIFFERENCE if kind in ("logits", "sigmoid") else 0
    if all(np.allclose(answers[0][0], answer[0], rtol=0, atol=atol) for answer in answers):
        raise GraphError(f"{file} gives the same answer to {len(pictures)} pictures of grey and of noise")


def _add_up_to_one(answer: np.ndarray) -> bool:
    """Whether each row, of several numbers, is of probabilities that exclude each other."""
    several = answer.ndim == 2 and answer.shape[1] > 1
    return several and bool((answer >= 0).all() and (abs(answer.sum(axis=1) - 1) < LARGEST_ERROR).all())


def _check_crops_apart(file: Path, answer: Callable[[np.ndarray], np.ndarray], pictures: list[np.ndarray]) -> None:
    """Raise GraphError where a crop gets another answer among other crops than alone."""
    crops = [one[:1] for one in pictures]
    together, alone = answer(np.concatenate(crops)), np.concatenate([answer(one) for one in crops])
    if together.shape != alone.shape or abs(together - alone).max() > LARGEST_ERROR * abs(alone).max():
        why = "gives a crop another answer beside others than alone, so that views: grid would not score as it does"
        raise UnfitGraphError(f"{file} {why}: describe it with views: crop or squash", "input", "views")
