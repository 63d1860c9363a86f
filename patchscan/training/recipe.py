"""Read training recipes: one YAML file per model in `training/`. Errors name the file and line."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from patchscan.common.errors import UserError
from patchscan.common.shipped import shipped
from patchscan.common.yaml_file import read_yaml
from patchscan.dataset.layout import taken_by_reports
from patchscan.detector.presets import MemberPreset, PatchPreset

RECIPES = shipped("training")


class RecipeError(UserError):
    """A recipe cannot be read; the message names the file, the line and what is allowed there."""


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("the first number of a range may not be larger than the second")
    return ends


Quality = Annotated[int, Field(ge=1, le=100)]
Qualities = Annotated[tuple[Quality, Quality], AfterValidator(_ascending)]
Factors = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)]
Sigmas = Annotated[tuple[NonNegativeFloat, NonNegativeFloat], AfterValidator(_ascending)]


class Augment(BaseModel):
    """Augmentation of both classes: ranges for blur (sigma in pixels), resizing (factor) and JPEG (quality).

    Each step is applied with `probability`; JPEG with `jpeg_probability` if that is set.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    probability: float = Field(ge=0, le=1)
    jpeg_quality: Qualities | None = None
    jpeg_probability: float | None = Field(default=None, ge=0, le=1)
    blur_sigma: Sigmas | None = None
    resize: Factors | None = None


class Delivery(BaseModel):
    """Augmentation of both classes as images are delivered on the web; training crops of `size` x `size` pixels.

    A share `plain` of the crops is cut as stored. Of the others, a share `shrink` is resized by `smallest` to 1 and a
    share `enlarge` by 1.1 to `largest`, with a random filter; a share `sharpen` is sharpened; a share `compress` is
    stored as JPEG or WebP of `quality`. Of these a share `twice` is stored again, on another grid of blocks and half of
    the time resized once more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=16)
    plain: float = Field(default=0.3, ge=0, le=1)
    shrink: float = Field(default=0.4, ge=0, le=1)
    smallest: float = Field(default=0.5, gt=0, le=1)
    enlarge: float = Field(default=0.15, ge=0, le=1)
    largest: float = Field(default=2.0, ge=1.1)
    sharpen: float = Field(default=0.08, ge=0, le=1)
    compress: float = Field(default=0.65, ge=0, le=1)
    twice: float = Field(default=0.15, ge=0, le=1)
    quality: Qualities = (60, 97)


class Recipe(BaseModel):
    """All settings of a training run except its data.

    `seen`: generators to train on and to choose the checkpoint on. `unseen`: generators for evaluation only. `weights`:
    `imagenet`, `none`, or a file. `train_crops`: crops per image in a training step (default: the preset's count, or 1
    with `delivery`). `window`: side, in pixels, of the random part of an image that the crops are taken from.
    `synthetic`: share of the AI images to replace with fakes made from training photographs. `averaging`: decay of the
    moving average of the weights, which is then validated and saved. `cosine`: the learning rate warms up for 50 steps
    and falls to 0 along a cosine. `max_gradient_norm`: gradients are scaled down to this norm. `delivery`: augmentation
    in place of `augment`. `balanced`: half of the images drawn are real, and a generator is drawn by the root of its
    number of images. `kinds_share`: share of the real images drawn from kinds of real images that come without fakes
    (see `--extra`; default: by the root of their number, as generators are). `notice`: a warning to show with all of
    the model's verdicts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    architecture: Literal["simplecnn", "resnet50", "ssp", "ssp-lite", "efficientnet-lite0"]
    preset: MemberPreset = Field(discriminator="kind")
    seen: list[str] = Field(min_length=1)
    unseen: list[str] = []
    weights: str = "none"
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    optimizer: Literal["adam", "adamw"] = "adam"
    cosine: bool = False
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    averaging: float = Field(default=0.0, ge=0, lt=1)
    validate_every: int = Field(default=1, gt=0)
    flip: Literal["none", "horizontal", "all"] = "none"
    train_crops: int | None = Field(default=None, gt=0)
    window: int | None = Field(default=None, ge=32)
    synthetic: float = Field(default=0.0, ge=0, le=1)
    augment: Augment | None = None
    delivery: Delivery | None = None
    balanced: bool = False
    kinds_share: float | None = Field(default=None, gt=0, lt=1)
    max_gradient_norm: float | None = Field(default=None, gt=0)
    notice: str = ""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)  # what torch takes

    @model_validator(mode="after")
    def _check_combination(self) -> "Recipe":
        if self.delivery and (self.augment or self.preset.kind != "patch"):
            raise ValueError("delivery goes with a patch preset and without augment")
        if self.kinds_share and not self.balanced:
            raise ValueError("kinds_share needs balanced: true")
        if taken := taken_by_reports([*self.seen, *self.unseen]):
            raise ValueError(taken)
        if both := set(self.seen) & set(self.unseen):
            raise ValueError(f"seen and unseen both name {min(both)}, which is either trained on or kept")
        return self

    def is_that_of(self, saved: str) -> bool:
        """Whether `saved`, a recipe as JSON, has these settings. Settings that an older version lacked, or had besides,
        do not count, so that its run goes on after an upgrade."""
        values = json.loads(saved)
        known = {name: value for name, value in values.items() if name in Recipe.model_fields}
        try:
            return Recipe.model_validate(known) == self
        except ValidationError:
            return False

    @property
    def train_size(self) -> int:
        """The side of a training crop in pixels."""
        return self.delivery.size if self.delivery else self.preset.size

    @property
    def crops_per_image(self) -> int:
        """How many crops of an image a training step takes."""
        return self.train_crops or (1 if self.delivery else self.preset.count)


KEYS = {
    *Recipe.model_fields,
    *Augment.model_fields,
    *Delivery.model_fields,
    *(field.name for field in fields(PatchPreset)),
}


def split_names(text: str) -> list[str]:
    """Return the names in a text that has commas between them."""
    return [name for part in text.split(",") if (name := part.strip())]


def load_recipe(name_or_path: str, **overrides: Any) -> Recipe:
    """Load one of this project's recipes by name (`ssp`), or a YAML file. An override of None changes nothing.

    Raises RecipeError, naming file and line, for YAML that does not parse, an unknown key, or a wrong type.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise RecipeError(f"no recipe {name_or_path!r}: use a YAML file or one of {known}")
    return read_yaml(path, Recipe, RecipeError, KEYS, **overrides)
