"""Verify an archive before it is served: digest, files, code, weights, and the scores of its golden images.

The archive's code is not run and nothing is unpickled: the installed patchscan scores the golden images.
"""

import hashlib
import json
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from patchscan.common.errors import UserError
from patchscan.common.files import digest_in, sha256_of
from patchscan.common.shipped import shipped
from patchscan.detector.answer import ENGINES, Answer
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import CARD_FILE, IMPORTED, WEIGHTS_FILE, Card
from patchscan.detector.graph_detector import GRAPH_FILE
from patchscan.serving import golden
from patchscan.serving.archive import (
    CONFIG,
    HANDLER,
    MANIFEST,
    MODEL_CONFIG,
    carried_code,
    check_names,
    digest_file,
    load_archived,
    model_files,
    write_zip,
)


class VerifyError(UserError):
    """The archive must not be served; the message says why."""


@dataclass(frozen=True)
class Verified:
    """An archive that passed: its file, SHA-256, card, and the files of its golden folder by name."""

    mar: Path
    sha256: str
    card: Card
    golden: dict[str, bytes]


def verify(mar: Path, expected_sha256: str | None = None) -> Verified:
    """Check digest, list of files, layout, code, weights and scores of an archive, in this order. Raises VerifyError.

    The digest is compared with `expected_sha256` (64 hex digits, as `patchscan archive` or sha256sum print them),
    otherwise with `<name>.mar.sha256` beside the archive if it exists.
    """
    if not mar.is_file():
        raise VerifyError(f"{mar} does not exist")
    sha256 = sha256_of(mar)
    digest_path = digest_file(mar)
    if expected_sha256 is not None:
        try:
            expected_sha256 = digest_in(expected_sha256.lower().removeprefix("sha256:").encode())
        except ValueError as error:
            raise VerifyError(f"{expected_sha256!r} is no SHA-256, of 64 digits 0 to 9 and a to f") from error
    elif digest_path.exists():
        try:
            expected_sha256 = digest_in(digest_path.read_bytes())
        except (OSError, ValueError) as error:
            raise VerifyError(f"{digest_path} is damaged: copy it again with its archive, or remove it") from error
    if expected_sha256 not in (None, sha256):
        raise VerifyError(f"{mar} is not the expected archive: its sha256 is {sha256}, not {expected_sha256}")
    content = _read(mar)
    _check_no_other_files(mar, content)
    _check_layout(mar, content, sha256)
    card = _card(mar, content)
    _check_files(mar, content, card)
    gold = {name: content[f"{golden.FOLDER}/{name}"] for name in (*golden.images(), golden.ANSWERS)}
    try:
        models = _load(content, card)
        _check_manifest(mar, content, card)
        asked = [golden.differences(gold, partial(_answer, model), golden.LOGIT_TOLERANCE) for model in models]
        found = list(dict.fromkeys(difference for model in asked for difference in model))
    except UserError as error:
        raise VerifyError(f"{mar}: {error}") from error
    except Exception as error:  # graph and answers come from whoever made the archive and may contain anything
        raise VerifyError(f"{mar} contains a damaged model or damaged answers: {type(error).__name__}") from error
    if found:
        raise VerifyError(f"{mar} does not score as when it was archived: {'; '.join(found)}")
    return Verified(mar, sha256, card, gold)


def _load(content: dict[str, bytes], card: Card) -> list[BaseDetector]:
    """The model of the archive, twice where it holds weights and a graph: both may score."""
    from patchscan.detector.graph_check import load_checked

    with tempfile.TemporaryDirectory(prefix="patchscan-verify-") as name:
        folder = Path(name)
        for file in {CARD_FILE, WEIGHTS_FILE, GRAPH_FILE} & content.keys():
            (folder / file).write_bytes(content[file])
        models = [load_archived(folder)]
        if card.architecture != IMPORTED and GRAPH_FILE in content:
            models.append(load_checked(folder))
        return models


