"""Keep commands that write a run folder from writing over what took hours to train, or over the file they are given."""

import json
from contextlib import suppress
from pathlib import Path

from patchscan.common.errors import UserError
from patchscan.detector.card import CARD_FILE
from patchscan.detector.graph_detector import GRAPH_FILE

CHECKPOINT_FILE = "checkpoint.pt"


class RunFolderError(UserError):
    """The run folder cannot be written without loss; the message says of what."""


def check_free(run: Path, model: Path | None = None) -> None:
    """Raise RunFolderError where the folder `run` holds a model of `patchscan train`, or where the graph that is to be
    written there would take the place of `model`, the file that it is made of."""
    if model is not None and (run / GRAPH_FILE).resolve() == model.resolve():
        raise RunFolderError(f"{model} would be replaced by what is made of it: choose another --run than {run}")
    if (run / CHECKPOINT_FILE).exists() or _is_trained(run):
        raise RunFolderError(f"{run} holds a model of `patchscan train`, which would be lost: choose another folder")


def _is_trained(run: Path) -> bool:
    """Whether the folder's card names the recipe that its model was trained by."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return "epochs" in json.loads((run / CARD_FILE).read_text("utf-8"))["training"]["recipe"]
    return False
