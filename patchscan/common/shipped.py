"""Folders that come with the code but are no Python packages: `handlers`, `training` (recipes) and `model_store`."""

from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def shipped(folder: str) -> Path:
    """The path of a folder that comes with the code: beside the package in a checkout, inside it in a wheel."""
    installed = PACKAGE / "shipped" / folder
    return installed if installed.is_dir() else PACKAGE.parent / folder
