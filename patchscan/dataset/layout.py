"""Read GenImage's folder layout: find a data set's files, and the generator, split and class of each."""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from patchscan.common.errors import UserError
from patchscan.storage import open_store
from patchscan.storage.folder import key_of
from patchscan.storage.store import is_bucket, split_url

SPLITS = ("train", "val")
CLASSES = ("ai", "nature")

UNREADABLE = -1

# The folder names of GenImage's downloads, simplified by `_simplify`, and the generators' names.
_GENERATORS = {
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
class SourceFile:
    """One file of a data set: `path` is relative to its root, with forward slashes; `bytes` is its size."""

    path: str
    generator: str
    split: str
    label: str
    bytes: int
    modified_ns: int  # UNREADABLE: a link to nothing, a pipe, a device, or (`path` ends in `/`) a folder without rights


def generator_name(folder: str) -> str:
    """Return the generator of a folder: `imagenet_ai_0419_sdv4` is `sd_v1_4`; a name that GenImage does not use is
    kept."""
    return _GENERATORS.get(_simplify(folder), folder)


def _simplify(folder: str) -> str:
    name = re.sub(r"^imagenet_(ai_)?(\d{4}_)?", "", folder.lower())
    return re.sub(r"[^a-z0-9]", "", name)


def find_files(data: str | Path) -> list[SourceFile]:
    """Find every file under `<generator>/{train,val}/{ai,nature}`, sorted by path; hidden files are left out.

    `data` is a folder or an s3:// URL. The generator's folder may be `data` itself, a folder in it, or one level deeper
    as GenImage's archives unpack (`BigGAN/imagenet_ai_0419_biggan/train/...`). Raises LayoutError where there is no
    such folder or no file, StoreError where the bucket cannot be listed.
    """
    listed = _in_bucket(str(data)) if is_bucket(data) else _in_folder(Path(data))
    name = Path(data).resolve().name
    files = [
        SourceFile(path, *classified, size, modified_ns)
        for path, size, modified_ns in listed
        if (classified := classify_path(path, name)) is not None
    ]
    if not files:
        raise LayoutError(
            f"{data} holds no image under <generator>/{{train,val}}/{{ai,nature}}: is it the right folder?"
        )
    return sorted(files, key=lambda file: file.path)


def classify_path(path: str, root: str) -> tuple[str, str, str] | None:
    """Return generator, split and class of the file at `path`, which is relative to the data set's folder; that
    folder's own name is `root`. None where the path is not in the layout or is hidden."""
    parts = path.split("/")
    if any(part.startswith(".") for part in parts):
        return None
    for depth, (split, label) in enumerate(pairwise(parts[:4])):
        if split in SPLITS and label in CLASSES and len(parts) > depth + 2:
            return generator_name(parts[depth - 1] if depth else root), split, label
    return None


def _in_folder(data: Path) -> Iterator[tuple[str, int, int]]:
    """Yield path, bytes and modification time (ns) of the files below a folder; links to folders are followed."""
    if not data.is_dir():
        raise LayoutError(f"{data} is not a folder: give the folder that holds <generator>/{{train,val}}/{{ai,nature}}")
    closed: list[OSError] = []
    for parent, folders, names in os.walk(data, onerror=closed.append, followlinks=True):
        above = Path(parent).relative_to(data).parts
        folders[:] = [name for name in folders if not name.startswith(".") and _may_contain_images((*above, name))]
        for name in names:
            path = key_of(Path(*above, name))
            if classify_path(path, "") is not None:
                yield path, *_size_and_time(Path(parent, name))
    for error in closed:
        path = f"{key_of(Path(error.filename).relative_to(data))}/"
        if classify_path(path, "") is None:
            raise LayoutError(f"{error.filename} cannot be listed: {error.strerror}")
        yield path, 0, UNREADABLE


def _size_and_time(path: Path) -> tuple[int, int]:
    """A file's bytes and modification time (ns); 0 and UNREADABLE where it is none that can be read."""
    try:
        status = path.stat()
    except OSError:
        return 0, UNREADABLE
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (0, UNREADABLE)


def _may_contain_images(folder: tuple[str, ...]) -> bool:
    """Whether this folder, or one below it, may contain images of the data set; others are not walked."""
    return len(folder) <= 2 or any(
        split in SPLITS and (not label or label[0] in CLASSES)
        for split, *label in (folder[depth : depth + 2] for depth in range(3))
    )


def _in_bucket(url: str) -> Iterator[tuple[str, int, int]]:
    root = split_url(url)[1].rstrip("/")
    for info in open_store(url.rstrip("/") + "/").objects():
        modified_ns = round(info.last_modified.timestamp() * 1e9) if info.last_modified else 0
        yield info.key.removeprefix(root).lstrip("/"), info.size or 0, modified_ns
