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
from patchscan.detector.onnx_detector import OnnxDetector
from patchscan.training.import_config import ImportConfig, Input, read_config, read_export
from patchscan.training.onnx_graph import Weights, wrap


def import_onnx(model: Path, run: Path, config: Path | None = None) -> Card:
    """Write a run folder (card.json, model.onnx) from an ONNX file, a .pt2 file of torch.export or a TorchScript file
    and a page of YAML, or from the folder of a Hugging Face export (config.json, preprocessor_config.json, model.onnx).

    Nothing is calibrated until `evaluate` has done it. Raises ImportConfigError and GraphError.
    """
    folder, file = (model, model / GRAPH_FILE) if model.is_dir() else (model.parent, model)
    described = read_config(config) if config else read_export(folder)
    head = described.output.head.read(config.parent if config else folder) if described.output.head else None
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
    head: Weights | None,
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
    _try(card, wrapped, file)
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
        "trained_on": described.trained_on or "unknown",
    }


def _warning(described: ImportConfig) -> str:
    trained = f"trained on {described.trained_on}" if described.trained_on else "what it was trained on is unknown"
    return f"Imported from {described.source or 'an unknown source'}; {trained}; evaluate it on your data first."


def _try(card: Card, graph: bytes, file: Path) -> None:
    """Score two pictures. Raises GraphError where the graph fails on them, or is not finite."""
    try:
        detector = OnnxDetector(card, graph)
        for value in (96, 160):
            side = card.preset.size + 8
            crops = card.preset.crops(np.full((side, side, 3), value, np.uint8), 0)
            logit = detector.logits([crops.pixels])[0]
            if not np.isfinite(logit):
                raise GraphError(f"{file} gives {logit} for a grey picture")
    except GraphError:
        raise
    except Exception as error:  # ONNX Runtime raises its own
        raise GraphError(f"{file} fails on a grey picture: {error}") from error
