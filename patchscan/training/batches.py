"""Make training batches: decode, augment and crop images, in an order that a resumed run continues exactly."""

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling
from torch.utils.data import DataLoader, Dataset, Sampler

from patchscan.common.errors import EXIT_INTERRUPTED, UserError
from patchscan.common.processes import end_with_parent
from patchscan.dataset.source import DataSource, telling_of_changes
from patchscan.detector.images import RGBImage, decode
from patchscan.detector.patches import seed_from_pixels
from patchscan.detector.presets import PatchPreset, with_fixed_count
from patchscan.training.augment import augment, deliver, random_region, stored
from patchscan.training.distributed import stop_signals_blocked
from patchscan.training.recipe import Recipe
from patchscan.training.synthetic import synthetic_fake

# Images of a batch that is only evaluated, by device. On a CPU a batch of 64 takes SSP ten seconds and more, which a
# signal would have to wait for, and is not faster.
EVALUATION_BATCH = {"cuda": 64, "cpu": 8}


class CropDataset(Dataset[tuple[torch.Tensor, int]]):
    """A dataset with one item per image: crops uint8 (count, size, size, 3) and the label.

    With `epoch` set, crops, flips and augmentation depend on (seed, epoch, item) only, not on the worker process; an
    item is a row or, where EpochBatches draws a row again, the row plus a multiple of the number of rows.
    With `epoch` None (the default) the crops are those that evaluation and serving use for the same picture, except
    that every image has `count` of them.
    """

    def __init__(self, source: DataSource, rows: pd.DataFrame, recipe: Recipe, epoch: int | None = None):
        self.source, self.recipe, self.epoch = source, recipe, epoch
        self.paths: list[str] = rows.path.tolist()
        self.labels: list[int] = rows.label.tolist()
        self.photo_rows = np.flatnonzero(rows.label.to_numpy() == 0)
        self.preset = self.train_preset = with_fixed_count(recipe.preset)
        if recipe.train_crops and isinstance(self.preset, PatchPreset):
            self.train_preset = replace(self.preset, count=recipe.train_crops)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, items: list[int]) -> list[tuple[torch.Tensor, int]] | UserError:
        """The items of a batch, or what is wrong with one: torch would hand an error on as a loader process's whole
        traceback, and Loader raises it in the main process."""
        try:
            return [self[item] for item in items]
        except UserError as error:
            return error

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        row = item % len(self)
        if self.epoch is None:
            pillow = self._decode(row)[1].pillow
            crops = self.preset.crops(pillow, seed_from_pixels(pillow)).pixels
        else:
            random = np.random.RandomState(zlib.crc32(f"{self.recipe.seed}/{self.epoch}/{item}".encode()))
            crops = self._training_crops(row, random)
        return torch.tensor(np.ascontiguousarray(crops)), self.labels[row]

    def _decode(self, row: int) -> tuple[bytes, RGBImage]:
        with telling_of_changes(self.paths[row]):
            data = self.source.read(self.paths[row])
            return data, decode(data)

    def _training_crops(self, row: int, random: np.random.RandomState) -> np.ndarray:
        recipe = self.recipe
        if self.labels[row] and random.random_sample() < recipe.synthetic:
            data, photo = self._decode(int(random.choice(self.photo_rows)))
            rgb = compressed_like(data, synthetic_fake(_random_window(photo.rgb, recipe.window, random), random))
        else:
            rgb = _random_window(self._decode(row)[1].rgb, recipe.window, random)
        if recipe.delivery:
            crops = np.stack([deliver(rgb, recipe.delivery, random) for _ in range(recipe.crops_per_image)])
            return flipped(crops, recipe.flip, random)
        if recipe.augment:
            rgb = augment(rgb, recipe.augment, random)
        crops = self.train_preset.crops(rgb, int(random.randint(2**31))).pixels
        return flipped(crops, recipe.flip, random)


def _random_window(rgb: np.ndarray, side: int | None, random: np.random.RandomState) -> np.ndarray:
    """A random `side` x `side` part of the image; all of it if it is smaller or `side` is None."""
    if side is None or min(rgb.shape[:2]) <= side:
        return rgb
    return random_region(rgb, side, side, random)


def compressed_like(data: bytes, rgb: np.ndarray) -> np.ndarray:
    """Compress and decode `rgb` as the encoded file `data` was: same JPEG tables and subsampling. No change if `data`
    is no JPEG.

    Without this, a model could recognise a fake made from a photograph by its missing compression.
    """
    original = Image.open(io.BytesIO(data))
    if not isinstance(original, JpegImageFile):
        return rgb
    tables, subsampling = original.quantization, get_sampling(original)
    return np.asarray(stored(Image.fromarray(rgb), "JPEG", qtables=tables, subsampling=subsampling))


def flipped(crops: np.ndarray, flip: str, random: np.random.RandomState) -> np.ndarray:
    """Flip crops (count, size, size, 3) at random; flip: `none`, `horizontal`, or `all` 8 symmetries of a square."""
    if flip != "none" and random.random_sample() < 0.5:
        crops = crops[:, :, ::-1]
    if flip == "all" and random.random_sample() < 0.5:
        crops = crops[:, ::-1]
    if flip == "all" and random.random_sample() < 0.5:
        crops = crops.transpose(0, 2, 1, 3)
    return crops


