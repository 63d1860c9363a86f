import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from patchscan.dataset.audit import audit
from patchscan.dataset.index import build_index
from tests.image_tree import jpeg_versus_png


def index_of(count: int = 80, generator: str = "gan", **ai: Any) -> pd.DataFrame:
    """An index of photographs alike in everything, and of AI images that differ in the columns given."""
    random = np.random.default_rng(0)
    width = random.choice([320, 500, 640], 2 * count)
    table = pd.DataFrame(
        {
            "generator": generator,
            "class": ["nature", "ai"] * count,
            "format": "JPEG",
            "width": width,
            "height": width * 3 // 4,
            "jpeg_quality": random.integers(80, 99, 2 * count).astype(float),
            "jpeg_subsampling": random.choice(["4:2:0", "4:4:4"], 2 * count),
            "bytes": (width**2 * random.uniform(0.1, 0.3, 2 * count)).astype(int),
        }
    )
    for column, value in ai.items():
        table.loc[table["class"] == "ai", column] = value
    return table


@pytest.mark.slow
def test_a_jpeg_versus_png_data_set_is_called_biased(tmp_path: Path) -> None:
    found = audit(build_index(jpeg_versus_png(tmp_path), workers=1).table)
    (biggan,) = found.generators
    assert found.biased
    assert biggan.verdict == "biased"
    assert biggan.storage.low is not None
    assert biggan.storage.low > 0.9
    (warning,) = found.warnings
    assert warning.startswith("BIASED DATA: biggan")
    assert "format alone 1.00 (AI PNG in 100 %, real JPEG in 100 %)" in warning
    assert "AI 96x96 in 100 %" in warning
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert written["biased"] is True
    assert written["generators"][0]["clues"]["format"]["value"] == 1.0


def test_alike_files_are_called_fair() -> None:
    found = audit(index_of())
    assert [one.verdict for one in found.generators] == ["fair"]
    assert found.warnings == []
    assert not found.biased


@pytest.mark.slow
def test_each_clue_is_found_and_named() -> None:
    for column, value, name in (
        ("format", "WEBP", "format"),
        ("width", 512, "size"),
        ("jpeg_quality", 89.0, "JPEG quality"),  # the middle of the photographs' range: no threshold finds it
        ("jpeg_subsampling", "4:2:2", "chroma subsampling"),
    ):
        differing: dict[str, Any] = {column: value}
        (warning,) = audit(index_of(**differing)).warnings
        assert warning.startswith("BIASED DATA: gan")
        assert f"{name} alone" in warning


def test_bytes_alone_are_a_caution_because_content_may_explain_them() -> None:
    table = index_of()
    table["bytes"] = table["bytes"].where(table["class"] == "nature", table["bytes"] // 2)
    found = audit(table)
    assert not found.biased
    (warning,) = found.warnings
    assert warning.startswith("CAUTION: gan")
    assert "bytes per pixel alone" in warning


@pytest.mark.slow
def test_each_generator_is_audited_so_that_biases_cannot_cancel_and_is_named_once() -> None:
    b = index_of(generator="b", format="PNG")
    b["class"] = b["class"].map({"ai": "nature", "nature": "ai"})
    found = audit(pd.concat([index_of(generator="a", format="PNG"), b], ignore_index=True))
    assert {one.generator: one.verdict for one in found.generators} == {"a": "biased", "b": "biased", "all": "fair"}
    (warning,) = found.warnings  # a card has one sentence for all generators of one verdict
    assert warning.startswith("BIASED DATA: a, b: ")
    assert "AUC 1.00 to 1.00" in warning
    for one in found.generators[:2]:
        assert "format alone" in one.warning, "each with its clue in `patchscan audit`"


def test_one_class_alone_is_not_audited_and_says_so() -> None:
    table = index_of()
    found = audit(table[table["class"] == "ai"])
    assert found.generators[0].verdict == "unknown"
    assert found.warnings == ["NOT AUDITED: gan has 80 AI and 0 real images; 5 of each are needed."]
