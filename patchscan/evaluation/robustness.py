"""Measure a detector's robustness: its AUC and detection rates on the same images after JPEG, double JPEG, blur,
resizing, cropping, noise and screenshots."""

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

from patchscan.dataset.sources import SOURCE_COLUMNS
from patchscan.detector.card import Card
from patchscan.detector.images import ImageError, decode
from patchscan.detector.patches import seed_from_pixels
from patchscan.evaluation.calibration import decide
from patchscan.evaluation.scoring import cluster_of, score_images, usable
from patchscan.reporting.statistics import auc_difference, auc_interval, proportion_among

if TYPE_CHECKING:
    from patchscan.detector.base import BaseDetector

UNDISTURBED = "undisturbed"


Encode = Callable[[Image.Image, float, np.random.Generator], bytes]


@dataclass(frozen=True)
class Disturbance:
    """One change to an image: `family` and `level` give its place on a curve, `label` names it; `encode` makes the
    disturbed file from the decoded image, the level and a random generator."""

    family: str
    level: float
    label: str
    encode: Encode

    def disturb(self, data: bytes) -> bytes:
        """Disturb an encoded image, in the same way every time. Bytes that are not an image are returned unchanged."""
        try:
            rgb = decode(data).rgb
        except ImageError:
            return data
        return self.encode(Image.fromarray(rgb), self.level, np.random.default_rng(seed_from_pixels(rgb)))


def jpeg(image: Image.Image, quality: float) -> bytes:
    """Encode as JPEG, with the chroma subsampling (4:2:0) that cameras and messengers use."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality), subsampling=2)
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    """Encode without loss, so that only the disturbance changes the pixels."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def scaled(image: Image.Image, factor: float) -> Image.Image:
    """Resize both sides by `factor`, bicubic."""
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Cut out the middle of the image, `share` of each side."""
    width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def noisy(image: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    """Add Gaussian noise with a standard deviation of `deviation` grey levels to every sample."""
    pixels = np.asarray(image) + rng.normal(0, deviation, (image.height, image.width, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def blurred(image: Image.Image, sigma: float) -> Image.Image:
    """Apply a Gaussian blur of `sigma` pixels."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def double_jpeg(image: Image.Image, first: float) -> bytes:
    """Encode as JPEG at quality `first`, decode, and encode as JPEG at 90."""
    return jpeg(Image.open(io.BytesIO(jpeg(image, first))), 90)


def screenshot(image: Image.Image, quality: float) -> bytes:
    """Imitate a screenshot: enlarge 1.25 times, as on a scaled desktop, and cut off 3 pixels at the left and top, so
    that the JPEG grid moves. Encode as PNG; if `quality` is not 0, reduce to 0.8 and encode as JPEG instead."""
    shown = image.resize((round(image.width * 1.25), round(image.height * 1.25)), Image.Resampling.BILINEAR)
    taken = shown.crop((min(3, shown.width - 1), min(3, shown.height - 1), shown.width, shown.height))
    return jpeg(scaled(taken, 0.8), quality) if quality else png(taken)


FAMILIES: dict[str, tuple[str, tuple[float, ...], Encode]] = {
    "jpeg": ("JPEG quality {}", (95, 85, 75, 60, 45, 30), lambda image, level, _: jpeg(image, level)),
    "double jpeg": ("JPEG {}, then 90", (90, 75, 50), lambda image, level, _: double_jpeg(image, level)),
    "blur": ("blur of {} pixels", (0.5, 1, 2), lambda image, level, _: png(blurred(image, level))),
    "resize": ("resized {} x", (0.5, 0.75, 1.5, 2), lambda image, level, _: png(scaled(image, level))),
    "crop": ("middle {} of each side", (0.75, 0.5), lambda image, level, _: png(cropped(image, level))),
    "noise": ("noise of {} grey levels", (2, 5, 10), lambda image, level, rng: png(noisy(image, level, rng))),
    "screenshot": ("screenshot, sent as JPEG {}", (0, 75), lambda image, level, _: screenshot(image, level)),
}


def disturbances() -> list[Disturbance]:
    """Return all disturbances that are measured."""
    return [
        Disturbance(family, level, label.format(level).replace(", sent as JPEG 0", ", PNG"), encode)
        for family, (label, levels, encode) in FAMILIES.items()
        for level in levels
    ]


def measure_robustness(
    detector: "BaseDetector",
    read: Callable[[str], bytes],
    images: pd.DataFrame,
    kinds: list[Disturbance] | None = None,
) -> dict[str, Any]:
    """Score `images` (columns path, generator, split, class, and those of `add_sources`) undisturbed and under every
    disturbance; `read` returns the encoded bytes of a path.

    Returns what the card stores: the card's digest, the number of images, and one row per disturbance and group
    ('seen', 'unseen') with the AUC, its paired difference to the undisturbed AUC, and the detection rates at the card's
    threshold.
    """
    card = detector.card
    sources = {name: images[name].to_numpy() for name in SOURCE_COLUMNS if name in images}

    def score(label: str, read: Callable[[str], bytes]) -> pd.DataFrame:
        return score_images(detector, read, images, f"robustness of {card.name}, {label}").assign(**sources)

    undisturbed = score(UNDISTURBED, read)
    rows = _rows(card, UNDISTURBED, 0, UNDISTURBED, undisturbed, undisturbed)
    for kind in kinds or disturbances():
        table = score(kind.label, partial(_disturbed, kind, read))
        rows += _rows(card, kind.family, kind.level, kind.label, table, undisturbed)
    return {"digest": card.digest, "images": len(images), "rows": rows}


def _disturbed(kind: Disturbance, read: Callable[[str], bytes], path: str) -> bytes:
    return kind.disturb(read(path))


def _rows(
    card: Card, family: str, level: float, label: str, table: pd.DataFrame, undisturbed: pd.DataFrame
) -> list[dict[str, Any]]:
    seen = table.generator.isin(card.training.get("seen", []))
    good = usable(table) & usable(undisturbed)
    rows = []
    for group, inside in (("seen", seen & good), ("unseen", ~seen & good)):
        part, before = table[inside], undisturbed.logit[inside].to_numpy()
        if part.empty:
            continue
        truth, logit, cluster = part.label.to_numpy(), part.logit.to_numpy(), cluster_of(part)
        change = None if table is undisturbed else auc_difference(truth, logit, before, cluster)
        right = decide(logit, card.decision).says_ai == (truth == 1)
        rows.append(
            {
                "family": family,
                "level": level,
                "label": label,
                "group": group,
                "images": len(truth),
                "auc": asdict(auc_interval(truth, logit, cluster=cluster)),
                "auc_change": asdict(change) if change else None,
                "fake_detection": asdict(proportion_among(right, truth == 1, cluster)),
                "real_detection": asdict(proportion_among(right, truth == 0, cluster)),
            }
        )
    return rows
