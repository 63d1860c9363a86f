"""What a Hugging Face export of an image classifier takes and gives, as the files in its folder say."""

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from patchscan.detector.graph_check import GraphError
from patchscan.detector.graph_detector import GRAPH_FILE
from patchscan.detector.presets import Filter
from patchscan.training.import_config import ImportConfig, ImportConfigError, Input, Output

CONFIG_FILE = "config.json"
ONNX_FOLDER = "onnx"  # of exports that hold several files
# Pillow's numbers of filters.
_RESAMPLE: list[Filter] = ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
# The image processors of transformers that are known here, and what a `size` of one number means to each.
_SHORTER_SIDE = {"bit", "clip", "convnext", "levit", "mobilenetv1", "mobilenetv2", "mobilevit", "poolformer"}
_BOTH_SIDES = {"beit", "deit", "efficientformer", "efficientnet", "flava", "pvt", "siglip", "vit"}
_NEVER_CROP = {"pvt", "siglip", "vit"}
_LARGE_CONVNEXT = 384  # from this size on its processor squashes
_AI_WORDS = {"ai", "fake", "artificial", "generated", "synthetic", "deepfake", "machine"}
_NEGATIONS = {"not", "non", "no"}


def read_export(folder: Path) -> ImportConfig:
    """Read config.json and preprocessor_config.json of a Hugging Face image classifier as they lie in its folder.

    The class whose label says so is AI. Raises ImportConfigError where a file is missing, no label, or more than one,
    says so, or it is not known how the pictures are prepared: then describe the detector in YAML.
    """
    config, preprocessor = (_read_json(folder / name) for name in (CONFIG_FILE, "preprocessor_config.json"))
    try:
        return ImportConfig(
            name=folder.resolve().name,
            input=Input.model_validate(_input_of(preprocessor)),
            output=_output_of(config),
            source=config.get("_name_or_path") or None,
        )
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    except KeyError as error:
        why = f"its files do not say {error.args[0]}"
    except ValueError as error:
        why = str(error)
    except (AttributeError, TypeError, OverflowError) as error:
        why = f"a value is of another kind than it should be ({error})"
    raise ImportConfigError(f"{folder}: {why}; describe the detector in YAML, with --config")


def find_export(model: Path) -> tuple[Path, Path]:
    """Return the folder of an export and the ONNX file in it, or in its folder `onnx`; `model` is either of the two.
    Raises GraphError."""
    if not model.is_dir():
        folder = model.parent
        # Whoever exports into a folder `onnx` has config.json there.
        is_below = folder.resolve().name == ONNX_FOLDER and not (folder / CONFIG_FILE).exists()
        return (folder.resolve().parent if is_below else folder), model
    for file in (model / GRAPH_FILE, model / ONNX_FOLDER / GRAPH_FILE):
        if file.is_file():
            return model, file
    found = [str(file) for folder in (model, model / ONNX_FOLDER) for file in sorted(folder.glob("*.onnx"))]
    what = f"name one of {', '.join(found)}" if found else "export the model to ONNX first (optimum-cli export onnx)"
    raise GraphError(f"{model} holds no {GRAPH_FILE}: {what}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ImportConfigError(f"{path} cannot be read ({error}): give --config, or an export's folder") from error
    if not isinstance(content, dict):
        raise ImportConfigError(f"{path} is no JSON object")
    return content


def _input_of(given: dict[str, Any]) -> dict[str, Any]:
    """What the processor does, as its source in transformers has it. Raises ValueError and KeyError."""
    name = _name_of(given)
    for step in ("do_pad", "do_grayscale", "do_thumbnail", "do_color_quantize"):
        if given.get(step):
            raise ValueError(f"its processor does more than a page of YAML can say ({step})")
    if not given.get("do_resize", True):
        raise ValueError("its processor does not resize pictures (do_resize)")
    resample = given["resample"]
    if resample not in range(len(_RESAMPLE)):
        raise ValueError(f"resample is {resample}, which is none of Pillow's filters")
    scale = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0
    flipped = name == "mobilevit" and given.get("do_flip_channel_order", True)
    found = {"filter": _RESAMPLE[resample], "scale": scale, "channels": "bgr" if flipped else "rgb"}
    return found | _views(name, given) | _normalisation(name, given)


def _name_of(given: dict[str, Any]) -> str:
    """The kind of processor in lower case; empty where the file names none."""
    named = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "")
    name = re.sub(r"(FeatureExtractor|ImageProcessor(Fast|Pil)?)$", "", named).lower()
    if name and name not in _SHORTER_SIDE | _BOTH_SIDES:
        raise ValueError(f"what its {named} does is not known here")
    return name


