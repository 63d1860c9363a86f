import contextlib
import copy
import io
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

import patchscan.dataset.index
from patchscan.common.errors import UserError
from patchscan.common.files import sha256_of
from patchscan.dataset.image_facts import describe_image
from patchscan.dataset.index import (
    INDEX_COLUMNS,
    IndexFileError,
    build_index,
    data_digest,
    default_index_path,
    load_index,
)
from patchscan.dataset.layout import LayoutError, SourceFile, classify_path, find_files, generator_name
from patchscan.dataset.source import DataSource, UnreadableError
from patchscan.detector.decoders import DecoderPool
from patchscan.detector.images import ErrorCode, decode
from patchscan.evaluation.evaluate import validation_images
from patchscan.storage.store import FailureCode
from tests.image_tree import picture, write
from tests.poisonous import CRASH, POISONED, bmp

Describe = Callable[[bytes], dict[str, object]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two generators, twelve images: PNG fakes, JPEG photographs."""
    for number in range(12):
        generator = ("imagenet_ai_0424_sdv5", "my_gan")[number % 2]
        split = ("train", "val")[number // 2 % 2]
        label, ending = (("ai", "png"), ("nature", "jpg"))[number // 4 % 2]
        write(tmp_path / "data" / generator / split / label / f"{number}.{ending}", picture(number))
    return tmp_path / "data"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that an index reads."""
    names: list[str] = []
    read = patchscan.dataset.index.read_file

    def counted(source: DataSource, describe: Describe, file: SourceFile) -> dict[str, object]:
        names.append(Path(file.path).name)
        return read(source, describe, file)

    monkeypatch.setattr(patchscan.dataset.index, "read_file", counted)
    return names


@pytest.mark.parametrize(
    ("folder", "generator"),
    [
        ("imagenet_ai_0419_biggan", "biggan"),
        ("imagenet_ai_0424_sdv5", "sd_v1_5"),
        ("imagenet_ai_0419_sdv4", "sd_v1_4"),
        ("imagenet_ai_0508_adm", "adm"),
        ("imagenet_glide", "glide"),
        ("imagenet_midjourney", "midjourney"),
        ("imagenet_ai_0419_vqdm", "vqdm"),
        ("imagenet_ai_0424_wukong", "wukong"),
        ("stable_diffusion_v_1_5", "sd_v1_5"),
        ("BigGAN", "biggan"),
        ("stylegan2_ada", "stylegan2_ada"),
        ("Our Own GAN", "Our Own GAN"),
    ],
)
def test_folder_names_become_generators(folder: str, generator: str) -> None:
    assert generator_name(folder) == generator


@pytest.mark.parametrize("place", ["", "imagenet_glide", "GLIDE/imagenet_glide"])
def test_layout_is_found_as_archives_unpack(tmp_path: Path, place: str) -> None:
    root = tmp_path / "glide"
    write(root / place / "train" / "nature" / "n01440764" / "a.JPEG", picture(0))
    write(root / place / "train" / "nature" / ".hidden.JPEG", picture(0))
    (source,) = find_files(root).files
    assert (source.generator, source.split, source.label) == ("glide", "train", "nature")
    assert (root / source.path).exists()


@pytest.mark.parametrize("content", [None, "readme.txt", "train/ai"])
def test_a_folder_in_another_layout_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "data" / content).mkdir(parents=True)
    with pytest.raises(LayoutError, match="generator"):
        build_index(tmp_path / "data", tmp_path / "index.parquet")


def test_a_folder_that_is_none_or_holds_no_data_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    written(tmp_path / "photos/a.png")
    with pytest.raises(LayoutError, match="misspelt is not a folder"):
        load_index(tmp_path / "misspelt")
    with pytest.raises(LayoutError, match="in no layout"):
        load_index(tmp_path / "photos")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "photos"]


