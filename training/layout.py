"""GenImage's folder layout: which generator, split and class each file of a data set belongs to."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from detector.errors import UserError

SPLITS = ("train", "val")
CLASSES = ("ai", "nature")

# The names of GenImage's own downloads, with the dates and spellings they carry, after `_normal`.
_KNOWN = {
    "adm": "adm",
    "biggan": "biggan",
    "glide": "glide",
    "midjourney": "midjourney",
    "sdv4": "sd_v1_4",
    "sdv14": "sd_v1_4",
    "stablediffusionv14": "sd_v1_4",
    "sdv5": "sd_v1_5",
    "sdv15": "sd_v1_5",
    "stablediffusionv15": "sd_v1_5",
    "vqdm": "vqdm",
    "wukong": "wukong",
}


class LayoutError(UserError):
    """A folder that is not in GenImage's layout."""


@dataclass(frozen=True)
class Source:
    """One file of a data set: `path` is relative to its root, with forward slashes; size in bytes, time in ns."""

    path: str
    generator: str
    split: str
    label: str
    bytes: int
    modified_ns: int


def generator_name(folder: str) -> str:
    """The generator a folder stands for: `imagenet_ai_0419_sdv4` is `sd_v1_4`; a name not of GenImage's is kept."""
    return _KNOWN.get(_normal(folder), folder)


def _normal(folder: str) -> str:
    name = re.sub(r"^imagenet_(ai_)?(\d{4}_)?", "", folder.lower())
    return re.sub(r"[^a-z0-9]", "", name)


def find_sources(data: Path) -> list[Source]:
    """Every file under `<generator>/{train,val}/{ai,nature}`, sorted by path; hidden files are left out.

    The generator's folder may be `data` itself, a folder in it, or one level deeper as GenImage's archives unpack
    (`BigGAN/imagenet_ai_0419_biggan/train/...`). Raises LayoutError where there is no such folder or no file.
    """
    if not data.is_dir():
        raise LayoutError(f"{data} is not a folder: give the folder that holds <generator>/{{train,val}}/{{ai,nature}}")
    sources = [
        source
        for folder in _generator_folders(data)
        for split in SPLITS
        for label in CLASSES
        for source in _files(data, folder, split, label)
    ]
    if not sources:
        raise LayoutError(
            f"{data} holds no image under <generator>/{{train,val}}/{{ai,nature}}: is it the right folder?"
        )
    return sorted(sources, key=lambda source: source.path)


def _generator_folders(data: Path) -> Iterator[Path]:
    for folder in (data, *data.glob("*"), *data.glob("*/*")):
        if any((folder / split / label).is_dir() for split in SPLITS for label in CLASSES):
            yield folder


def _files(data: Path, folder: Path, split: str, label: str) -> Iterator[Source]:
    generator = generator_name(folder.resolve().name if folder == data else folder.name)
    for parent, folders, names in os.walk(folder / split / label, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            file = Path(parent, name)
            path = file.relative_to(data).as_posix()
            try:
                path.encode()
            except UnicodeEncodeError as error:
                raise LayoutError(f"the name {path!r} is not UTF-8: rename the file") from error
            status = file.stat()
            yield Source(path, generator, split, label, status.st_size, status.st_mtime_ns)
