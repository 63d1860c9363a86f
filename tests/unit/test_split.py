"""`patchscan split`: what is held out is a share of each generator, and no source of it is trained on."""

import shutil
from pathlib import Path
from zlib import crc32

import pandas as pd
import pytest

from patchscan.common.files import sha256_of
from patchscan.dataset.layout import find_files
from patchscan.dataset.split import SplitError, split
from tests.image_tree import picture, write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two data sets: `one` of a generator from nine collections and a generator from one collection, whose sources
    come twice; `two` of real images alone, from a collection that `one` has as well."""
    rows = []
    for number in range(18):
        for name, collection in (("many", f"owner/c{number // 2}"), ("few", "owner/all")):
            for label in ("ai", "nature"):
                file = f"one/{name}/val/{label}/{number}.png"
                rows.append((file, f"{collection}/{label}{number // 2}.png"))
                write(tmp_path / file, picture(crc32(file.encode())))
        write(tmp_path / f"one/many/train/ai/{number}.png", picture(number))
        rows.append((f"two/art/val/nature/{number}.png", f"owner/c{number // 2}/art{number}.png"))
        write(tmp_path / rows[-1][0], picture(1000 + number))
    pd.DataFrame(rows, columns=["file", "source"]).to_csv(tmp_path / "sources.csv", index=False)
    return tmp_path


def test_a_share_of_each_generator_is_held_out_and_its_sources_nowhere_trained_on(data: Path, tmp_path: Path) -> None:
    images = split([str(data / "one"), str(data / "two")], tmp_path / "all")
    named = images[images.before == "val"]
    shares = (named.after == "val").groupby([named.data, named.generator, named["class"]]).mean()
    assert shares.between(0.2, 0.45).all()
    sources = pd.read_csv(data / "sources.csv").set_index("file").source
    source = (named.data + "/" + named.path).map(sources)
    assert (named.groupby(source).after.nunique() == 1).all()
    many = named[named.generator != "few"]
    assert (many.groupby("collection").after.nunique() == 1).all(), "collections too, in both data sets alike"
    for name, path, label, after in images[["data", "path", "class", "after"]].itertuples(index=False):
        folder = f"train/{label}/from-val" if "/val/" in path and after == "train" else f"{after}/{label}"
        copied = tmp_path / "all" / name / path.split("/")[0] / folder / Path(path).name
        assert copied.read_bytes() == (data / name / path).read_bytes()
    assert len(list((tmp_path / "all").rglob("*.png"))) == len(images)


def test_a_file_and_its_copies_are_on_one_side(tmp_path: Path) -> None:
    """As real images that links put beside each generator; one that is also among the train images is no val image."""
    photos = [write(tmp_path / f"photos/{number}.png", picture(number)) for number in range(30)]
    for generator in ("one", "two"):
        for number, photo in enumerate(photos):
            write(tmp_path / f"data/{generator}/val/ai/{number}.png", picture(crc32(f"{generator}{number}".encode())))
            place = tmp_path / f"data/{generator}/val/nature/{generator}{number}.png"
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(photo)
    (tmp_path / "data/one/train/nature").mkdir(parents=True)
    for photo in photos[::2]:
        (tmp_path / "data/one/train/nature" / photo.name).symlink_to(photo)
    images = split([str(tmp_path / "data")], tmp_path / "all")
    digest = images.path.map(lambda path: sha256_of(tmp_path / "data" / path))
    assert (images.groupby(digest).after.nunique() == 1).all()
    held = images[(images.after == "val") & (images["class"] == "nature")]
    assert held.generator.value_counts().to_dict() == {"one": 11, "two": 11}


def test_a_source_that_is_trained_on_is_not_held_out(data: Path, tmp_path: Path) -> None:
    named = pd.read_csv(data / "sources.csv")
    trained = [f"one/many/train/ai/{number}.png" for number in range(12)]
    sources = [f"owner/c{number // 2}/ai{number // 2}.png" for number in range(12)]
    more = pd.DataFrame({"file": trained, "source": sources})
    pd.concat([named, more]).to_csv(data / "sources.csv", index=False)
    images = split([str(data / "one")], tmp_path / "all")
    source = (images.data + "/" + images.path).map(pd.concat([named, more]).set_index("file").source)
    assert (images.groupby(source).after.nunique() == 1).all()


def test_a_data_set_in_another_layout_can_be_trained_on_afterwards(tmp_path: Path) -> None:
    for number in range(12):
        for label in ("0_real", "1_fake"):
            write(tmp_path / f"test/progan/cat/{label}/{number}.png", picture(crc32(f"{label}{number}".encode())))
    images = split([str(tmp_path / "test")], tmp_path / "all")
    files = find_files(tmp_path / "all" / "test").files
    assert len(files) == len(images) == 24
    assert {(file.generator, file.split, file.label) for file in files} == {
        ("cat", split, label) for split in ("train", "val") for label in ("ai", "nature")
    }


def test_the_choice_is_the_same_again_and_an_interrupted_call_goes_on(data: Path, tmp_path: Path) -> None:
    first = split([str(data / "one")], tmp_path / "all")
    gone, *others = sorted((tmp_path / "all").rglob("*.png"))
    gone.unlink()
    before = [path.stat().st_mtime_ns for path in others]
    assert split([str(data / "one")], tmp_path / "all").equals(first)
    assert gone.exists()
    assert [path.stat().st_mtime_ns for path in others] == before


def test_another_division_into_the_same_folder_is_refused(data: Path, tmp_path: Path) -> None:
    """What the first held out would be trained on by the second."""
    split([str(data / "one")], tmp_path / "all")
    with pytest.raises(SplitError, match="from another division"):
        split([str(data / "one")], tmp_path / "all", held_out=0.1)


def test_data_without_val_images_cannot_be_divided(data: Path, tmp_path: Path) -> None:
    for folder in (data / "one").glob("*/val"):
        shutil.rmtree(folder)
    with pytest.raises(SplitError, match="no images are in val"):
        split([str(data / "one")], tmp_path / "all")


def test_a_folder_that_would_mix_or_hold_the_data_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SplitError, match="two data sets have one name"):
        split([str(data / "one"), str(data / "one")], tmp_path / "all")
    with pytest.raises(SplitError, match="choose another folder"):
        split([str(data / "one")], data)
    with pytest.raises(SplitError, match="would become part of it"):
        split([str(data / "one")], data / "one" / "all")


def test_a_data_set_may_be_named_by_where_one_is(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.` and `..` have no name for the folder of the copy."""
    monkeypatch.chdir(data / "one" / "many")
    by_name = split([str(data / "one")], tmp_path / "all")
    assert split([".."], tmp_path / "again").equals(by_name)
    monkeypatch.chdir(data / "one")
    assert split(["."], tmp_path / "all").equals(by_name)
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"one"}