# As data sets come: folders, and generator, split and class that are read from them.
LAYOUTS = {
    "biggan/train/ai/a.png": ("biggan", "train", "ai"),
    "BigGAN/imagenet_ai_0419_biggan/val/nature/a.png": ("biggan", "val", "nature"),
    "Train/AI/a.png": ("set", "train", "ai"),
    "gan/Val/Nature/deep/er/a.png": ("gan", "val", "nature"),
    "train/REAL/a.png": ("set", "train", "nature"),  # CIFAKE
    "test/FAKE/a.png": ("set", "val", "ai"),
    "test/progan/airplane/0_real/a.png": ("progan", "val", "nature"),  # ForenSynths
    "train/stylegan/1_fake/a.png": ("stylegan", "train", "ai"),
    "diffusion_datasets/ldm_200/1_fake/a.png": ("ldm_200", "val", "ai"),  # UniversalFakeDetect
    "real/a.png": ("set", "val", "nature"),
    "fake/train/a.png": ("set", "train", "ai"),
    "fake/sg/train/a.png": ("sg", "train", "ai"),
    "real/ffhq/test/faces/a.png": ("ffhq", "val", "nature"),
    "fake/stylegan/ffhq/test/a.png": ("stylegan", "val", "ai"),
    "progan/1_fake/cat/train/a.png": ("progan", "train", "ai"),
    "deepfake/real/c23/train/a.png": ("deepfake", "train", "nature"),
    "sg/fake/train/a.png": ("sg", "train", "ai"),
    "one/level/too/deep/train/ai/a.png": ("deep", "train", "ai"),
    "real/train/ai/a.png": ("real", "train", "ai"),  # a split with a class in it says more than a name above
    "gan/validation/synthetic/a.png": ("gan", "val", "ai"),
    "dev/real/a.png": ("set", "val", "nature"),
    "gan/train/unsorted/a.png": None,
    "gan/train/.ai/a.png": None,
    "ai.png": None,
}


@pytest.mark.parametrize("path", LAYOUTS)
def test_layouts_of_other_data_sets_are_read(path: str) -> None:
    place = classify_path(path, "set")
    assert (place and place[:3]) == LAYOUTS[path]


def test_what_is_read_otherwise_or_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("gan/train/ai/a.png", "gan/test/real/b.png", "gan/odd/c.PNG", "flat/fake/d.png"):
        write(tmp_path / path, picture(0))
    (tmp_path / "labels.csv").touch()
    (tmp_path / "gan/train/ai/loop").symlink_to(tmp_path)
    index = build_index(tmp_path, workers=1)
    told = capsys.readouterr().err
    assert sorted(index.table["path"]) == ["flat/fake/d.png", "gan/test/real/b.png", "gan/train/ai/a.png"]
    assert "LEFT OUT: 1 image in no folder that names a class, such as gan/odd/c.PNG" in told
    assert "1 image in no folder called train or val: read as val" in told
    assert "1 image in folders called test: read as val" in told


@pytest.mark.parametrize("name", ["2.jfif", "2.JPE", "2.jif", "2.mpo", "2.dib", "2.hif", "2"])
def test_images_of_every_name_are_told_where_they_are_left_out(tmp_path: Path, name: str) -> None:
    for path in (
        "train/ai/1.png",
        f"train/human/{name}",
        "README",
        "labels.csv",
        ".cache/a.png",
        "index.parts/1.parquet",
        "sd.index.parts/1.parquet",
    ):
        write(tmp_path / path, picture(0)) if path.endswith("png") else written(tmp_path / path)
    (note,) = find_files(tmp_path).notes
    assert note.startswith(f"LEFT OUT: 1 image in no folder that names a class, such as train/human/{name}: ")


def written(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"something")


def test_files_that_are_not_called_images_are_told_where_they_are_left_out(tmp_path: Path) -> None:
    for path in ("train/ai/1.any", "train/human/2.img", "train/human/1.img"):
        written(tmp_path / path)
    (note,) = find_files(tmp_path).notes
    assert note.startswith("LEFT OUT: 2 files in no folder that names a class, and not called as images are")
    assert note.endswith("such as train/human/1.img")


