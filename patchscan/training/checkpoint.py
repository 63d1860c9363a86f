"""Where a run lives: a folder, or an s3:// URL mirrored into a scratch folder, so that a moved pod finds its run again.

Every file appears whole or not at all.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from patchscan.common.files import atomic_write
from patchscan.detector.card import WEIGHTS_FILE
from patchscan.storage import open_store
from patchscan.storage.store import Store, is_bucket
from patchscan.training.run_log import LOG_FILE

CHECKPOINT = "checkpoint.pt"
# What a resumed run reads or appends to.
RESUMED = (CHECKPOINT, WEIGHTS_FILE, LOG_FILE, "features_before.npz")


class RunStore:
    """The run's files under `folder`; `push` copies finished files to `url`, where that is not the folder itself."""

    def __init__(self, location: str):
        self.url = location
        self._remote: Store | None = None
        if is_bucket(location):
            self._remote = open_store(location)
            self._scratch = tempfile.TemporaryDirectory(prefix="patchscan-run-")
            self.folder = Path(self._scratch.name)
            for name in RESUMED:
                if (data := self._remote.read(name)) is not None:
                    (self.folder / name).write_bytes(data)
        else:
            self.folder = Path(location)
            self.folder.mkdir(parents=True, exist_ok=True)

    def push(self, *names: str) -> None:
        """Copy these files (default: all of the run) to the run's URL; nothing to do for a folder."""
        if self._remote is not None:
            files = [path for path in self.folder.rglob("*") if path.is_file()]
            for name in names or [str(path.relative_to(self.folder)) for path in files]:
                self._remote.write(name, (self.folder / name).read_bytes())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write the checkpoint (tensors and plain values only) in place of the one before."""
        with atomic_write(self.folder / CHECKPOINT) as partial, partial.open("wb") as file:
            torch.save(state, file)
        self.push(CHECKPOINT)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, or None for a new run."""
        path = self.folder / CHECKPOINT
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def save_weights(self, name: str, state: dict[str, torch.Tensor]) -> Path:
        """Write tensors as safetensors."""
        with atomic_write(self.folder / name) as file:
            save_file({key: value.contiguous().cpu() for key, value in state.items()}, file)
            file.chmod(0o644)  # safetensors makes it private, which another user's server could not read
        return self.folder / name