class EpochBatches(Sampler[list[int]]):
    """The items of one epoch's batches, for process `rank` of `world`.

    The rows are permuted by (seed, epoch) and cut into batches of `batch_size`; each process gets every `world`-th item
    of a batch. A last, smaller batch is dropped unless it is the only one. `start` skips batches already trained on.
    With `sampling` as many rows are drawn by it instead, some of them several times.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        sampling: "BalancedSampling | None" = None,
    ):
        self.rows, self.batch_size, self.seed, self.rank, self.world = rows, batch_size, seed, rank, world
        self.sampling = sampling
        self.epoch = self.start = 0

    @property
    def per_epoch(self) -> int:
        """Batches per epoch."""
        return max(1, self.rows // self.batch_size)

    def __len__(self) -> int:
        return self.per_epoch - self.start

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.RandomState(zlib.crc32(f"{self.seed}/{self.epoch}".encode()))
        order = self.sampling.draw(self.rows, random) if self.sampling else random.permutation(self.rows)
        for batch in range(self.start, self.per_epoch):
            items = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield items[self.rank :: self.world].tolist()


class BalancedSampling:
    """Draw rows so that half of them are real, and generators and kinds by the root of their number of images.

    rows: columns `generator` and `label`. A kind is a generator without fakes; `kinds_share` of the real draws are of
    kinds, where that is given and there are any.
    """

    def __init__(self, rows: pd.DataFrame, kinds_share: float | None):
        label = rows.label.to_numpy()
        weights = rows.groupby(["generator", "label"]).label.transform("size").to_numpy() ** -0.5
        of_kinds = is_kind(rows)
        if kinds_share and of_kinds.any():
            others = (label == 0) & ~of_kinds
            weights[of_kinds] *= kinds_share / weights[of_kinds].sum()
            weights[others] *= (1 - kinds_share) / weights[others].sum()
        self._classes = [np.flatnonzero(label == value) for value in (0, 1)]
        self._cumulative = [np.cumsum(weights[rows_of_class]) for rows_of_class in self._classes]

    def draw(self, count: int, random: np.random.RandomState) -> np.ndarray:
        """Draw `count` items, in random order: a row, plus `count` for each time that it was drawn before."""
        found = []
        for number, rows, cumulative in zip(
            (count - count // 2, count // 2), self._classes, self._cumulative, strict=True
        ):
            places = np.searchsorted(cumulative, random.random_sample(number) * cumulative[-1], side="right")
            found.append(rows[np.minimum(places, len(rows) - 1)])
        drawn = pd.Series(random.permutation(np.concatenate(found)))
        return (drawn + count * drawn.groupby(drawn).cumcount()).to_numpy()


def is_kind(rows: pd.DataFrame) -> np.ndarray:
    """Which rows are of a kind of real images: a `generator` without fakes, `label` 0 only. Returns bool (n,)."""
    return (rows.groupby("generator").label.transform("max") == 0).to_numpy()


def collate(items: list[tuple[torch.Tensor, int]] | UserError) -> tuple[torch.Tensor, torch.Tensor] | UserError:
    """Join items into crops uint8 (n * count, size, size, 3) and labels float32 (n * count,), one for each crop."""
    if isinstance(items, UserError):
        return items
    joined = torch.cat([crops for crops, _ in items])
    labels = torch.tensor([label for crops, label in items for _ in range(len(crops))], dtype=torch.float32)
    return joined, labels


class LoaderDiedError(UserError):
    """A process that loads images was killed; the run goes on from its last checkpoint."""

    exit_code = EXIT_INTERRUPTED


@contextmanager
def deaths_of_loaders_told() -> Iterator[None]:
    """Raise LoaderDiedError for the error that torch raises, anywhere in the block, when a loader process dies."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise LoaderDiedError(
            f"a process that loads images died ({str(error).strip()}): finished work is kept; run the same command "
            "again, with fewer --workers if memory was short, or --workers 0 if /dev/shm is small"
        ) from error


class Loader(DataLoader[tuple[torch.Tensor, int]]):
    """A DataLoader whose worker processes ignore SIGTERM and Ctrl-C, so that the parent can write a checkpoint when a
    signal is sent to the whole process group. They end with the iteration, whatever ends it, and with the parent."""

    def __init__(self, images: CropDataset, **options: Any):
        super().__init__(images, worker_init_fn=_init_worker, collate_fn=collate, **options)

    def __iter__(self) -> Any:
        # Workers inherit the blocked signals. Blocking them inside the worker would be too late: torch installs its
        # own handler, which ends the worker, before any of our code runs.
        with stop_signals_blocked():
            batches = super().__iter__()
        return self._raise_errors(batches)

    def _raise_errors(self, batches: Any) -> Iterator[Any]:
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        finally:
            if self.num_workers:
                # Python ends what is left at exit with SIGTERM, which they ignore, and would wait for them for ever.
                batches._shutdown_workers()


def _init_worker(worker: int) -> None:
    """End with the parent. torch's own watch compares the parent's id with what it was when the watch began: where the
    parent was killed while its worker started, the worker would wait for work for ever."""
    end_with_parent()


def training_loader(images: CropDataset, batches: EpochBatches, workers: int, pin_memory: bool) -> Loader:
    """Load the `batches` of `images` ahead of training, in `workers` processes."""
    return Loader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        # A separate generator, because the loader must not advance torch's random state, which a resume restores.
        generator=torch.Generator().manual_seed(0),
    )


def evaluation_loader(
    source: DataSource, rows: pd.DataFrame, recipe: Recipe, workers: int, device: torch.device
) -> Loader:
    """Load the rows in order, in batches for `device`, with crops as `CropDataset` says."""
    return Loader(CropDataset(source, rows, recipe), batch_size=EVALUATION_BATCH[device.type], num_workers=workers)
