"""How an image becomes a model's input: the one place that training, evaluation, serving and scanning all use.

A preset turns RGB pixels into uint8 crops without torch, so that a scan worker can do it; `to_tensor` turns crops into
the normalised tensor a model takes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from patchscan.detector.patches import Patches, Pixels, Rule, as_pillow, choose_patches

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# A card or recipe that asks for more is mistaken or hostile.
LARGEST_SIDE, MOST_PATCHES = 1024, 1024
# Longer sides an image may have for each shorter one, where it is scored whole.
LONGEST = 16


@dataclass(frozen=True, kw_only=True)
class PatchPreset:
    """`count` patches of `size` x `size` pixels, chosen by `rule` among `candidates` draws; their logits are
    averaged."""

    kind: Literal["patch"] = "patch"
    size: int = 32
    rule: Rule = "simplest"
    candidates: int = 30
    count: int = 1

    def __post_init__(self) -> None:
        _check_side(self.size)
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, not {self.rule!r}")
        if not (1 <= self.count <= MOST_PATCHES and 1 <= self.candidates <= MOST_PATCHES):
            raise ValueError(f"count and candidates must be 1 to {MOST_PATCHES}")

    def crops(self, rgb: Pixels, seed: int) -> Patches:
        """An RGB image to crops uint8 (count, size, size, 3); the same seed gives the same crops."""
        return choose_patches(
            rgb, rule=self.rule, size=self.size, candidates=self.candidates, count=self.count, seed=seed
        )


@dataclass(frozen=True, kw_only=True)
class WholePreset:
    """The whole image: shorter side resized to `resize`, then the central `size` x `size` (torchvision's ImageNet
    evaluation preset). No randomness: the seed changes nothing."""

    kind: Literal["whole"] = "whole"
    size: int = 224
    resize: int = 256

    def __post_init__(self) -> None:
        _check_side(self.size)
        _check_side(self.resize)

    @property
    def count(self) -> int:
        """One crop an image."""
        return 1

    def crops(self, rgb: Pixels, seed: int) -> Patches:
        """An RGB image to one crop, uint8 (1, size, size, 3)."""
        left, top, pillow = _middle(as_pillow(rgb))
        scale = self.resize / min(pillow.size)
        width, height = (max(self.size, round(side * scale)) for side in pillow.size)
        resized = pillow.resize((width, height), Image.Resampling.BILINEAR)
        x, y = (resized.width - self.size) // 2, (resized.height - self.size) // 2
        pixels = np.asarray(resized.crop((x, y, x + self.size, y + self.size)))[None]
        corner = np.array([[left + round(x / scale), top + round(y / scale)]])
        return Patches(pixels, corner, np.zeros(1, dtype=np.int64), upscaled=scale > 8)


def _middle(image: Image.Image) -> tuple[int, int, Image.Image]:
    """The corner (x, y) and pixels of the part of the image that can be scored whole: all of it, unless one side is
    over LONGEST times the other, when enlarging a strip a few pixels wide would take gigabytes."""
    width, height = (min(side, LONGEST * min(image.size)) for side in image.size)
    if (width, height) == image.size:
        return 0, 0, image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return left, top, image.crop((left, top, left + width, top + height))


def _check_side(side: int) -> None:
    if not 8 <= side <= LARGEST_SIDE:
        raise ValueError(f"a side must be 8 to {LARGEST_SIDE} pixels, not {side}")


@dataclass(frozen=True, kw_only=True)
class EnsemblePreset:
    """Every member's own crops of the image, in the members' order, each padded with zeros to the largest member's
    size so that they travel as one array; the model cuts the padding off again."""

    kind: Literal["ensemble"] = "ensemble"
    members: tuple[PatchPreset | WholePreset, ...]

    @property
    def size(self) -> int:
        """The padded side of a crop in pixels."""
        return max(member.size for member in self.members)

    @property
    def count(self) -> int:
        """Crops of one image, all members together."""
        return sum(member.count for member in self.members)

    def crops(self, rgb: Pixels, seed: int) -> Patches:
        """An RGB image to crops uint8 (count, size, size, 3); each member's are those it takes alone."""
        parts = [member.crops(rgb, seed) for member in self.members]
        padded = [
            np.pad(part.pixels, ((0, 0), (0, self.size - member.size), (0, self.size - member.size), (0, 0)))
            for member, part in zip(self.members, parts, strict=True)
        ]
        return Patches(
            np.concatenate(padded),
            np.concatenate([part.corners for part in parts]),
            np.concatenate([part.complexity for part in parts]),
            upscaled=any(part.upscaled for part in parts),
        )


Preset = PatchPreset | WholePreset | EnsemblePreset


def preset_from_dict(values: dict[str, Any]) -> Preset:
    """The preset that `asdict` wrote. Raises TypeError on an unknown field, ValueError on an unknown kind."""
    if values.get("kind") == "ensemble":
        members = tuple(preset_from_dict(member) for member in values["members"])
        return EnsemblePreset(members=tuple(one for one in members if not isinstance(one, EnsemblePreset)))
    kinds = {"patch": PatchPreset, "whole": WholePreset}
    if values.get("kind") not in kinds:
        raise ValueError(f"preset kind must be one of {', '.join(kinds)}, ensemble, not {values.get('kind')!r}")
    result: Preset = kinds[values["kind"]](**values)
    return result


def preset_to_dict(preset: Preset) -> dict[str, Any]:
    """The preset as it is written in card.json."""
    return asdict(preset)


def to_tensor(crops: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 (n, size, size, 3) to float32 (n, 3, size, size), scaled to 0..1 and normalised as for ImageNet.

    A tensor stays on its device, so that a GPU is sent bytes and not floats.
    """
    import torch

    pixels = torch.as_tensor(crops).permute(0, 3, 1, 2).float().div_(255.0)
    mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return pixels.sub_(mean).div_(std)
