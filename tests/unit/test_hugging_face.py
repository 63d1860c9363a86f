"""`patchscan import` of a Hugging Face export: pictures are prepared as its processor in transformers does it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchscan.training.hugging_face import read_export
from patchscan.training.import_config import ImportConfigError
from tests.serving_kit import picture

HALF = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
NONE = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
SIZE = (61, 97)  # width and height of the test picture
FAKE = {"id2label": {"0": "human", "1": "artificial"}}
Box = tuple[int, int, int, int]


def export(folder: Path, preprocessor: dict[str, Any], config: dict[str, Any] = FAKE) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def prepared(folder: Path, rgb: np.ndarray) -> np.ndarray:
    """What the graph gets, of an import: (size, size, 3)."""
    given = read_export(folder).input
    pixels = given.preset().crops(rgb, 0).pixels[0].astype(np.float64)
    ordered = pixels[..., ::-1] if given.channels == "bgr" else pixels
    result: np.ndarray = (ordered * given.scale - given.mean) / given.std
    return result


def by_the_book(rgb: np.ndarray, to: tuple[int, int], box: Box | None, filter_number: int) -> np.ndarray:
    """The picture resized by Pillow, and the box cut out of it, from 0 to 1."""
    resized = Image.fromarray(rgb).resize(to, Image.Resampling(filter_number))
    return np.asarray(resized.crop(box) if box else resized).astype(np.float64) / 255


def halved(pixels: np.ndarray) -> np.ndarray:
    return (pixels - HALF["image_mean"]) / HALF["image_std"]


def halved_twice(pixels: np.ndarray) -> np.ndarray:
    """With rescale_offset and include_top, of EfficientNet."""
    return (2 * pixels - 1 - HALF["image_mean"]) / HALF["image_std"] / HALF["image_std"]


# In each case: the file, the size that the picture is resized to, the box cut out of it, and what follows. The longer
# side is rounded down: 97 * 32 / 61 is 50.9.
@pytest.mark.parametrize(
    ("preprocessor", "to", "box", "then"),
    [
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}, (32, 32), None, halved),
        ({"image_processor_type": "ViTImageProcessor", "size": [32, 32]}, (32, 32), None, halved),
        (
            {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 32, "width": 32}},
            (32, 32),
            None,
            halved,
        ),
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 32}, (32, 32), None, halved),
        (
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 32},
                "crop_size": {"height": 32, "width": 32},
            },
            (32, 50),
            (0, 9, 32, 41),
            halved,
        ),
        (
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 24, "do_center_crop": True},
            (32, 50),
            (4, 13, 28, 37),
            halved,
        ),
        (
            {
                "image_processor_type": "BeitImageProcessor",
                "size": {"height": 32, "width": 32},
                "crop_size": {"height": 24, "width": 24},
                "do_reduce_labels": True,
            },
            (32, 32),
            (4, 4, 28, 28),
            halved,
        ),
        (
            {"feature_extractor_type": "DeiTFeatureExtractor", "size": 32, "crop_size": 24, "do_center_crop": True},
            (32, 32),
            (4, 4, 28, 28),
            halved,
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 28}, "crop_pct": 0.875},
            (32, 50),
            (2, 11, 30, 39),
            halved,
        ),
        ({"feature_extractor_type": "ConvNextFeatureExtractor", "size": 28}, (32, 50), (2, 11, 30, 39), halved),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}}, (384, 384), None, halved),
        (
            {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 28}, "crop_size": 28},
            (32, 50),
            (2, 11, 30, 39),
            halved,
        ),
        (
            {"image_processor_type": "PoolFormerImageProcessor", "size": {"shortest_edge": 29}, "crop_size": 28},
            (32, 50),
            (2, 11, 30, 39),
            halved,
        ),
        (
            {
                "image_processor_type": "EfficientNetImageProcessor",
                "size": {"height": 32, "width": 32},
                "crop_size": {"height": 40, "width": 40},
                "do_center_crop": False,
                "rescale_factor": 1 / 127.5,
                "rescale_offset": True,
            },
            (32, 32),
            None,
            halved_twice,
        ),
        (
            {
                "image_processor_type": "MobileNetV2ImageProcessor",
                "size": {"shortest_edge": 32},
                "crop_size": {"height": 28, "width": 28},
            },
            (32, 50),
            (2, 11, 30, 39),
            halved,
        ),
        (
            {
                "image_processor_type": "MobileViTImageProcessor",
                "size": {"shortest_edge": 32},
                "crop_size": {"height": 28, "width": 28},
                "do_flip_channel_order": True,
            },
            (32, 50),
            (2, 11, 30, 39),
            lambda pixels: pixels[..., ::-1],
        ),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_pictures_are_prepared_as_its_processor_does(
    preprocessor: dict[str, Any],
    to: tuple[int, int],
    box: Box | None,
    then: Callable[[np.ndarray], np.ndarray],
    tmp_path: Path,
) -> None:
    rgb = picture(1, *SIZE)
    given = prepared(export(tmp_path, HALF | {"resample": 3} | preprocessor), rgb)
    assert np.allclose(given, then(by_the_book(rgb, to, box, 3)), atol=1e-9)


@pytest.mark.parametrize("resample", range(6))
def test_every_filter_of_pillow_is_known(resample: int, tmp_path: Path) -> None:
    rgb = picture(1, *SIZE)
    folder = export(tmp_path, NONE | {"resample": resample, "size": {"height": 32, "width": 32}})
    assert np.allclose(prepared(folder, rgb), by_the_book(rgb, (32, 32), None, resample), atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"image_processor_type": "PerceiverImageProcessor"},
            "what its PerceiverImageProcessor does is not known here",
        ),
        ({"do_resize": False}, "does not resize"),
        ({"do_pad": True}, r"\(do_pad\)"),
        ({"do_center_crop": False, "size": {"shortest_edge": 32}}, "not cut to squares"),
        ({"size": {"shortest_edge": 20}}, "resize is 20, but the middle of size 24"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "does not give squares"),
        ({"size": {"height": 32, "width": 24}}, "its size is 24 x 32, not a square"),
        ({"size": 32}, "whether size 32 is of both sides or the shorter one is not said"),
        ({"size": "32"}, "does not give squares"),
        ({"size": {"height": None, "width": None}}, "of another kind"),
        ({"resample": 6}, "resample is 6"),
        ({"resample": "bicubic"}, "resample is bicubic"),
        ({"image_mean": ["a", 0, 0]}, r"mean.0: Input should be a valid number"),
        ({"image_mean": 0.5}, r"mean: Input should be a valid tuple"),
        ({"image_std": [0.5]}, r"std.1: Field required"),
        ({"rescale_factor": None}, "scale: Input should be a valid number"),
    ],
)
def test_what_a_page_of_yaml_cannot_say_is_refused_in_a_line(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    usual = HALF | {"resample": 3, "size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}}
    with pytest.raises(ImportConfigError, match=why) as refused:
        read_export(export(tmp_path, usual | changes))
    assert "\n" not in str(refused.value)
    assert "describe the detector in YAML" in str(refused.value)


@pytest.mark.parametrize("missing", ["size", "resample", "image_mean"])
def test_what_its_files_do_not_say_is_not_guessed(missing: str, tmp_path: Path) -> None:
    usual = HALF | {"resample": 3, "size": {"height": 32, "width": 32}}
    del usual[missing]
    with pytest.raises(ImportConfigError, match=f"do not say {missing}"):
        read_export(export(tmp_path, usual))


@pytest.mark.parametrize(
    ("labels", "ai"),
    [
        ({"0": "artificial", "1": "human"}, 0),
        ({"0": "REAL", "1": "FAKE"}, 1),
        ({"0": "not_ai", "1": "AI-generated"}, 1),
        ({"0": "non-fake", "1": "fake"}, 1),
        ({"0": "LABEL_0", "1": "LABEL_1"}, None),
        ({"0": "not_ai", "1": "dalle"}, None),
        ({"0": "fake", "1": "deepfake"}, None),
        ({"1": "fake", "2": "real"}, None),
        ({"0": "fake"}, None),
        ({"0": 1}, None),
        (["fake"], None),
    ],
)
def test_the_label_that_says_so_is_ai(labels: Any, ai: int | None, tmp_path: Path) -> None:
    folder = export(tmp_path, HALF | {"resample": 3, "size": {"height": 32, "width": 32}}, {"id2label": labels})
    if ai is not None:
        assert read_export(folder).output.ai == ai
        return
    with pytest.raises(
        ImportConfigError, match=r"is not clear|not a label for each class|not numbered from 0|one label"
    ):
        read_export(folder)


def test_labels_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    """Of a config edited in one place only, the wrong class may be AI."""
    preprocessor = HALF | {"resample": 3, "size": {"height": 32, "width": 32}}
    for numbers in ({"human": 0, "artificial": 1}, {"human": "0", "artificial": "1"}, {}, None):  # AutoTrain's are text
        assert read_export(export(tmp_path, preprocessor, FAKE | {"label2id": numbers})).output.ai == 1
    for numbers in ({"human": 1, "artificial": 0}, {"artificial": 2}):
        with pytest.raises(ImportConfigError, match="id2label and label2id contradict each other"):
            read_export(export(tmp_path, preprocessor, FAKE | {"label2id": numbers}))
    with pytest.raises(ImportConfigError, match="of another kind"):
        read_export(export(tmp_path, preprocessor, FAKE | {"label2id": ["human", "artificial"]}))


def test_an_export_may_have_been_edited_on_windows(tmp_path: Path) -> None:
    folder = export(tmp_path, HALF | {"resample": 3, "size": {"height": 32, "width": 32}})
    for file in folder.iterdir():
        file.write_text(file.read_text().replace(", ", ",\r\n"), "utf-8-sig")
    assert read_export(folder).output.ai == 1


def test_labels_that_do_not_exclude_each_other_are_logistic_each(tmp_path: Path) -> None:
    config = FAKE | {"problem_type": "multi_label_classification"}
    folder = export(tmp_path, HALF | {"resample": 3, "size": {"height": 32, "width": 32}}, config)
    assert read_export(folder).output.kind == "sigmoid"
