"""Read GenImage's folder layout: find a data set's files, and the generator, split and class of each."""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from patchscan.common.console import printable
from patchscan.common.errors import UserError
from patchscan.storage import open_store
from patchscan.storage.folder import key_of
from patchscan.storage.store import is_bucket, read_listing, split_url

SPLITS = ("train", "val")
CLASSES = ("ai", "nature")

# What other data sets call the same folders.
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "test", "testing", "dev", "eval", "evaluation"), "val"),
}
CLASS_FOLDERS = {
    **dict.fromkeys(("ai", "fake", "1_fake", "generated", "synthetic"), "ai"),
    **dict.fromkeys(("nature", "real", "0_real"), "nature"),
}
_CLASS_HELP = "a class's folder is called ai, fake, 1_fake, generated or synthetic; or nature, real or 0_real"
_MAX_DEPTH = 6  # folders that are looked at; below a class's folder, any depth is read
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".gif", ".tif"),
    *(".tiff", ".bmp", ".dib", ".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif"),
}

# How lists of labels end.
LABEL_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".parquet"}

UNREADABLE = -1

# The rows of reports that are about several generators: no generator can be called so.
POOLED = ("all seen", "all unseen", "overall")
MEANS = ("mean of seen", "mean of unseen", "mean of the kinds")
# The generator of images whose labels name none: it counts as unseen, but whether it is, nobody has said.
UNNAMED = "all"

# The folder names of GenImage's downloads, simplified by `_simplify`, and the generators' names.
_GENERATORS = {
    **{name: name for name in ("adm", "biggan", "glide", "midjourney", "vqdm", "wukong")},
    **dict.fromkeys(("sdv4", "sdv14", "stablediffusionv14"), "sd_v1_4"),
    **dict.fromkeys(("sdv5", "sdv15", "stablediffusionv15"), "sd_v1_5"),
}


class LayoutError(UserError):
    """A folder that is in no layout that can be read."""


@dataclass(frozen=True, slots=True)
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


def taken_by_reports(names: Iterable[str]) -> str | None:
    """Return what to say of a generator that is called as a row of reports, such as `overall`; None if none is."""
    taken = min({*POOLED, *MEANS}.intersection(names), default=None)
    return taken and f"reports have a row {taken} of their own: give that generator's folder another name"


def generators_for_people(names: Iterable[str]) -> str:
    """Return the generators that a message lists, sorted, with what to do about one that cannot be named in an option
    such as --unseen, which takes names with commas between them."""
    found = sorted(set(names))
    return "; ".join([", ".join(map(printable, found)) or "none", *_not_in_lists(found)])


def _not_in_lists(names: Iterable[str]) -> Iterator[str]:
    if awkward := sorted(name for name in set(names) if "," in name or name != name.strip()):
        yield (
            f"{awkward[0]!r} has a comma, or begins or ends with a blank: options that take several generators cannot "
            "name it before its folder is renamed"
        )


def data_name(data: str | Path) -> str:
    """Return what a data set is called: its folder's name, a link's own one; of `.` and `..` that of the folder that is
    meant."""
    name = Path(data).name
    return name if is_bucket(data) or name not in ("", "..") else Path(data).resolve().name


@dataclass(frozen=True)
class Layout:
    """The files of a data set, and what a person should know about how its folders were read, a sentence each."""

    files: list[SourceFile]
    notes: list[str]


def check_folder(data: str | Path) -> None:
    """Raise LayoutError where `data` is neither a bucket nor a folder."""
    if not is_bucket(data) and not Path(data).is_dir():
        raise LayoutError(f"{data} is not a folder: give the folder that holds <generator>/{{train,val}}/{{ai,nature}}")


