"""Turn an image into a model's input. Training, evaluation, serving and scanning all use this module.

A preset cuts RGB pixels into uint8 crops without torch, because scan workers have none; `to_tensor` turns crops into
the normalised tensor that a model takes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from patchscan.detector.patches import (
    SMALL_IMAGE_SIDE,
    Patches,
    Pixels,
    Rule,
    as_pillow,
    choose_patches,
    height_and_width,
)

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
# Upper limits for cards and recipes, so that a mistaken or hostile one cannot exhaust the memory.
MAX_SIDE, MAX_PATCHES = 1024, 1024
# Of all crops of one image, 200 MB.
MAX_CROP_PIXELS = 2**26
# Of an ensemble; each takes memory before its weights are checked.
MAX_MEMBERS = 8
# Longer side over shorter side; of a longer image, WholeImagePreset scores the middle part only.
MAX_ASPECT_RATIO = 16


@dataclass(frozen=True, kw_only=True)
class PatchPreset:
    """Score `count` patches of `size` x `size` pixels, chosen by `rule` among `candidates` draws, and average their
    logits. With `max_count`, for rule `grid`, a larger image gets as many as its area holds, up to that number."""

    kind: Literal["patch"] = "patch"
    size: int = 32
    rule: Rule = "simplest"
    candidates: int = 30
    count: int = 1
    max_count: int | None = None

    def __post_init__(self) -> None:
        _check_side(self.size)
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, not {self.rule!r}")
        if self.rule != "grid" and self.size > SMALL_IMAGE_SIDE:
            raise ValueError(f"patches of rule {self.rule} may have {SMALL_IMAGE_SIDE} pixels a side, not {self.size}")
        if not (_is_number(self.count, MAX_PATCHES) and _is_number(self.candidates, MAX_PATCHES)):
            raise ValueError(f"count and candidates must be 1 to {MAX_PATCHES}")
        most = self.count if self.max_count is None else self.max_count
        if self.max_count is not None and not (
            self.rule == "grid" and _is_number(most, MAX_PATCHES) and self.count <= most
        ):
            raise ValueError(f"max_count is for rule grid, and must be count to {MAX_PATCHES}")
        if most * self.size**2 > MAX_CROP_PIXELS:
            raise ValueError(f"the crops of an image may have {MAX_CROP_PIXELS:,} pixels, not {most} x {self.size}²")

    def crops(self, rgb: Pixels, seed: int) -> Patches:
        """Cut an RGB image into crops uint8 (number of patches, size, size, 3); the same seed gives the same crops."""
        count = self.count
        if self.max_count is not None:
            height, width = height_and_width(rgb)
            count = min(max(count, round(height * width / self.size**2)), self.max_count)
        return choose_patches(rgb, rule=self.rule, size=self.size, candidates=self.candidates, count=count, seed=seed)


@dataclass(frozen=True, kw_only=True)
class WholeImagePreset:
    """Score the whole image: shorter side resized to `resize`, then the central `size` x `size`; with `squash`, both
    sides are resized to `resize` (without `round_down`, to `size`). No randomness: the seed changes nothing.

    The longer side is rounded to the nearest, or with `round_down` down: torchvision's ImageNet evaluation preset, but
    for a margin of odd length, which torchvision cuts at another pixel where half of it, rounded down, is odd.
    """

    kind: Literal["whole"] = "whole"
    size: int = 224
    resize: int = 256
    squash: bool = False
    filter: Filter = "bilinear"
    round_down: bool | None = None  # not in older cards, whose digests stay

    def __post_init__(self) -> None:
        _check_side(self.size)
        _check_side(self.resize)
        if self.filter not in get_args(Filter):
            raise ValueError(f"filter must be one of {', '.join(get_args(Filter))}, not {self.filter!r}")

    @property
    def count(self) -> int:
        """Crops per image: one."""
        return 1

    def crops(self, rgb: Pixels, seed: int) -> Patches:
        """Reduce an RGB image to one crop, uint8 (1, size, size, 3)."""
        left, top, pillow = _limit_aspect_ratio(as_pillow(rgb))
        shorter = min(pillow.size)
        width, height = (max(self.size, self._resized(side, shorter)) for side in pillow.size)
        resized = pillow.resize((width, height), Image.Resampling[self.filter.upper()])
        x, y = (resized.width - self.size) // 2, (resized.height - self.size) // 2
        pixels = np.asarray(resized.crop((x, y, x + self.size, y + self.size)))[None]
        corner = [[left + round(x * pillow.width / width), top + round(y * pillow.height / height)]]
        return Patches(pixels, np.array(corner), upscaled=min(width, height) > 8 * shorter)

    def _resized(self, side: int, shorter: int) -> int:
        """The length to which a side is resized, of an image with this shorter side."""
        if self.squash:
            return self.resize if self.round_down else self.size
        return self.resize * side // shorter if self.round_down else round(side * (self.resize / shorter))


def _limit_aspect_ratio(image: Image.Image) -> tuple[int, int, Image.Image]:
    """Cut the image down to its middle if one side is over MAX_ASPECT_RATIO times the other. Returns the corner (x, y)
    of the remaining part and the part."""
    # Enlarging a strip a few pixels wide would take gigabytes.
    width, height = (min(side, MAX_ASPECT_RATIO * min(image.size)) for side in image.size)
    if (width, height) == image.size:
        return 0, 0, image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return left, top, image.crop((left, top, left + width, top + height))


def _check_side(side: int) -> None:
    if not (_is_number(side, MAX_SIDE) and side >= 8):
        raise ValueError(f"a side must be 8 to {MAX_SIDE} pixels, not {side}")


def _is_number(value: int, largest: int) -> bool:
    """Whether a value, perhaps of a stranger's card, is a whole number from 1 to `largest`."""
    return type(value) is int and 1 <= value <= largest


