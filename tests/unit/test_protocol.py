from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import patchscan.dataset.matched
from patchscan.dataset.audit import audit
from patchscan.dataset.index import build_index
from patchscan.dataset.matched import (
    GRID,
    MatchedData,
    ProtocolError,
    Settings,
    build_matched,
    matched_version,
    originals,
    plan_matched,
    protocol_of,
)
from patchscan.dataset.source import DataError
from patchscan.detector.images import decode
from tests.image_tree import jpeg_versus_png, picture, write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = jpeg_versus_png(tmp_path_factory.mktemp("biased"))
    build_index(root, workers=1)
    return root


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the matched version, which no test changes."""
    return tmp_path_factory.mktemp("matched") / "out"


@pytest.fixture(scope="module")
def matched(data: Path, out: Path) -> MatchedData:
    return build_matched(data, out, Settings(size=64), workers=1)


@pytest.mark.slow
def test_the_matched_version_of_a_biased_data_set_is_fair(matched: MatchedData) -> None:
    found = audit(matched.index.table)
    assert [one.verdict for one in found.generators] == ["fair"], found.warnings
    assert set(matched.index.table["generator"]) == {"biggan"}
    assert set(
        matched.index.table[["format", "width", "height", "jpeg_subsampling"]].itertuples(index=False, name=None)
    ) == {("JPEG", 64, 64, "4:4:4")}


@pytest.mark.slow
def test_crops_are_the_sources_own_pixels_encoded_once_more(data: Path, matched: MatchedData, out: Path) -> None:
    crop = matched.crops[matched.crops["class"] == "nature"].iloc[0]
    source = decode((data / crop["source"]).read_bytes()).rgb
    written = decode((out / crop["path"]).read_bytes())
    assert (written.jpeg_quality, written.jpeg_subsampling) == (crop["quality"], "4:4:4")
    pixels = source[crop["y"] : crop["y"] + 64, crop["x"] : crop["x"] + 64]
    assert np.abs(written.rgb.astype(int) - pixels).mean() < 4


def test_lossless_images_get_the_first_compression_of_the_photographs(matched: MatchedData) -> None:
    crops = matched.crops
    fakes, real = crops[crops["class"] == "ai"], crops[crops["class"] == "nature"]
    assert real["first_quality"].isna().all()
    assert fakes["first_quality"].between(75, 96).all()
    assert set(fakes["first_subsampling"]) == {"4:2:0"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    data: Path, matched: MatchedData, tmp_path: Path
) -> None:
    others = [build_matched(data, tmp_path / str(seed), Settings(size=64, seed=seed), workers=1) for seed in (0, 1)]
    digests = [one.index.table.set_index("path")["sha256"] for one in (matched, *others)]
    pd.testing.assert_series_equal(digests[0], digests[1])
    assert not digests[0].equals(digests[2])


def test_an_interrupted_match_makes_only_the_missing_crops(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Callable[..., None] = patchscan.dataset.matched._write_crop
    made: list[object] = []

    def counted(*arguments: object) -> None:
        made.append(arguments)
        make(*arguments)

    def stopped(*arguments: object) -> None:
        if len(made) == 10:
            raise KeyboardInterrupt
        counted(*arguments)

    monkeypatch.setattr(patchscan.dataset.matched, "_write_crop", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_matched(data, tmp_path / "out", Settings(size=64), workers=1)
    monkeypatch.setattr(patchscan.dataset.matched, "_write_crop", counted)
    crops = build_matched(data, tmp_path / "out", Settings(size=64), workers=1).crops
    assert len(made) == len(crops) == len(list((tmp_path / "out").glob("*/*/*/*.jpg")))


def test_a_folder_of_other_settings_or_other_content_is_refused(
    data: Path, matched: MatchedData, out: Path, tmp_path: Path
) -> None:
    with pytest.raises(ProtocolError, match="other settings"):
        build_matched(data, out, Settings(size=96), workers=1)
    write(tmp_path / "mine" / "photo.png", picture(0))
    with pytest.raises(ProtocolError, match="not empty"):
        build_matched(data, tmp_path / "mine", Settings(size=64), workers=1)
    with pytest.raises(ProtocolError, match="lies within"):
        build_matched(data, data / "matched", Settings(size=64), workers=1)
    with pytest.raises(ProtocolError, match="smaller --size"):
        build_matched(data, tmp_path / "large", Settings(size=512), workers=1)
    write(tmp_path / "fakes/gan/train/ai/0.png", picture(0))
    with pytest.raises(ProtocolError, match="where no class is missing"):
        build_matched(tmp_path / "fakes", tmp_path / "one class", Settings(size=64), workers=1)
    assert (protocol_of(out), protocol_of(data)) == ("matched", "raw")


def test_another_programs_file_of_that_name_makes_no_matched_version(data: Path, tmp_path: Path) -> None:
    """A data set with a protocol.json of its own was called matched, on the cards of models that it trained."""
    for text in ("{}", '{"protocol": "HTTP"}', "[1]", "no JSON", "[" * 100_000):
        (tmp_path / "protocol.json").write_text(text)
        assert protocol_of(tmp_path) == "raw"
        assert originals(tmp_path) is None
        with pytest.raises(ProtocolError, match="made of other data or with other settings"):
            build_matched(data, tmp_path, Settings(size=64), workers=1)
        assert (tmp_path / "protocol.json").read_text() == text


def test_the_matched_version_is_built_once_beside_the_data(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(4):
        for label in ("ai", "nature"):
            write(data / "gan" / "train" / label / f"{number}.png", picture(number, 256, 256))
    built = Path(matched_version(data))
    assert (built, protocol_of(built)) == (tmp_path / "data-matched", "matched")
    before = {file: file.stat().st_mtime_ns for file in built.rglob("*.jpg")}
    assert before
    assert matched_version(built) == built
    next(iter(before)).unlink()
    assert matched_version(data) == built
    after = {file: file.stat().st_mtime_ns for file in built.rglob("*.jpg")}
    assert before.keys() == after.keys()
    assert sum(after[file] != before[file] for file in before) == 1


def test_a_matched_version_keeps_the_settings_it_was_made_with(data: Path, tmp_path: Path) -> None:
    build_matched(data, tmp_path / "small", Settings(size=48, seed=3), workers=1)
    matched_version(data, tmp_path / "small")
    assert set(build_index(tmp_path / "small", workers=1).table["width"]) == {48}


def test_what_is_not_used_is_listed_with_its_reason(tmp_path: Path) -> None:
    gan = tmp_path / "data" / "gan"
    for number in range(4):
        write(gan / "train" / "ai" / f"{number}.png", picture(number))
        write(gan / "train" / "nature" / f"{number}.jpg", picture(10 + number))
    write(gan / "train" / "ai" / "small.png", picture(20, 63, 64))
    write(gan / "train" / "ai" / "surplus.png", picture(21))
    write(gan / "val" / "ai" / "copy.png", picture(0))
    write(gan / "val" / "ai" / "own.png", picture(22))
    write(gan / "val" / "nature" / "own.jpg", picture(23))
    matched = build_matched(tmp_path / "data", tmp_path / "out", Settings(size=64), workers=1)
    reasons = matched.left_out.groupby("reason")["path"].apply(list).to_dict()
    assert reasons["smaller than 64 x 64"] == ["gan/train/ai/small.png"]
    assert reasons["a copy of a training image"] == ["gan/val/ai/copy.png"]
    assert len(reasons["more of its class than of the other"]) == 1
    used = [*matched.crops["source"], *matched.left_out["path"]]
    assert sorted(used) == sorted(path.relative_to(tmp_path / "data").as_posix() for path in gan.glob("*/*/*.*"))


SIDES = st.integers(16, 80)
ROWS = st.lists(
    st.tuples(st.sampled_from("ab"), st.booleans(), st.booleans(), SIDES, SIDES, st.booleans()), max_size=40
)


@pytest.mark.slow
@settings(max_examples=30)
@given(ROWS, st.integers(0, 3), st.integers(60, 100))
def test_plans_are_balanced_on_the_grid_and_keep_the_splits_apart(
    rows: list[tuple[str, bool, bool, int, int, bool]], seed: int, low: int
) -> None:
    index = pd.DataFrame(
        [
            (
                f"{n}",
                g,
                "train" if t else "val",
                "ai" if a else "nature",
                w,
                h,
                90.0 if j else None,
                "4:2:0" if j else None,
                f"{n}",
            )
            for n, (g, t, a, w, h, j) in enumerate(rows)
        ],
        columns=[
            "path",
            "generator",
            "split",
            "class",
            "width",
            "height",
            "jpeg_quality",
            "jpeg_subsampling",
            "sha256",
        ],
    )
    wanted = Settings(size=32, qualities=(low, 100), seed=seed)
    crops, left_out = plan_matched(index, wanted)
    pd.testing.assert_frame_equal(crops, plan_matched(index, wanted)[0])
    assert sorted([*crops["source"], *left_out["path"]]) == sorted(index["path"])
    assert crops["path"].is_unique
    source = index.set_index("path").loc[crops["source"]]
    for column in ("generator", "split", "class"):
        assert (source[column].to_numpy() == crops[column].to_numpy()).all()
    for side, corner in (("width", "x"), ("height", "y")):
        assert (crops[corner] % GRID == 0).all()
        assert (crops[corner].to_numpy() + 32 <= source[side].to_numpy()).all()
    for _, group in crops.groupby(["generator", "split"]):
        assert (group["class"] == "ai").sum() == (group["class"] == "nature").sum()
    assert crops["quality"].between(low, 100).all()


def test_a_source_that_changed_since_it_was_indexed_stops_the_build(tmp_path: Path) -> None:
    for label in ("ai", "nature"):
        write(tmp_path / "data" / "gan" / "train" / label / "0.png", picture(len(label)))
    build_index(tmp_path / "data", workers=1)
    (tmp_path / "data" / "gan" / "train" / "ai" / "0.png").write_bytes(b"gone bad")
    with pytest.raises(DataError, match=r"0\.png changed"):
        build_matched(tmp_path / "data", tmp_path / "out", Settings(size=64), workers=1)