def find_files(data: str | Path, name: str = "") -> Layout:
    """Find every file of a data set, sorted by path; hidden files are left out. `name` is what its folder will be
    called, where that is not its name now: files without a generator's folder have it.

    `data` is a folder or an s3:// URL, and the layout GenImage's, <generator>/{train,val}/{ai,nature}, or one that
    `classify_path` knows besides. Raises LayoutError where there is no such folder or no file, StoreError where the
    bucket cannot be listed.
    """
    check_folder(data)
    listed = _in_bucket(str(data)) if is_bucket(data) else _in_folder(Path(data))
    name = name or Path(data).resolve().name
    files, without_split, test, outside, others, beside = [], list[str](), 0, list[str](), list[str](), list[str]()
    for path, size, modified_ns in listed:
        place = classify_path(path, name)
        if place:
            files.append(SourceFile(path, *place[:3], size, modified_ns))
            if place.split_folder is None:
                without_split.append(path)
            test += place.split_folder is not None and place.split_folder.startswith("test")
        elif _is_beside_the_data(path):
            beside.append(path)
        else:
            suffix = PurePosixPath(path).suffix.lower()
            (outside if suffix in IMAGE_SUFFIXES or not suffix else others).append(path)
    if not files:
        raise LayoutError(_nothing_found(data, outside, [*others, *beside]))
    notes = [
        *_left_out(outside, others),
        *_read_as_val(len(without_split), test),
        *_below_generators(without_split),
        *_without_pairs(files),
        *_not_in_lists(file.generator for file in files),
    ]
    return Layout(sorted(files, key=lambda file: file.path), notes)


def _left_out(images: list[str], others: list[str]) -> Iterator[str]:
    if images:
        yield f"LEFT OUT: {_images(len(images))} in no folder that names a class, such as {min(images)}: {_CLASS_HELP}"
    if others:
        yield (
            f"LEFT OUT: {len(others):,} file{'' if len(others) == 1 else 's'} in no folder that names a class, and not "
            f"called as images are, such as {min(others)}"
        )


def _read_as_val(without_split: int, test: int) -> Iterator[str]:
    if without_split:
        yield (
            f"{_images(without_split)} in no folder called train or val: read as val, which is for measuring; "
            "`patchscan split` moves a part of val to train"
        )
    if test:
        yield f"{_images(test)} in folders called test: read as val"


def _below_generators(without_split: list[str]) -> Iterator[str]:
    """What to know where the folder above the class may be what the images show, in its generator's folder, as in
    ForenSynths' `progan/airplane/0_real`: several folders have such folders in them, and one of them several."""
    inside: dict[str, set[str]] = {}
    for path in without_split:
        folders = path.split("/")
        at = next(depth for depth, folder in enumerate(folders) if folder.lower() in CLASS_FOLDERS)
        if at > 1:
            inside.setdefault("/".join(folders[: at - 1]), set()).add(folders[at - 1])
    above = [folder for folder, names in sorted(inside.items()) if len(names) > 1]
    if above and len(inside) > 1:
        yield (
            f"{', '.join(sorted(inside[above[0]])[:3])} are read as generators; if {above[0]} is one, move all into a "
            "folder called test, below which the folder on top is the generator's"
        )


def _is_beside_the_data(path: str) -> bool:
    """Whether a file is hidden, an index's, or at the top of the data set and not called an image, as a README or a
    list of labels is."""
    hidden = any(part.startswith(".") for part in path.split("/"))
    at_top = "/" not in path and PurePosixPath(path).suffix.lower() not in IMAGE_SUFFIXES
    return hidden or at_top or re.match(r"([^/]*\.)?index\.parts/", path) is not None


def _without_pairs(files: list[SourceFile]) -> Iterator[str]:
    """What to know of a data set that has both classes, but each generator one of them."""
    found = {(file.generator, file.label) for file in files}
    if len({label for _, label in found}) == 2 and len({generator for generator, _ in found}) == len(found):
        generator = min(generator for generator, label in found if label == "ai")
        yield (
            "no generator has images of both classes, which training and the AUC of a generator need: put real images "
            f"beside those of {generator}"
        )


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _nothing_found(data: str | Path, outside: list[str], others: list[str]) -> str:
    lists = [path for path in others if PurePosixPath(path).suffix.lower() in LABEL_SUFFIXES]
    labels = f"; if {min(lists)} says it, see --labels of `patchscan evaluate`" if lists and outside else ""
    seen = f"none of its {_images(len(outside))}, such as {min(outside)}, is" if outside else "no image is"
    asked = "<generator>/{train,val}/{ai,nature}"
    return f"{data} is in no layout that can be read: {seen} in {asked}. {_CLASS_HELP}{labels}"


