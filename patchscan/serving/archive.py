"""Make a TorchServe archive of a run folder. It carries all code that it needs; a run always gives the same bytes."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

from patchscan.common.errors import UserError
from patchscan.common.files import atomic_write, sha256_of
from patchscan.common.shipped import PACKAGE, shipped
from patchscan.detector.answer import Engine
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import IMPORTED, WEIGHTS_FILE, Card
from patchscan.detector.graph_detector import GRAPH_FILE
from patchscan.serving import golden

# The earliest time that a zip file can state. It is fixed so that archives of one run are identical.
EPOCH = (1980, 1, 1, 0, 0, 0)

MODEL_CONFIG = """\
# Read by TorchServe when the model is registered.
batchSize: 8
maxBatchDelay: 20
responseTimeout: 120
# How long a crashing worker is retried while /ping still says Healthy.
maxRetryTimeoutInSec: 30
handler:
  # On a CPU: torch (eager PyTorch), onnx (ONNX Runtime) or openvino (OpenVINO). A GPU always uses torch.
  engine: {engine}
"""

# Names and versions become file names and parts of URLs.
NAME = re.compile(r"\w[\w.-]{0,63}", re.ASCII)
NAME_RULE = "1 to 64 letters, digits, _ - and ., not starting with - or ."
HANDLER = "image_detector.py"
CONFIG = "model-config.yaml"
MANIFEST = "MAR-INF/MANIFEST.json"
# The parts of the package that the handler imports, which the archive carries.
CARRIED = (
    "__init__.py",
    "common/*.py",
    "detector/*.py",
    "serving/__init__.py",
    "serving/metrics.py",
    "serving/requests.py",
)


class ArchiveError(UserError):
    """The archive could not be made; the message contains torch-model-archiver's output."""


def archive(
    run: Path, model_store: Path, name: str | None = None, version: str | None = None, engine: Engine | None = None
) -> Path:
    """Write `model_store/<name>.mar` from a run folder, replacing an older one, and its digest beside it in sha256sum's
    format. Returns the archive's path. `name` and `version` default to the card's, `engine` to torch, or to onnx for an
    imported detector, which nothing else runs.

    Raises CardError if the folder is not a run folder, GraphError if the graph of an imported detector is not one that
    `patchscan import` takes, ArchiveError if PyTorch is to run one or torch-model-archiver fails.
    """
    card = Card.read(run)
    if card.architecture == IMPORTED and engine == "torch":
        raise ArchiveError(f"{run} is an imported detector, which PyTorch does not run: leave out --engine torch")
    engine = engine or ("onnx" if card.architecture == IMPORTED else "torch")
    card = replace(card, name=name or card.name, version=version or card.version)
    check_names(card)
    model_store.mkdir(parents=True, exist_ok=True)
    mar = model_store / f"{card.name}.mar"
    with tempfile.TemporaryDirectory(prefix="patchscan-archive-") as scratch:
        folder = Path(scratch)
        _stage(run, card, engine, folder / "stage")
        _run_archiver(card, engine, folder / "stage", folder)
        with atomic_write(mar) as file:
            _normalise(folder / mar.name, file)
            sha256 = sha256_of(file)
            digest_file(mar).unlink(missing_ok=True)  # an archive without one is better than with another's
        write_digest(mar, sha256)
    return mar


def check_names(card: Card) -> None:
    """Raise ArchiveError if the card's name or version cannot be used in a file name."""
    if not all(NAME.fullmatch(text) for text in (card.name, card.version)):
        raise ArchiveError(f"an archive's name and version must be {NAME_RULE}, not {card.name!r} {card.version!r}")


def _stage(run: Path, card: Card, engine: Engine, stage: Path) -> None:
    """Fill `stage` with the archive's files besides the handler: model, card, golden images, imported code."""
    for name, path in carried_code().items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, stage / name)
    card.write(stage)
    models = model_files(card, engine)
    for name in models:
        if (run / name).exists():
            shutil.copy(run / name, stage)
    if GRAPH_FILE in models and card.architecture != IMPORTED:
        _ensure_graph(run, stage)
    golden.write(stage, load_archived(stage))