def _card(mar: Path, content: dict[str, bytes]) -> Card:
    if CARD_FILE not in content:
        raise VerifyError(f"{mar} lacks {CARD_FILE}: make it again with `patchscan archive`")
    try:
        return Card.from_dict(json.loads(content[CARD_FILE]))
    except Exception as error:  # it comes from whoever made the archive and may contain anything
        raise VerifyError(f"{mar} contains a damaged card: {type(error).__name__}") from error


def _answer(model: BaseDetector, data: bytes) -> dict[str, Any]:
    (answer,) = model.score([data])
    return asdict(answer) if isinstance(answer, Answer) else {}


def _read(mar: Path) -> dict[str, bytes]:
    """Read all files of the archive by name. Compressed ones are refused, so no file can be larger than the archive."""
    try:
        with zipfile.ZipFile(mar) as archive:
            files = [info for info in archive.infolist() if not info.is_dir()]
            if any(info.compress_type != zipfile.ZIP_STORED for info in files):
                raise VerifyError(f"{mar} is compressed, so it was not made by `patchscan archive`")
            if len({info.filename for info in files}) != len(files):
                raise VerifyError(f"{mar} contains the same file twice")
            return {info.filename: archive.read(info) for info in files}
    except VerifyError:
        raise
    except Exception as error:  # zipfile raises anything on damaged directories
        raise VerifyError(f"{mar} is not a model archive: {error}") from error


def _files(*models: str) -> set[str]:
    """The names of the files that `patchscan archive` writes, those of models included."""
    gold = {f"{golden.FOLDER}/{name}" for name in (*golden.images(), golden.ANSWERS)}
    return {*carried_code(), HANDLER, *gold, MANIFEST, CONFIG, CARD_FILE, *models}


def _check_no_other_files(mar: Path, content: dict[str, bytes]) -> None:
    """Check that there is no file that `patchscan archive` does not write, which might be run."""
    if extra := sorted(content.keys() - _files(WEIGHTS_FILE, GRAPH_FILE)):
        raise VerifyError(f"{mar} contains files that `patchscan archive` does not write: {', '.join(extra[:5])}")


def _check_layout(mar: Path, content: dict[str, bytes], sha256: str) -> None:
    """Check that the archive is the zip of its files and nothing else. TorchServe does not read a zip's directory, but
    unpacks each file that it meets on its way, also what the directory does not name."""
    with tempfile.TemporaryFile() as file:
        write_zip(file, content)
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise VerifyError(f"{mar} is not laid out as `patchscan archive` does, and may hide other files")


def _check_files(mar: Path, content: dict[str, bytes], card: Card) -> None:
    """Check that all files of such a model are there, that no other model is, and that the code is ours."""
    code = carried_code() | {HANDLER: shipped("handlers") / HANDLER}
    configs = {MODEL_CONFIG.format(engine=engine).encode(): engine for engine in ENGINES}
    engine = configs.get(content.get(CONFIG, b""))
    expected = _files(*model_files(card, engine or "torch"))
    if engine and (extra := sorted(content.keys() - expected)):
        raise VerifyError(f"{mar} holds {', '.join(extra)}, which is not a file of a model like its card's")
    if missing := sorted(expected - content.keys()):
        raise VerifyError(f"{mar} lacks {', '.join(missing[:5])}: make it again with `patchscan archive`")
    changed = [name for name, installed in code.items() if content[name] != installed.read_bytes()]
    changed += [] if engine else [CONFIG]
    if changed:
        raise VerifyError(
            f"{mar} carries other code than this version of patchscan: {', '.join(changed[:5])}. "
            "Make it again with `patchscan archive`"
        )


def _check_manifest(mar: Path, content: dict[str, bytes], card: Card) -> None:
    check_names(card)
    expected = {"modelName": card.name, "modelVersion": card.version, "handler": HANDLER, "configFile": CONFIG}
    try:
        model = json.loads(content[MANIFEST])["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise VerifyError("the manifest is damaged") from error
    if model != expected:
        raise VerifyError(f"the manifest says {model}, but the card {expected}")