class Place(NamedTuple):
    """Where a file lies in its data set; `split_folder` is the folder that named the split, in small letters."""

    generator: str
    split: str
    label: str
    split_folder: str | None


def classify_path(path: str, root: str) -> Place | None:
    """Return generator, split and class of the file at `path`, which is relative to the data set's folder; that
    folder's own name is `root`. None where no folder names a class, or one is hidden.

    The class is the first folder called as in CLASS_FOLDERS, in upper or lower case, or the first of them directly in a
    split's folder; the split the nearest one above it, or the first below it, called as in SPLIT_FOLDERS. The generator
    is the folder above the split (GenImage, CIFAKE), or, in `train/progan/airplane/0_real` (ForenSynths), the one in
    it; without a split above the class, the folder above the class; where there is none (`fake/stylegan/train`), the
    one in it if a split is below that.
    """
    folders = path.split("/")[:-1]
    if any(part.startswith(".") for part in path.split("/")):
        return None
    names = [folder.lower() for folder in folders[:_MAX_DEPTH]]
    classes = [depth for depth, name in enumerate(names) if name in CLASS_FOLDERS]
    if not classes:
        return None
    at = next((depth for depth in classes if depth and names[depth - 1] in SPLIT_FOLDERS), classes[0])
    splits = [depth for depth, name in enumerate(names) if name in SPLIT_FOLDERS]
    above = max((depth for depth in splits if depth < at), default=None)
    below = min((depth for depth in splits if depth > at), default=None)
    if above is not None:
        generator = folders[above + 1] if above + 1 < at else folders[above - 1] if above else root
    elif at:
        generator = folders[at - 1]
    else:
        generator = folders[1] if below is not None and below > 1 else root
    depth = below if above is None else above
    split_folder = None if depth is None else names[depth]
    split = "val" if split_folder is None else SPLIT_FOLDERS[split_folder]
    return Place(generator_name(generator), split, CLASS_FOLDERS[names[at]], split_folder)


def _in_folder(data: Path) -> Iterator[tuple[str, int, int]]:
    """Yield path, bytes and modification time (ns) of every file that is not hidden, and of folders without rights."""
    closed: list[OSError] = []
    for parent, folders, names in os.walk(data, onerror=closed.append, followlinks=True):
        above = Path(parent).relative_to(data)
        folders[:] = [
            name for name in folders if not name.startswith(".") and not _leads_back(Path(parent, name), data)
        ]
        for name in names:
            yield key_of(above / name), *_size_and_time(Path(parent, name))
    for error in closed:
        path = f"{key_of(Path(error.filename).relative_to(data))}/"
        if classify_path(path, "") is None:
            raise LayoutError(f"{error.filename} cannot be listed: {error.strerror}")
        yield path, 0, UNREADABLE


def _leads_back(folder: Path, data: Path) -> bool:
    """Whether the folder is a link to one that it lies in, or that the links above it were followed from: two that lead
    to each other would repeat every image forty times."""
    if not folder.is_symlink():
        return False
    above = [parent for parent in folder.parents if parent.is_relative_to(data)]
    return any(parent.resolve().is_relative_to(folder.resolve()) for parent in above)


def _size_and_time(path: Path) -> tuple[int, int]:
    """A file's bytes and modification time (ns); 0 and UNREADABLE where it is none that can be read."""
    try:
        status = path.stat()
    except OSError:
        return 0, UNREADABLE
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (0, UNREADABLE)


def _in_bucket(url: str) -> Iterator[tuple[str, int, int]]:
    root = split_url(url)[1].rstrip("/")
    for info in read_listing(open_store(url.rstrip("/") + "/"), list):
        modified_ns = round(info.last_modified.timestamp() * 1e9) if info.last_modified else 0
        yield info.key.removeprefix(root).lstrip("/"), info.size or 0, modified_ns