def test_links_that_lead_to_each_other_are_followed_once(tmp_path: Path) -> None:
    for generator, other in (("one", "two"), ("two", "one")):
        write(tmp_path / generator / "val/ai/1.png", picture(0))
        (tmp_path / generator / "val/ai/more").symlink_to(tmp_path / other)
    paths = [file.path for file in find_files(tmp_path).files]
    assert paths == [f"{one}/val/ai/{path}" for one in ("one", "two")
                     for path in ("1.png", "more/val/ai/1.png")]  # fmt: skip


def test_a_generator_that_no_list_with_commas_can_name_is_told(tmp_path: Path) -> None:
    for generator in ("flux, dev", "flux"):
        for label in ("ai", "nature"):
            write(tmp_path / generator / "val" / label / "1.png", picture(0))
    (note,) = find_files(tmp_path).notes
    assert note.startswith("'flux, dev' has a comma, or begins or ends with a blank: options that take several")


def test_classes_above_generators_above_splits(tmp_path: Path) -> None:
    for path in ("fake/sg/train/1.png", "fake/sg/test/2.png", "real/ffhq/train/3.png", "real/ffhq/val/4.png"):
        written(tmp_path / path)
    layout = find_files(tmp_path)
    assert [file.generator for file in layout.files] == ["sg", "sg", "ffhq", "ffhq"]
    assert [file.split for file in layout.files] == ["val", "train", "train", "val"]
    test, pairs = layout.notes
    assert test == "1 image in folders called test: read as val"
    assert pairs.startswith("no generator has images of both classes")
    assert pairs.endswith("beside those of sg")


def test_objects_that_may_be_taken_for_generators_are_told(tmp_path: Path) -> None:
    forensynths = ("progan/airplane/0_real", "progan/bird/1_fake", "cyclegan/apple/1_fake", "biggan/0_real")
    others = ("BigGAN/imagenet_ai_0419_biggan/ai", "ADM/imagenet_ai_0508_adm/ai", "one/ai", "one/too/deep/real")
    for place in (*forensynths, *others):
        written(tmp_path / ("f" if place in forensynths else "o") / place / "a.png")
    (objects,) = (note for note in find_files(tmp_path / "f").notes if "are read as generators" in note)
    assert objects.startswith("airplane, bird are read as generators; if progan is one, move all into a folder called")
    assert not any("are read as generators" in note for note in find_files(tmp_path / "o").notes)
    (tmp_path / "f").rename(tmp_path / "test")
    assert {file.generator for file in find_files(tmp_path).files if file.path.startswith("test")} == {
        "progan",
        "cyclegan",
        "biggan",
    }


@pytest.mark.parametrize("place", ["metadata.csv", "coco/metadata.csv", "part-1/part-1.json"])
def test_a_list_of_labels_is_seen_where_no_folder_names_a_class(tmp_path: Path, place: str) -> None:
    written(tmp_path / "images/a.png")
    with pytest.raises(LayoutError) as without:
        find_files(tmp_path)
    written(tmp_path / place)
    with pytest.raises(LayoutError, match=f"if {place} says it, see --labels of `patchscan evaluate`"):
        find_files(tmp_path)
    assert "--labels" not in str(without.value)


def test_a_data_set_without_classes_says_what_their_folders_are_called(tmp_path: Path) -> None:
    write(tmp_path / "train" / "cats" / "1.png", picture(0))
    with pytest.raises(LayoutError, match=r"none of its 1 image, such as train/cats/1.png.*called ai, fake, 1_fake"):
        build_index(tmp_path)


