"""What somebody else's detector takes and gives: a page of YAML, or the files of a Hugging Face export."""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from patchscan.common.errors import UserError
from patchscan.common.yaml_file import read_yaml
from patchscan.detector.presets import Filter, PatchPreset, WholeImagePreset

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Triple = tuple[float, float, float]


class ImportConfigError(UserError):
    """The description of a detector cannot be read; the message names the file, the line and what is wrong."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Input(_Part):
    """What the graph takes. `views`: `crop` (shorter side resized to `resize`, then the middle), `squash` (both sides
    resized) or `grid` (patches of the picture as it is, `count` of them, in larger pictures up to `max_count`).

    A value of a pixel, 0 to 255, is multiplied by `scale`; then `mean` is subtracted and the result divided by `std`.
    """

    size: int
    views: Literal["crop", "squash", "grid"] = "crop"
    resize: int | None = None
    filter: Filter = "bilinear"
    count: int = 1
    max_count: int | None = None
    channels: Literal["rgb", "bgr"] = "rgb"
    layout: Literal["nchw", "nhwc"] = "nchw"
    scale: float = 1 / 255
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 in self.std or self.scale <= 0:
            raise ValueError("std may not be 0, and scale must be positive")
        self.preset()
        return self

    def preset(self) -> PatchPreset | WholeImagePreset:
        """How an image becomes crops. Raises ValueError where that cannot be."""
        if self.views == "grid":
            return PatchPreset(rule="grid", size=self.size, count=self.count, max_count=self.max_count)
        if self.count != 1 or self.max_count is not None:
            raise ValueError("count and max_count are for views: grid")
        squash = self.views == "squash"
        return WholeImagePreset(size=self.size, resize=self.resize or self.size, squash=squash, filter=self.filter)


class Head(_Part):
    """A linear layer on the graph's output, a vector: its length made 1 before, if `normalise`. `file` is JSON with
    `weights`, a number for each of the vector's elements, and `bias`; AI is positive."""

    file: Path
    normalise: bool = True

    def read(self, folder: Path) -> tuple[list[float], float]:
        """Return weights and bias. Raises ImportConfigError."""
        try:
            content = json.loads((folder / self.file).read_text())
            weights, bias = [float(one) for one in content["weights"]], float(content.get("bias", 0))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ImportConfigError(f"{folder / self.file} holds no weights and bias ({error})") from error
        if not weights:
            raise ImportConfigError(f"{folder / self.file} holds no weights")
        return weights, bias


class Output(_Part):
    """What the graph gives: `logits` (before softmax, or, a single one, before the logistic function), `probabilities`,
    or, with `head`, a vector. `ai` is the index of the class AI; of a single output, `positive` says what it means."""

    name: str | None = None
    kind: Literal["logits", "probabilities"] = "logits"
    ai: int = Field(default=1, ge=0)
    positive: Literal["ai", "real"] = "ai"
    head: Head | None = None


class ImportConfig(_Part):
    """A detector that somebody else trained: its input, its output, and what is known of it. `seen` are generators of
    the user's data, by their folders' names, that it was trained on or may be calibrated on."""

    name: str
    version: str = "1.0"
    input: Input
    output: Output = Output()
    source: str | None = None
    licence: str | None = None
    trained_on: str | None = None
    seen: list[str] = []


KEYS = {*ImportConfig.model_fields, *Input.model_fields, *Output.model_fields, *Head.model_fields}


def read_config(path: Path) -> ImportConfig:
    """Read the YAML file. Raises ImportConfigError, naming file and line."""
    return read_yaml(path, ImportConfig, ImportConfigError, KEYS)


# Pillow's numbers of filters, which Hugging Face's preprocessors use.
_RESAMPLE: dict[int, Filter] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_AI_WORDS = ("ai", "fake", "artificial", "generated", "synthetic", "deepfake", "machine")


def read_export(folder: Path) -> ImportConfig:
    """Read config.json and preprocessor_config.json of a Hugging Face image classifier as they lie in its folder.

    The class whose label says so is AI. Raises ImportConfigError where a file is missing or no label, or more than one,
    says so: then describe the detector in YAML.
    """
    config, preprocessor = (_read_json(folder / name) for name in ("config.json", "preprocessor_config.json"))
    try:
        return ImportConfig(
            name=folder.resolve().name,
            input=Input.model_validate(_input_of(preprocessor)),
            output=Output(ai=_ai_class(config["id2label"])),
            source=config.get("_name_or_path") or None,
        )
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
        raise ImportConfigError(f"{folder}: {error}; describe the detector in YAML, with --config") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ImportConfigError(f"{path} cannot be read ({error}): give --config, or an export's folder") from error
    if not isinstance(content, dict):
        raise ImportConfigError(f"{path} is no JSON object")
    return content


def _input_of(preprocessor: dict[str, Any]) -> dict[str, Any]:
    size, crop = preprocessor["size"], preprocessor.get("crop_size")
    found: dict[str, Any] = {
        "scale": preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1.0,
        "filter": _RESAMPLE[preprocessor.get("resample", 2)],
        "mean": preprocessor["image_mean"] if preprocessor.get("do_normalize", True) else (0, 0, 0),
        "std": preprocessor["image_std"] if preprocessor.get("do_normalize", True) else (1, 1, 1),
    }
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    if shortest is not None:
        side = _side(crop) if crop and preprocessor.get("do_center_crop", True) else shortest
        return found | {"views": "crop", "resize": shortest, "size": side}
    return found | {"views": "squash", "size": _side(size)}


def _side(size: dict[str, int] | int) -> int:
    height, width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
    if height != width:
        raise ValueError(f"its input is {width} x {height}, not a square")
    return height


def _ai_class(labels: dict[str, str]) -> int:
    words = {number: label.lower().replace("-", " ").replace("_", " ").split() for number, label in labels.items()}
    found = [int(number) for number, label in words.items() if any(word in _AI_WORDS for word in label)]
    if len(found) != 1:
        raise ValueError(f"which of the labels {', '.join(labels.values())} means AI is not clear")
    return found[0]
