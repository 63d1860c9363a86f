"""Check a training Job's settings in seconds, before its data is copied: whatever would end the training at its start.

    DATA=s3://data/genimage SEEN=biggan DEVICE=cuda ... python -m patchscan.training.settings ssp DATA COPY

Settings are the environment variables of training/job.sh. DATA is what lists the images: the setting of that name or,
once it is whole, its copy in the folder COPY. Weights that come with the data may lie there.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from patchscan.common.console import user_errors_told
from patchscan.common.errors import UserError
from patchscan.dataset.layout import CLASSES, SPLITS, find_files, generators_for_people, taken_by_reports
from patchscan.detector.device import DeviceError, check_device
from patchscan.evaluation.quality import Bound, parse_bounds
from patchscan.storage.reach import check_reach
from patchscan.storage.store import is_bucket
from patchscan.training.checkpoint import RunStore
from patchscan.training.recipe import Recipe, load_recipe, split_names

# Settings that may not be empty.
PLACES = ("RUN", "MODEL_STORE", "VERSIONS", "REPORT")
NEEDED = ("DATA", "SEEN", "EPOCHS", "DEVICE", "LOADERS", *PLACES)
# Those that may, or need not be there.
OPTIONAL = ("UNSEEN", "WEIGHTS", "ENGINE", "MIN_METRIC", "NODES", "GPUS", "SERVICE")
# The splits and classes that each generator has files of.
Classes = dict[str, set[tuple[str, str]]]


class SettingError(UserError):
    """A setting cannot be what was meant; the message names it."""


def check_settings(recipe: str, settings: Mapping[str, str], data: str, copy: Path) -> None:
    """Check the settings of a training with this recipe on `data`, which lies in the folder `copy` or will go there.

    Raises SettingError, BoundError, RecipeError, DeviceError, LayoutError, DataError, StoreError; OutageError where a
    store does not answer.
    """
    for name in (*NEEDED, *OPTIONAL):
        value = settings.get(name, "")
        if value != value.strip():
            raise SettingError(f"{name} {value!r}: it begins or ends with white space, such as a line break")
        if name in NEEDED and not value:
            raise SettingError(f"{name} is empty")
    epochs, nodes = _number(settings, "EPOCHS", 1), _number(settings, "NODES", 1)
    gpus, _ = _number(settings, "GPUS", 1), _number(settings, "LOADERS", 0)
    weights = settings.get("WEIGHTS") or None
    seen, unseen = (split_names(settings.get(name, "")) for name in ("SEEN", "UNSEEN"))
    chosen = load_recipe(recipe, seen=seen, unseen=unseen, weights=weights, epochs=epochs)
    if chosen.batch_size % (nodes * gpus):
        raise SettingError(
            f"NODES {nodes} with GPUS {gpus}: the recipe's batch of {chosen.batch_size} cannot be divided by "
            f"{nodes * gpus}"
        )
    check_device(settings["DEVICE"])
    if settings["DEVICE"] == "cuda" and (found := torch.cuda.device_count()) < gpus:
        raise DeviceError(f"GPUS {gpus}: this pod has {found}; set its limit of nvidia.com/gpu to the same number")
    for name in PLACES:
        check_reach(settings[name])
    _check_run(chosen, settings["RUN"])
    _check_weights(chosen, None if data == str(copy) else copy)
    bounds = parse_bounds(text) if (text := settings.get("MIN_METRIC")) else []
    classes: Classes = defaultdict(set)
    for file in find_files(data, copy.name if is_bucket(data) else "").files:
        classes[file.generator].add((file.split, file.label))
    _check_generators(chosen, data, classes)
    _check_bounds(bounds, chosen, data, classes)


def _number(settings: Mapping[str, str], name: str, least: int) -> int:
    text = settings.get(name) or "1"
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise SettingError(f"{name} {text}: it must be a whole number of at least {least}")
    return int(text)


def _check_run(recipe: Recipe, run: str) -> None:
    """Raise SettingError where RUN holds a run that was begun with other settings, DataError where its checkpoint is
    damaged."""
    begun = RunStore(run).load_checkpoint()
    if begun is None or recipe.is_that_of(begun["recipe"]):
        return
    before, now = json.loads(begun["recipe"]), json.loads(recipe.model_dump_json())
    changed = ", ".join(sorted(name for name, value in now.items() if before.get(name, value) != value))
    raise SettingError(
        f"RUN {run} was begun with another recipe ({changed} differ): take another RUN, or set them back"
    )


def _check_weights(recipe: Recipe, later: Path | None) -> None:
    """Raise SettingError where the file of the initial weights is not there, and not in the folder that comes later."""
    if recipe.weights in ("imagenet", "none"):
        return
    file = Path(recipe.weights)
    if not file.is_file() and not (later and file.is_relative_to(later)):
        raise SettingError(f"WEIGHTS {recipe.weights}: there is no such file; write imagenet, none or a file's path")


def _check_generators(recipe: Recipe, data: str, found: Classes) -> None:
    """Raise SettingError where the data lack a generator that is to be trained on or kept for the evaluation, or have
    one that no report could name."""
    if taken := taken_by_reports(found):
        raise SettingError(f"DATA: {taken}")
    for setting, generators in (("SEEN", recipe.seen), ("UNSEEN", recipe.unseen)):
        for generator in generators:
            if generator not in found:
                raise SettingError(
                    f"{setting}: {data} holds no generator {generator}; there are {generators_for_people(found)}"
                )
    for generator in recipe.seen:
        missing = [
            f"{split}/{label}" for split in SPLITS for label in CLASSES if (split, label) not in found[generator]
        ]
        if missing:
            raise SettingError(f"SEEN: {generator} in {data} has no images in {', '.join(missing)}")
    for generator in recipe.unseen:
        if not any(("val", label) in found[generator] for label in CLASSES):
            raise SettingError(f"UNSEEN: {generator} in {data} has no images in val, which the evaluation measures")


def _check_bounds(bounds: list[Bound], recipe: Recipe, data: str, found: Classes) -> None:
    """Raise SettingError where the evaluation of these data will not have what a bound asks for."""
    groups = {"seen": set(recipe.seen), "unseen": found.keys() - set(recipe.seen), "overall": set(found)}
    for bound in bounds:
        members = groups.get(bound.group, {bound.group})
        classes = {label for name in members & found.keys() for split, label in found[name] if split == "val"}
        if not classes:
            raise SettingError(
                f"MIN_METRIC: {data} has no val images of {bound.group}; there are seen, unseen, overall, "
                f"{generators_for_people(found)}"
            )
        if missing := [f"val/{label}" for label in bound.classes if label not in classes]:
            raise SettingError(f"MIN_METRIC: {bound.metric} of {bound.group} needs images in {', '.join(missing)}")


if __name__ == "__main__":
    with user_errors_told():
        check_settings(sys.argv[1], os.environ, sys.argv[2], Path(sys.argv[3]))