def test_a_file_on_which_a_decoder_dies_is_quarantined(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "my_gan/val/ai/crash.bmp").write_bytes(bmp(CRASH))
    for name, value in POISONED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(patchscan.dataset.index, "decoder_pool", lambda: DecoderPool(1))
    index = build_index(data, workers=2)
    assert len(index.table) == 12
    (row,) = index.quarantine.to_dict("records")
    assert (row["path"], row["code"]) == ("my_gan/val/ai/crash.bmp", "decoder_died")
    assert row["message"] == "the decoder crashed (SIGSEGV)"


def test_a_file_on_which_a_library_fails_is_quarantined(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As good as any function that raises.
    monkeypatch.setattr("patchscan.dataset.image_facts.describe_image", operator.truediv)
    kept = build_index(data, workers=1).quarantine
    assert set(kept["code"]) == {"decoder_died"}
    assert kept["message"].str.startswith("TypeError: unsupported operand").all()


def test_every_image_has_its_row(data: Path) -> None:
    table = build_index(data, workers=1).table
    assert list(table.columns) == INDEX_COLUMNS
    assert len(table) == 12
    assert set(table["generator"]) == {"sd_v1_5", "my_gan"}
    row = table.set_index("path").loc["imagenet_ai_0424_sdv5/train/nature/4.jpg"]
    assert (row["split"], row["class"], row["format"]) == ("train", "nature", "JPEG")
    assert (row["width"], row["height"], row["jpeg_quality"], row["jpeg_subsampling"]) == (64, 64, 75, "4:2:0")
    assert row["bytes"] == (data / str(row.name)).stat().st_size
    assert table[table["format"] == "PNG"]["jpeg_quality"].isna().all()
    pd.testing.assert_frame_equal(load_index(data), table)


def test_several_decoders_find_what_one_finds(data: Path, tmp_path: Path) -> None:
    for number in range(60):
        write(data / "my_gan" / "train" / "ai" / f"more{number}.png", picture(100 + number, 16, 16))
    alone = build_index(data, tmp_path / "alone.parquet", workers=1).table
    together = build_index(data, tmp_path / "together" / "index.parquet", workers=2).table
    pd.testing.assert_frame_equal(alone, together)


def test_two_that_build_one_index_at_once_read_each_file_once(data: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: build_index(data, workers=1), range(2))
    assert sorted((first.read, second.read)) == [0, 12]
    pd.testing.assert_frame_equal(first.table, second.table)


def test_broken_files_are_quarantined_and_never_swapped(data: Path) -> None:
    folder = data / "my_gan" / "train" / "ai"
    whole = write(folder / "whole.png", picture(99)).read_bytes()
    broken = {
        "empty.png": (b"", ErrorCode.EMPTY),
        "text.jpg": (b"no picture at all", ErrorCode.NOT_AN_IMAGE),
        "cut.png": (whole[: len(whole) // 2], ErrorCode.TRUNCATED),
    }
    for name, (content, _) in broken.items():
        (folder / name).write_bytes(content)
    index = build_index(data, workers=1)
    kept = index.quarantine.set_index("path")
    assert {Path(str(path)).name: code for path, code in kept["code"].items()} == {
        name: str(code) for name, (_, code) in broken.items()
    }
    assert kept["message"].str.len().min() > 0
    assert set(pq.read_table(data / "quarantine.parquet")["path"].to_pylist()) == set(kept.index)
    assert len(index.table) == 13
    for path, digest in zip(index.table["path"], index.table["sha256"], strict=True):
        assert sha256_of(data / path) == digest


def test_only_new_and_changed_files_are_read_again(data: Path, reads: list[str]) -> None:
    (data / "my_gan" / "train" / "ai" / "empty.png").touch()
    build_index(data, workers=1)
    assert len(reads) == 13
    reads.clear()
    assert build_index(data, workers=1).read == 0
    write(data / "my_gan" / "train" / "ai" / "new.png", picture(50))
    write(data / "my_gan" / "train" / "ai" / "1.png", picture(51))
    (data / "imagenet_ai_0424_sdv5" / "train" / "ai" / "0.png").unlink()
    index = build_index(data, workers=1)
    assert sorted(reads) == ["1.png", "new.png"]
    assert len(index.table) == 12
    assert len(index.quarantine) == 1


def test_an_interrupted_index_goes_on_where_it_stopped(
    data: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = patchscan.dataset.index.read_file

    def stopped(source: DataSource, describe: Describe, file: SourceFile) -> dict[str, object]:
        if len(reads) == 5:
            raise KeyboardInterrupt
        return counted(source, describe, file)

    monkeypatch.setattr(patchscan.dataset.index, "read_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_index(data, workers=1)
    assert not (data / "index.parquet").exists()
    monkeypatch.setattr(patchscan.dataset.index, "read_file", counted)
    index = build_index(data, workers=1)
    assert index.read == 7
    assert sorted(reads) == sorted(Path(path).name for path in index.table["path"])
    assert not (data / "index.parts").exists()


SLOW_INDEX = """
import sys, time
from pathlib import Path
import patchscan.dataset.index as index

read = index.read_file
index.PART_SECONDS = 0

def slow(source, describe, file):
    time.sleep(0.05)
    return read(source, describe, file)

index.read_file = slow
if __name__ == "__main__":
    index.build_index(Path(sys.argv[1]), workers=2)
"""


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A data set of 40 images whose index was killed (-9) in the middle, and the process group it ran in."""
    data, script = tmp_path / "data", tmp_path / "slow_index.py"
    for number in range(40):
        write(data / "gan" / "train" / "ai" / f"{number}.png", picture(number, 16, 16))
    script.write_text(SLOW_INDEX)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, script, data], env=environment, start_new_session=True)
    _wait_until(lambda: list(data.glob("index.parts/*.parquet")))
    process.kill()
    process.wait()
    yield data, process.pid
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_index_keeps_what_it_had_read_and_leaves_no_process(killed: tuple[Path, int]) -> None:
    data, group = killed
    done = sum(pq.read_metadata(part).num_rows for part in data.glob("index.parts/*.parquet"))
    assert 0 < done < 40
    index = build_index(data, workers=1)
    assert (index.read, len(index.table)) == (40 - done, 40)
    _wait_until(lambda: not _group_lives(group))


def _wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_unreadable_file_stops_the_index_with_its_name(data: Path) -> None:
    (data / "my_gan" / "train" / "ai" / "folder.png").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"folder\.png: cannot be read"):
        build_index(data, workers=1)


def test_what_is_no_readable_file_is_quarantined(data: Path) -> None:
    folder = data / "my_gan" / "train" / "ai"
    before, image = len(build_index(data, workers=1).table), next(folder.glob("*.png")).read_bytes()
    os.mkfifo(folder / "pipe.png")
    (folder / "dangling.png").symlink_to("nothing")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(image)
    built = build_index(data, workers=1)
    found = built.quarantine.set_index("path").code
    assert {path.rpartition("/")[2] for path in found[found == "unreadable"].index} == {
        "pipe.png",
        "dangling.png",
        "loop.png",
    }
    assert len(built.table) == before + 1
    assert r"my_gan/train/ai/caf\xe9.png" in set(built.table.path)
    (folder / "nothing").write_bytes(image)
    assert len(build_index(data, workers=1).table) == before + 3


def test_two_indexes_in_one_folder_have_their_own_files(data: Path, tmp_path: Path) -> None:
    """The quarantined files of the second were counted among the images of the first, and were not to be found."""
    (data / "my_gan/val/ai/broken.png").write_bytes(b"no image")
    other = tmp_path / "other"
    for label in ("ai", "nature"):
        write(other / "gan" / "val" / label / "1.png", picture(1))
    (other / "gan/val/ai/bad.png").write_bytes(b"no image either")
    built = {folder: build_index(folder, tmp_path / f"{folder.name}.parquet", workers=1) for folder in (data, other)}
    for folder, index in built.items():
        assert set(validation_images(folder, index_file=index.path).path) == {
            file.path for file in find_files(folder).files if file.split == "val"
        }
        assert build_index(folder, index.path, workers=1).read == 0
    files = {"data.parquet", "data.quarantine.parquet", "data.duplicates.parquet"}
    assert files <= {path.name for path in tmp_path.iterdir()}


def test_an_index_that_cannot_be_written_says_what_to_do(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out"):
        build_index(data, tmp_path / "file" / "index.parquet")


def test_without_a_home_folder_the_index_wants_a_name(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user without a name, in a container with read-only data."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "access", lambda *_, **options: False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    with pytest.raises(IndexFileError, match="there is no home folder for its index: name it"):
        default_index_path(data)


def test_digest_names_the_training_data_and_nothing_else(data: Path) -> None:
    table = build_index(data, workers=1).table
    digest = data_digest(table)
    assert data_digest(table.sample(frac=1, random_state=0).assign(width=0)) == digest
    assert data_digest(table.iloc[1:]) != digest
    assert data_digest(table.assign(split="val")) != digest


def test_another_file_in_the_indexs_place_is_kept(data: Path) -> None:
    place = data / "index.parquet"
    place.write_text("my notes")
    with pytest.raises(IndexFileError, match=r"index\.parquet is in the index's place and is none"):
        build_index(data, workers=1)
    table = pa.table({"mine": [1]})
    pq.write_table(table, place)
    with pytest.raises(IndexFileError, match="move it, or delete it"):
        build_index(data, workers=1)
    assert pq.read_table(place).equals(table)


@pytest.mark.parametrize("quality", [1, 2, 10, 37, 49, 50, 51, 75, 85, 90, 95, 96, 99, 100])
def test_jpeg_quality_is_read_exactly_from_libjpegs_tables(quality: int) -> None:
    image = decode(_jpeg(quality=quality))
    assert (image.jpeg_quality, image.jpeg_subsampling) == (quality, "4:2:0")


@pytest.mark.parametrize(("mode", "save", "expected"), [
    ("RGB", {"subsampling": "4:4:4"}, "4:4:4"),
    ("RGB", {"subsampling": "4:2:2"}, "4:2:2"),
    ("L", {}, "grey"),
    ("CMYK", {}, "other"),
])  # fmt: skip
def test_subsampling_is_read_from_the_frame_header(mode: str, save: dict[str, str], expected: str) -> None:
    assert decode(_jpeg(mode, **save)).jpeg_subsampling == expected


def test_a_jpegs_settings_are_read_beside_a_damaged_profile() -> None:
    jpeg = _jpeg(quality=80)
    damaged = jpeg[:2] + b"\xff\xe2\0\x0eICC_PROFILE\0" + jpeg[2:]
    assert describe_image(damaged) == describe_image(jpeg)


def test_quality_of_foreign_tables_is_the_nearest() -> None:
    reference = JpegImageFile(io.BytesIO(_jpeg(quality=80))).quantization
    tables = {key: (np.array(table) + np.arange(64) % 2).tolist() for key, table in reference.items()}
    quality = decode(_jpeg(qtables=tables)).jpeg_quality
    assert quality is not None
    assert abs(quality - 80) <= 3


def _jpeg(mode: str = "RGB", **save: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(1)).convert(mode).save(buffer, "JPEG", **save)
    return buffer.getvalue()


@pytest.mark.parametrize(("code", "exit_code"), [(FailureCode.VANISHED, 2), (FailureCode.UNAVAILABLE, 75)])
def test_a_file_that_cannot_be_read_is_told_across_processes(code: FailureCode, exit_code: int) -> None:
    error = copy.copy(UnreadableError(code, "a.png is gone"))  # by way of what pickle takes too
    assert (error.code, error.exit_code, str(error)) == (code, exit_code, "a.png is gone")
