"""Find the folders that come with the code but are not Python packages: `handlers`, `training`, `model_store`."""

from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def shipped(folder: str) -> Path:
    """Return the path of such a folder: beside the package in a checkout, inside it in a wheel."""
    installed = PACKAGE / "shipped" / folder
    return installed if installed.is_dir() else PACKAGE.parent / folder


def find_run(text: str) -> Path:
    """Return the run folder of this path, or else of the detector of this name that comes with the code: `starter`."""
    ours = shipped("model_store") / text
    return ours if not Path(text).exists() and (ours / "card.json").exists() else Path(text)


def is_shipped(run: Path) -> bool:
    """Return whether this run folder is one of the detectors that come with the code."""
    return run.resolve().parent == shipped("model_store").resolve()
