"""What somebody else's detector takes and gives: a page of YAML."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from patchscan.common.errors import UserError
from patchscan.common.yaml_file import read_yaml, where_in
from patchscan.detector.card import check_name
from patchscan.detector.graph_check import GraphError
from patchscan.detector.presets import IMAGENET_MEAN, IMAGENET_STD, Filter, MemberPreset, PatchPreset, WholeImagePreset

Triple = tuple[float, float, float]
Kind = Literal["logits", "sigmoid", "probabilities"]
MAX_NAME = 100
SMALLEST = 1e-30  # of a divisor in float32


def _one_line(text: str) -> str:
    if not (text.isprintable() and text.strip() and len(text) <= MAX_NAME):
        raise ValueError(f"this must be one line of 1 to {MAX_NAME} characters")
    return text


Name = Annotated[str, AfterValidator(_one_line)]
FileName = Annotated[Name, AfterValidator(check_name)]


class UnfitGraphError(GraphError):
    """The graph is not as the description's `key` says."""

    def __init__(self, message: str, *key: str):
        super().__init__(message)
        self.key = key


@contextmanager
def naming_line(config: Path | None) -> Iterator[None]:
    """Within this context, an UnfitGraphError becomes a GraphError that also names the line of the description."""
    try:
        yield
    except UnfitGraphError as error:
        if config is None:
            raise
        raise GraphError(f"{where_in(config, error.key)}: {error}") from error


class ImportConfigError(UserError):
    """The description of a detector cannot be read; the message names the file, the line and what is wrong."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Input(_Part):
    """What the graph takes. `views`: `crop` (shorter side resized to `resize`, then the middle), `squash` (both sides
    resized to it, then the middle) or `grid` (patches of the picture as it is, `count` of them, in larger pictures up
    to `max_count`). `rounding` is of the longer side that is resized in proportion.

    A value of a pixel, 0 to 255, is multiplied by `scale`; then `mean` is subtracted and the result divided by `std`.
    """

    size: int
    views: Literal["crop", "squash", "grid"] = "crop"
    resize: int | None = None
    filter: Filter = "bilinear"
    rounding: Literal["down", "nearest"] = "down"
    count: int = 1
    max_count: int | None = None
    channels: Literal["rgb", "bgr"] = "rgb"
    layout: Literal["nchw", "nhwc"] = "nchw"
    scale: float = 1 / 255
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(*self.std, self.scale) < SMALLEST:
            raise ValueError("std and scale must be positive")
        largest = 255 * self.scale
        if max(self.mean) > largest * (1 + 1e-6):
            raise ValueError(f"mean is above the largest value of a pixel, {largest:g}: scale comes before it")
        if max(self.std) > 2 * largest:
            raise ValueError(f"std is far above the largest value of a pixel, {largest:g}: scale comes before it")
        self.preset()
        return self

    @property
    def sides(self) -> tuple[int, int, int]:
        """The shape of a picture."""
        return (3, self.size, self.size) if self.layout == "nchw" else (self.size, self.size, 3)

    def preset(self) -> MemberPreset:
        """How an image becomes crops. Raises ValueError where that cannot be."""
        if self.views == "grid":
            if self.resize is not None:
                raise ValueError("resize is not for views: grid")
            return PatchPreset(rule="grid", size=self.size, count=self.count, max_count=self.max_count)
        if self.count != 1 or self.max_count is not None:
            raise ValueError("count and max_count are for views: grid")
        resize = self.resize if self.resize is not None else self.size
        if resize < self.size:
            raise ValueError(f"resize is {resize}, but the middle of size {self.size} is to be cut out of it")
        return WholeImagePreset(
            size=self.size,
            resize=resize,
            squash=self.views == "squash",
            filter=self.filter,
            round_down=self.rounding == "down" or self.views == "squash" or None,
        )


class LinearHead(NamedTuple):
    """A linear layer on the graph's output, a vector: its length made 1 before, if `normalise`; AI is positive."""

    weights: list[float]
    bias: float
    normalise: bool


class Head(_Part):
    """A LinearHead: `file` is JSON with `weights`, a number for each of the vector's elements, and `bias`."""

    file: Path
    normalise: bool = True

    def read(self, folder: Path) -> LinearHead:
        """Read the file. Raises ImportConfigError."""
        try:
            content = json.loads((folder / self.file).read_text("utf-8-sig"))
            weights, bias = [float(one) for one in content["weights"]], float(content.get("bias", 0))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ImportConfigError(f"{folder / self.file} holds no weights and bias ({error})") from error
        if not weights:
            raise ImportConfigError(f"{folder / self.file} holds no weights")
        return LinearHead(weights, bias, self.normalise)


class Output(_Part):
    """What the graph gives: `logits` (before softmax, or, a single one, before the logistic function), `sigmoid`
    (logits, each before a logistic function of its own), `probabilities`, or, with `head`, a vector. `ai` is the index
    of the class AI, of as many as `classes`, where that is told; of a single output, `positive` says what it means."""

    name: str | None = None
    kind: Kind = "logits"
    ai: int = Field(default=1, ge=0)
    classes: int | None = Field(default=None, ge=2)
    positive: Literal["ai", "real"] = "ai"
    head: Head | None = None

    @field_validator("kind", mode="before")
    @classmethod
    def _check_kind(cls, kind: Any) -> Any:
        if kind == "softmax":
            raise ValueError("for a graph that ends in a softmax say probabilities, for what comes before one, logits")
        if kind == "logit":
            raise ValueError("say logits, also where there is one only")
        return kind


class ImportConfig(_Part):
    """A detector that somebody else trained: its input, its output, and what is known of it. `seen` are generators of
    the user's data, by their folders' names, that it was trained on or may be calibrated on."""

    name: FileName
    version: Name = "1.0"
    input: Input
    output: Output = Output()
    source: str | None = None
    licence: str | None = None
    trained_by: str | None = None
    trained_on: str | None = None
    seen: list[str] = []


KEYS = {*ImportConfig.model_fields, *Input.model_fields, *Output.model_fields, *Head.model_fields}


def read_config(path: Path) -> ImportConfig:
    """Read the YAML file. Raises ImportConfigError, naming file and line."""
    return read_yaml(path, ImportConfig, ImportConfigError, KEYS)