def _views(name: str, given: dict[str, Any]) -> dict[str, Any]:
    size = _of_list(given["size"])
    if isinstance(size, int):
        if not name:
            raise ValueError(f"whether size {size} is of both sides or the shorter one is not said")
        size = {"shortest_edge": size} if name in _SHORTER_SIDE else {"height": size, "width": size}
    if not isinstance(size, dict) or "longest_edge" in size:
        raise ValueError(f"size is {size}, which does not give squares")
    if name == "convnext":
        return _convnext(size["shortest_edge"], given.get("crop_pct") or 224 / 256)
    resize, shorter = (size["shortest_edge"], True) if "shortest_edge" in size else (_side("size", size), False)
    if name == "levit" and shorter:
        resize = int(256 / 224 * resize)
    if name == "poolformer":
        resize, shorter = int(resize / (given.get("crop_pct") or 0.9)), True
    crop = given.get("crop_size") if name not in _NEVER_CROP else None
    if crop is not None and given.get("do_center_crop", True):
        return {"views": "crop" if shorter else "squash", "resize": resize, "size": _side("crop_size", crop)}
    if shorter:
        raise ValueError("its pictures are not cut to squares (do_center_crop)")
    return {"views": "squash", "size": resize}


def _convnext(side: int, share: float) -> dict[str, Any]:
    if side >= _LARGE_CONVNEXT:
        return {"views": "squash", "size": side}
    return {"views": "crop", "resize": int(side / share), "size": side}


def _of_list(size: Any) -> Any:
    """A size, with a list of two numbers as the height and width that it means to transformers."""
    return {"height": size[0], "width": size[1]} if isinstance(size, list) and len(size) == 2 else size


def _side(what: str, size: Any) -> int:
    size = _of_list(size)
    height, width = (size["height"], size["width"]) if isinstance(size, dict) else (size, size)
    if height != width:
        raise ValueError(f"its {what} is {width} x {height}, not a square")
    return int(height)


def _normalisation(name: str, given: dict[str, Any]) -> dict[str, Any]:
    normalises = given.get("do_normalize", True) and name != "mobilevit"
    mean, std = (given["image_mean"], given["image_std"]) if normalises else ([0, 0, 0], [1, 1, 1])
    if name == "efficientnet":
        mean, std = ([float(one) for one in values] for values in (mean, std))
        if given.get("include_top", True):  # divided once more
            std = [one * other for one, other in zip(std, given["image_std"], strict=True)]
        if given.get("rescale_offset", False):
            mean = [one + 1 for one in mean]
    return {"mean": mean, "std": std}


def _output_of(config: dict[str, Any]) -> Output:
    if config.get("problem_type") == "regression":
        raise ValueError("it gives a number, not classes (problem_type)")
    labels = config["id2label"]
    if not isinstance(labels, dict) or not all(isinstance(label, str) for label in labels.values()):
        raise ValueError(f"id2label is {labels}, not a label for each class")
    each_alone = config.get("problem_type") == "multi_label_classification"
    if labels.keys() != {str(number) for number in range(len(labels))}:
        raise ValueError(f"the classes of id2label, {', '.join(labels)}, are not numbered from 0")
    ai = _ai_class(labels)
    numbers = config.get("label2id") or {}
    if any(str(numbers.get(label, number)) != number for number, label in labels.items()):
        raise ValueError(f"id2label and label2id contradict each other: {labels} and {numbers}")
    if len(labels) < 2:
        raise ValueError("it has one label, not classes")
    return Output(kind="sigmoid" if each_alone else "logits", ai=ai, classes=len(labels))


def _ai_class(labels: dict[str, str]) -> int:
    words = {number: set(re.split(r"[^a-z]+", label.lower())) for number, label in labels.items()}
    found = [number for number, label in words.items() if label & _AI_WORDS and not label & _NEGATIONS]
    if len(found) != 1:
        raise ValueError(f"which of the labels {', '.join(labels.values())} means AI is not clear")
    return int(found[0])
