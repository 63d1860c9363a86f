"""The same pixels get the same patches, score and row, whatever the file around them."""

import struct
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, PngImagePlugin

from patchscan.common.shipped import shipped
from patchscan.dataset.source import DataSource
from patchscan.detector.answer import Answer
from patchscan.detector.detector import Detector
from patchscan.evaluation.disturbances import disturbances
from patchscan.evaluation.explain import explain
from patchscan.evaluation.scoring import score_images
from patchscan.scanning.plan import ScanSource
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.scorers import InProcessScorer
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.training.batches import CropDataset
from patchscan.training.recipe import load_recipe
from tests.scan_kit import table_of
from tests.serving_kit import encoded, picture

STARTER = shipped("model_store") / "ssp-lite"


def exif(text: str) -> Image.Exif:
    made = Image.Exif()
    made[0x010F], made[0x0112] = text, 6  # maker and an orientation, which is not applied
    return made


TEXT_CHUNK = struct.pack(">I4s3sI", 3, b"tEXt", b"a\0b", zlib.crc32(b"tEXta\0b"))


def palettes() -> dict[str, bytes]:
    """One picture of 64 colours."""
    photo = Image.fromarray(picture(3, 300, 200)).quantize(64)
    plain = encoded(photo, "PNG")
    return {
        "plain.png": plain,
        "text first.png": plain[:8] + TEXT_CHUNK + plain[8:],
        "true colours.png": encoded(photo.convert("RGB"), "PNG"),
        "x.bmp": encoded(photo, "BMP"),
    }


def lossless() -> dict[str, bytes]:
    """One picture in many wrappings that lose nothing."""
    photo = Image.fromarray(picture(1, 300, 200))
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "holiday")
    plain = encoded(photo, "PNG")
    return {
        "plain.png": plain,
        "text first.png": plain[:8] + TEXT_CHUNK + plain[8:],
        "other compression.png": encoded(photo, "PNG", compress_level=1),
        "text.png": encoded(photo, "PNG", pnginfo=text),
        "exif.png": encoded(photo, "PNG", exif=exif("camera")),
        "appended.png": encoded(photo, "PNG") + b"more",
        "alpha.png": encoded(photo.convert("RGBA"), "PNG"),
        "x.bmp": encoded(photo, "BMP"),
        "x.webp": encoded(photo, "WEBP", lossless=True),
        "x.tiff": encoded(photo, "TIFF"),
        "deflated.tiff": encoded(photo, "TIFF", compression="tiff_deflate"),
    }


def jpegs() -> dict[str, bytes]:
    """One JPEG, its pixels untouched, with other metadata."""
    photo = Image.fromarray(picture(2, 300, 200))
    plain = encoded(photo, "JPEG", quality=88)
    return {
        "plain.jpg": plain,
        "exif.jpg": encoded(photo, "JPEG", quality=88, exif=exif("camera")),
        "other exif.jpg": encoded(photo, "JPEG", quality=88, exif=exif("another")),
        "comment.jpg": encoded(photo, "JPEG", quality=88, comment=b"holiday"),
        **{f"appended {number}.jpg": plain + bytes([number]) for number in range(4)},
    }


SETS = [lossless(), jpegs(), palettes()]


def without_format(answer: Any) -> dict[str, Any]:
    assert isinstance(answer, Answer), answer
    values = asdict(answer)
    return values | {"image": {**values["image"], "format": ""}}


@pytest.fixture(scope="module")
def starter() -> Detector:
    return Detector.load(STARTER)


@pytest.mark.parametrize("files", SETS, ids=["lossless", "jpeg", "palette"])
def test_one_picture_has_one_answer(starter: Detector, files: dict[str, bytes]) -> None:
    first, *others = [without_format(one) for one in starter.score(list(files.values()))]
    assert others == [first] * len(others)


@pytest.mark.parametrize("files", SETS, ids=["lossless", "jpeg", "palette"])
def test_one_picture_has_one_row_where_the_worker_cuts_the_crops(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "photos").mkdir()
    for name, data in files.items():
        (tmp_path / "photos" / name).write_bytes(data)
    scorer, out = InProcessScorer(STARTER), open_store(str(tmp_path / "out"))
    made = plan_scan(ScanRequest(source=ScanSource(url=str(tmp_path / "photos")), card=scorer.card), out)
    Worker(made, out, scorer, WorkSettings(select="worker")).work(0)
    rows = table_of(out, made.scan)
    assert len(rows) == len(files)
    assert len({(row["logit"], row["p_ai"], row["verdict"], *row["patch"].values()) for row in rows.values()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("files", SETS, ids=["lossless", "jpeg", "palette"])
def test_evaluation_sees_one_picture(starter: Detector, tmp_path: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    table = pd.DataFrame({"path": list(files)})
    table = table.assign(generator="g", split="val", label=1)
    table["class"] = "ai"
    scores = score_images(starter, lambda path: files[path], table, "test")
    assert scores.logit.nunique() == 1
    validated = CropDataset(DataSource(tmp_path), table, load_recipe("ssp-lite"))
    assert all((validated[row][0] == validated[0][0]).all() for row in range(len(table)))
    for disturbance in (one for one in disturbances() if one.family == "noise"):  # the only random one
        assert len({disturbance.disturb(data) for data in files.values()}) == 1, disturbance.label


def test_an_explanation_is_of_the_picture(starter: Detector) -> None:
    files = lossless()
    one, other = (explain(starter, files[name], redraws=3) for name in ("plain.png", "x.bmp"))
    assert one.alternative_p_ai.tolist() == other.alternative_p_ai.tolist()
    assert one.views[0].chosen.tolist() == other.views[0].chosen.tolist()  # type: ignore[union-attr]


def test_another_picture_gets_other_patches(starter: Detector) -> None:
    changed = picture(1, 300, 200)
    changed[::2] = 255 - changed[::2]
    first, second = (
        starter.prepare(data).crops.corners
        for data in (lossless()["plain.png"], encoded(Image.fromarray(changed), "PNG"))
    )
    assert not np.array_equal(first, second)