MemberPreset = PatchPreset | WholeImagePreset


@dataclass(frozen=True, kw_only=True)
class EnsemblePreset:
    """The crops of every member's preset, in the members' order.

    Each crop is padded with zeros to the largest member's size, so that all fit in one array; the model removes the
    padding.
    """

    kind: Literal["ensemble"] = "ensemble"
    members: tuple[MemberPreset, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.members) <= MAX_MEMBERS:
            raise ValueError(f"an ensemble has 1 to {MAX_MEMBERS} members")
        if not all(map(has_fixed_count, self.members)):
            raise ValueError("a member of an ensemble takes equally many crops of every image")
        if self.count * self.size**2 > MAX_CROP_PIXELS:
            raise ValueError(f"the crops of an image may have {MAX_CROP_PIXELS:,} pixels")

    @property
    def size(self) -> int:
        """Side of a padded crop in pixels."""
        return max(member.size for member in self.members)

    @property
    def count(self) -> int:
        """Crops per image, all members together."""
        return sum(member.count for member in self.members)

    def crops(self, rgb: Pixels, seed: int) -> Patches:
        """Cut an RGB image into crops uint8 (count, size, size, 3); each member gets the crops it would get alone."""
        parts = [member.crops(rgb, seed) for member in self.members]
        padded = [
            np.pad(part.pixels, ((0, 0), (0, self.size - member.size), (0, self.size - member.size), (0, 0)))
            for member, part in zip(self.members, parts, strict=True)
        ]
        return Patches(
            np.concatenate(padded),
            np.concatenate([part.corners for part in parts]),
            upscaled=any(part.upscaled for part in parts),
        )


Preset = MemberPreset | EnsemblePreset


def preset_from_dict(values: dict[str, Any]) -> Preset:
    """Read what `preset_to_dict` wrote. Raises TypeError on an unknown field, ValueError on an unknown kind."""
    if values.get("kind") == "ensemble":
        return EnsemblePreset(members=tuple(map(_member_from_dict, values["members"])))
    return _member_from_dict(values)


def _member_from_dict(values: dict[str, Any]) -> MemberPreset:
    kinds = {"patch": PatchPreset, "whole": WholeImagePreset}
    if values.get("kind") not in kinds:
        raise ValueError(f"preset kind must be {', '.join(kinds)}, or ensemble of these, not {values.get('kind')!r}")
    result: MemberPreset = kinds[values["kind"]](**values)
    return result


def preset_to_dict(preset: Preset) -> dict[str, Any]:
    """Return the preset as it is written in card.json."""
    return asdict(preset, dict_factory=lambda fields: {name: value for name, value in fields if value is not None})


def with_fixed_count(preset: Preset) -> Preset:
    """Return the preset without `max_count`, which gives every image equally many crops."""
    return replace(preset, max_count=None) if isinstance(preset, PatchPreset) else preset


def has_fixed_count(preset: Preset) -> bool:
    """Whether every image gets equally many crops."""
    return with_fixed_count(preset) == preset


def draws_patches(preset: Preset) -> bool:
    """Whether the seed changes the crops."""
    if isinstance(preset, EnsemblePreset):
        return any(map(draws_patches, preset.members))
    return isinstance(preset, PatchPreset) and preset.rule != "grid"


def noise_picture(preset: Preset, seed: int) -> np.ndarray:
    """Return a picture of noise, uint8 (2 * size, 2 * size, 3), on which two forms of one model are compared."""
    side = 2 * preset.size
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def crop_bytes(preset: Preset) -> int:
    """Return the size in bytes of one image's crops, where all have equally many (`has_fixed_count`)."""
    return preset.count * preset.size**2 * 3


def to_tensor(crops: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Convert crops uint8 (n, size, size, 3) to float32 (n, 3, size, size), scaled to 0..1 and normalised as for
    ImageNet. A tensor stays on its device."""
    import torch

    pixels = torch.as_tensor(crops).permute(0, 3, 1, 2).float().div_(255.0)
    mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return pixels.sub_(mean).div_(std)
