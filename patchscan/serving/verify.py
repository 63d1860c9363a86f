"""Is this archive ours, whole and working? Nothing of it is run or unpickled: our own code scores what it holds."""

import json
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscan.common.errors import UserError
from patchscan.common.files import sha256_of
from patchscan.common.shipped import shipped
from patchscan.detector.answer import Answer
from patchscan.detector.card import CARD_FILE, WEIGHTS_FILE, Card
from patchscan.serving import golden
from patchscan.serving.archive import ENGINES, HANDLER, MODEL_CONFIG, carried_code, check_names, digest_file

if TYPE_CHECKING:
    from patchscan.detector.detector import Detector

MANIFEST = "MAR-INF/MANIFEST.json"
CONFIG = "model-config.yaml"


class VerifyError(UserError):
    """The archive must not be served; the message says what is wrong with it."""


@dataclass(frozen=True)
class Verified:
    """An archive that may be served: its file, SHA-256, card, and golden folder's content."""

    mar: Path
    sha256: str
    card: Card
    golden: dict[str, bytes]


def verify(mar: Path, expected_sha256: str | None = None) -> Verified:
    """Check digest, list of files, code, weights and scores of an archive, in this order. Raises VerifyError.

    The digest is compared with `expected_sha256`, else with `<name>.mar.sha256` beside it where there is one.
    """
    if not mar.is_file():
        raise VerifyError(f"{mar} does not exist")
    sha256 = sha256_of(mar)
    noted = digest_file(mar)
    if expected_sha256 is None and noted.exists():
        expected_sha256 = noted.read_text().split()[0]
    if expected_sha256 not in (None, sha256):
        raise VerifyError(f"{mar} is not the expected archive: its sha256 is {sha256}, not {expected_sha256}")
    content = _read(mar)
    _check_files(mar, content)
    gold = {name.removeprefix("golden/"): data for name, data in content.items() if name.startswith("golden/")}
    try:
        model = _load(content)
        _check_manifest(mar, content, model.card)
        found = golden.differences(gold, lambda data: _answer(model, data))
    except UserError as error:
        raise VerifyError(f"{mar}: {error}") from error
    except Exception as error:  # card and answers are whatever whoever made the archive wrote
        raise VerifyError(f"{mar} holds a damaged card or damaged answers: {type(error).__name__}") from error
    if found:
        raise VerifyError(f"{mar} does not score as when it was archived: {'; '.join(found)}")
    return Verified(mar, sha256, model.card, gold)


def _load(content: dict[str, bytes]) -> "Detector":
    from patchscan.detector.detector import Detector

    with tempfile.TemporaryDirectory(prefix="patchscan-verify-") as folder:
        for name in (CARD_FILE, WEIGHTS_FILE):
            (Path(folder) / name).write_bytes(content[name])
        return Detector.load(Path(folder))


def _answer(model: "Detector", data: bytes) -> dict[str, Any]:
    (answer,) = model.score([data])
    return asdict(answer) if isinstance(answer, Answer) else {}


def _read(mar: Path) -> dict[str, bytes]:
    """Every file of the archive by name. Ours are stored, not deflated, so none is larger than the archive."""
    try:
        with zipfile.ZipFile(mar) as archive:
            files = [info for info in archive.infolist() if not info.is_dir()]
            if any(info.compress_type != zipfile.ZIP_STORED for info in files):
                raise VerifyError(f"{mar} is compressed, so it was not made by `patchscan archive`")
            if len({info.filename for info in files}) != len(files):
                raise VerifyError(f"{mar} holds the same file twice")
            return {info.filename: archive.read(info) for info in files}
    except VerifyError:
        raise
    except Exception as error:  # zipfile raises anything on damaged directories
        raise VerifyError(f"{mar} is not a model archive: {error}") from error


def code() -> dict[str, bytes]:
    """Every file of code that an archive carries, by its name there, as it is installed here."""
    files = carried_code() | {HANDLER: shipped("handlers") / HANDLER}
    return {name: path.read_bytes() for name, path in files.items()}


def _check_files(mar: Path, content: dict[str, bytes]) -> None:
    """Exactly the files that `patchscan archive` writes: nothing that TorchServe or Python could run besides."""
    ours = code()
    gold = {f"{golden.FOLDER}/{name}" for name in (*golden.images(), golden.ANSWERS)}
    expected = {*ours, *gold, MANIFEST, CONFIG, CARD_FILE, WEIGHTS_FILE}
    if extra := sorted(content.keys() - expected):
        raise VerifyError(f"{mar} holds what no archive of ours does: {', '.join(extra[:5])}")
    if missing := sorted(expected - content.keys()):
        raise VerifyError(f"{mar} lacks {', '.join(missing[:5])}: make it anew with `patchscan archive`")
    configs = {MODEL_CONFIG.format(engine=engine) for engine in ENGINES}
    changed = [name for name, data in ours.items() if content[name] != data]
    changed += [CONFIG] if content[CONFIG].decode(errors="replace") not in configs else []
    if changed:
        raise VerifyError(
            f"{mar} carries other code than this version of patchscan: {', '.join(changed[:5])}. "
            "Make it anew with `patchscan archive`"
        )


def _check_manifest(mar: Path, content: dict[str, bytes], card: Card) -> None:
    check_names(card)
    expected = {
        "modelName": card.name,
        "modelVersion": card.version,
        "handler": HANDLER,
        "configFile": CONFIG,
    }
    try:
        model = json.loads(content[MANIFEST])["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise VerifyError("the manifest is damaged") from error
    if model != expected:
        raise VerifyError(f"{model} is named in its manifest, {expected} by its card")
