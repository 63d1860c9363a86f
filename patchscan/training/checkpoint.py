"""Read and write a run's files, in a folder or at an s3:// URL, where a pod that is moved to another node finds them.

All files are written atomically.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from patchscan.common.errors import UserError
from patchscan.common.files import atomic_write
from patchscan.dataset.source import DataError
from patchscan.detector.card import CARD_FILE, WEIGHTS_FILE
from patchscan.storage import open_store
from patchscan.storage.store import Store, is_bucket
from patchscan.training.run_folder import CHECKPOINT_FILE
from patchscan.training.run_log import LOG_FILE

# Holds the name of the training that writes the run: the one that came last.
OWNER_FILE = "training-id"
# What is in a checkpoint besides the learner's state.
CHECKPOINT_KEYS = {"recipe", "data_digest", "rng", "epoch", "step", "best"}
# The files that a resumed run reads or appends to.
RESUME_FILES = (CHECKPOINT_FILE, WEIGHTS_FILE, LOG_FILE, CARD_FILE, "features_before.npz")


class RunTakenError(UserError):
    """Another training has begun to write the same run."""


class RunStore:
    """The files of one run. They are written to `folder`; if the run's location is an s3:// URL, that is a temporary
    folder, and `push` uploads them to `url`."""

    def __init__(self, location: str):
        self.url = location
        self._id = ""
        self._remote: Store | None = None
        if is_bucket(location):
            self._remote = open_store(location)
            self._scratch = tempfile.TemporaryDirectory(prefix="patchscan-run-")
            self.folder = Path(self._scratch.name)
            for name in RESUME_FILES:
                if (data := self._remote.read(name)) is not None:
                    (self.folder / name).write_bytes(data)
        else:
            self.folder = Path(location)
            self.folder.mkdir(parents=True, exist_ok=True)

    def own(self, name: str) -> None:
        """Note that from now on the training of this name writes the run; one of another name that has written it so
        far ends when it next writes to it."""
        self._id = name
        if self._remote is not None:
            self._remote.write(OWNER_FILE, self._id.encode())
            return
        with atomic_write(self.folder / OWNER_FILE) as file:
            file.write_text(self._id)

    def check_owner(self) -> None:
        """Raise RunTakenError where another training has come since; the weights and the card of two would mix."""
        path = self.folder / OWNER_FILE
        written = self._remote.read(OWNER_FILE) if self._remote else path.read_bytes() if path.exists() else None
        if self._id and written is not None and written.decode() != self._id:
            raise RunTakenError(f"another training writes {self.url}: give one of them another --run (in a Job: RUN)")

    def push(self, *names: str) -> None:
        """Upload these files (default: all files of the run) to the run's URL; does nothing for a folder. Raises
        RunTakenError where another training has begun to write this run."""
        if self._remote is not None:
            self.check_owner()
            everything = (str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())
            self._upload(*(names or everything))

    def _upload(self, *names: str) -> None:
        if self._remote is not None:
            for name in names:
                self._remote.write(name, (self.folder / name).read_bytes())

    def save_weights(self, state: dict[str, torch.Tensor]) -> None:
        """Write and upload a model's tensors by name, replacing the previous ones. Raises RunTakenError as `push`."""
        self.check_owner()
        write_weights(self.folder, state)
        self._upload(WEIGHTS_FILE)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write and upload the checkpoint (tensors and plain values only), replacing the previous one, and the log.
        Raises RunTakenError as `push`."""
        self.check_owner()
        with atomic_write(self.folder / CHECKPOINT_FILE) as partial, partial.open("wb") as file:
            torch.save(state, file)
        self._upload(CHECKPOINT_FILE, LOG_FILE)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Read the last checkpoint; None for a new run. Raises DataError where the file is none, or the weights that
        belong to it are gone."""
        path = self.folder / CHECKPOINT_FILE
        if not path.exists():
            return None
        anew = f"remove {self.url}/{CHECKPOINT_FILE} to begin this run anew, or choose another --run"
        try:
            with path.open("rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch raises pickle, zip and runtime errors alike
            raise DataError(f"{path} is damaged, or no checkpoint: {anew}") from error
        if not isinstance(state, dict) or not state.keys() >= CHECKPOINT_KEYS:
            raise DataError(f"{path} is no checkpoint of `patchscan train`: {anew}")
        if state["best"]["epoch"] >= 0 and not (self.folder / WEIGHTS_FILE).exists():
            raise DataError(f"{self.url} lacks {WEIGHTS_FILE}, the weights of its best epoch so far: {anew}")
        return state


def write_weights(run: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a model's tensors by name as `model.safetensors` of a run folder."""
    with atomic_write(run / WEIGHTS_FILE) as file:
        save_file({key: value.contiguous().cpu() for key, value in state.items()}, file)