def _ensure_graph(run: Path, stage: Path) -> None:
    """Write the graph of a run folder that has none, and check one that is there."""
    from patchscan.detector.graph_check import load_checked
    from patchscan.detector.onnx_export import write_graph

    if (stage / GRAPH_FILE).exists():
        load_checked(run)
    else:
        write_graph(stage)


def model_files(card: Card, engine: Engine) -> list[str]:
    """Return the names of the files that hold the model: weights, with which a GPU scores, and the graph where a CPU
    scores with that; of an imported detector the graph alone."""
    if card.architecture == IMPORTED:
        return [GRAPH_FILE]
    return [WEIGHTS_FILE] if engine == "torch" else [WEIGHTS_FILE, GRAPH_FILE]


def load_archived(folder: Path) -> BaseDetector:
    """Load the card and the model of an archive, for its golden images: in PyTorch, or the graph of an imported
    detector, checked again, in ONNX Runtime. Raises CardError, WeightsError and GraphError."""
    if Card.read(folder).architecture == IMPORTED:
        from patchscan.detector.graph_check import load_checked

        return load_checked(folder)
    from patchscan.detector.detector import Detector

    return Detector.load(folder)


def carried_code() -> dict[str, Path]:
    """Return the package's files that an archive carries, by their names in the archive."""
    files = [file for pattern in CARRIED for file in sorted(PACKAGE.glob(pattern))]
    return {str(file.relative_to(PACKAGE.parent)): file for file in files}


def _run_archiver(card: Card, engine: str, stage: Path, folder: Path) -> None:
    config = folder / CONFIG
    config.write_text(MODEL_CONFIG.format(engine=engine))
    scratch = folder / "tmp"  # the archiver deletes $TMPDIR/<name> before it starts
    scratch.mkdir()
    command = [sys.executable, "-m", "model_archiver.model_packaging"]
    command += ["--model-name", card.name, "--version", card.version]
    command += ["--handler", str(shipped("handlers") / HANDLER), "--extra-files", str(stage)]
    command += ["--config-file", str(config), "--export-path", str(folder), "--archive-format", "zip-store"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(scratch)}
    )
    if not (folder / f"{card.name}.mar").exists():
        raise ArchiveError(f"torch-model-archiver made no archive: {(done.stderr or done.stdout).strip()[-500:]}")


def _normalise(archive: Path, out: Path) -> None:
    """Rewrite the zip with sorted names and fixed times, so that a run folder always gives the same digest."""
    with zipfile.ZipFile(archive) as old:
        content = {info.filename: old.read(info) for info in old.infolist() if not info.is_dir()}
    manifest = json.loads(content[MANIFEST])
    manifest["createdOn"] = "01/01/1980 00:00:00"
    content[MANIFEST] = json.dumps(manifest, indent=1, sort_keys=True).encode()
    with out.open("wb") as file:
        write_zip(file, content)


def write_zip(file: IO[bytes], content: Mapping[str, bytes]) -> None:
    """Write the zip of these files by name: the same content always gives the same bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
        for name in sorted(content):
            info = zipfile.ZipInfo(name, EPOCH)
            info.external_attr = 0o644 << 16
            new.writestr(info, content[name])


def digest_file(mar: Path) -> Path:
    """Return the path of an archive's digest file: `<name>.mar.sha256`."""
    return mar.with_name(f"{mar.name}.sha256")


def names_in(mar: Path) -> tuple[str, str]:
    """Return the name and version that an archive's manifest states. Raises ArchiveError."""
    try:
        with zipfile.ZipFile(mar) as archive:
            model = json.loads(archive.read(MANIFEST))["model"]
            return str(model["modelName"]), str(model["modelVersion"])
    except Exception as error:  # zipfile raises anything on damaged directories
        raise ArchiveError(f"{mar} is not a model archive: remove it from the model store") from error


def write_digest(mar: Path, sha256: str) -> None:
    """Write the digest beside the archive, in sha256sum's format."""
    with atomic_write(digest_file(mar)) as file:
        file.write_text(f"{sha256}  {mar.name}\n")
