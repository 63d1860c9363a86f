"""A run, an archive or a recipe that an operator got wrong."""

import re
import shutil
from pathlib import Path

from patchscan.serving.archive import NAME_RULE, archive
from patchscan.training.recipe import RECIPES
from tests.operator_kit import ANYWHERE, assert_one_line, files, patchscan
from tests.serving_kit import Served, rewritten, zip_of


def test_a_run_folder_without_a_card(run: Path, photos: Path, tmp_path: Path) -> None:
    """`evaluate` and `explain` are asked in test_evaluate.py."""
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "card.json").unlink()
    out, wrong = tmp_path / "out", f"{bare}/card.json is missing: is {bare} a run folder made by `patchscan train`?"
    for command in (
        ["scan", photos, "--run", bare, "--out", out],
        ["archive", bare, "--model-store", out],
    ):
        assert_one_line(patchscan(*command), 2, wrong)
        assert files(out) == set()


def test_weights_of_another_architecture(run: Path, photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    card = other / "card.json"
    card.write_text(card.read_text().replace('"ssp-lite"', '"simplecnn"'))
    done = patchscan("scan", photos, "--run", other, "--out", tmp_path / "out")
    assert_one_line(done, 2, f"{other}/model.safetensors does not fit the architecture in {other}/card.json, simplecnn")
    assert files(tmp_path / "out") == set()


def test_a_gpu_that_is_not_there(run: Path, photos: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for device in ("cuda:99", "gpu"):
        for command in (
            ["evaluate", "--run", run, "--data", data, "--out", out],
            ["explain", photos / "0.png", "--run", run, "--out", out / "picture.png"],
            ["scan", photos, "--run", run, "--out", out],
        ):
            assert_one_line(patchscan(*command, "--device", device), 2, f"device {device} cannot be used: ")


def test_an_archive_of_another_version_a_damaged_and_a_foreign_one(run: Path, served: Served, tmp_path: Path) -> None:
    good = archive(run, tmp_path, version="2.0")
    with_other_code = tmp_path / "other" / "tiny.mar"
    with_other_code.parent.mkdir()
    data = good.read_bytes()
    at = data.index(b"class Answer")
    rewritten(good, with_other_code, {"patchscan/detector/answer.py": b"# of last year\n"})
    cut, foreign = tmp_path / "cut.mar", tmp_path / "foreign.mar"
    cut.write_bytes(data[:at])
    foreign.write_bytes(zip_of({"MAR-INF/MANIFEST.json": b"{}", "resnet.pt": b"x"}))
    stored = files(served.store)
    for number, (mar, words) in enumerate(
        (
            (with_other_code, "carries other code than this version of patchscan: patchscan/detector/answer.py. Make"),
            (cut, "is not a model archive: File is not a zip file"),
            (foreign, "is compressed, so it was not made by `patchscan archive`"),
        )
    ):
        command = ["register", mar, *served.options()] if number == 0 else ["verify", mar]
        assert_one_line(patchscan(*command), 2, f"{mar} {words}")
    assert files(served.store) == stored
    for named in ([], ["store"]):
        store = tmp_path / "served"
        store.mkdir(exist_ok=True)
        shutil.copy(cut, store / "store.mar")
        done = patchscan("serve", *named, "--model-store", store, "--scratch", tmp_path / "scratch", *ANYWHERE)
        assert_one_line(done, 2, f"{store}/store.mar is not a model archive: remove it from the model store")
    assert files(tmp_path / "scratch") == set()


def test_a_name_that_is_a_path(run: Path, tmp_path: Path) -> None:
    done = patchscan("archive", run, "--name", "../ssp", "--model-store", tmp_path / "store")
    assert_one_line(
        done,
        2,
        f"an archive's name and version must be {NAME_RULE}, not '../ssp'",
    )
    assert files(tmp_path) == set()


def test_a_misspelt_key_in_a_recipe(data: Path, tmp_path: Path) -> None:
    recipe, run = tmp_path / "mine.yaml", tmp_path / "run"
    text, hint = (RECIPES / "ssp-lite.yaml").read_text(), "; did you mean learning_rate?"
    for wrong, words in (
        (text.replace("learning_rate", "learning_rat"), "learning_rat: Extra inputs are not permitted" + hint),
        (text.replace("epochs:", "epochs"), "is not YAML"),
    ):
        recipe.write_text(wrong)
        done = patchscan("train", recipe, "--data", data, "--run", run)
        assert_one_line(done, 2, f"{recipe}", words)
        assert re.search(r"line \d+", done.stderr)
        assert files(run) == set()


def test_a_run_that_was_never_calibrated(run: Path, photos: Path, tmp_path: Path) -> None:
    """It can be archived and can scan, and says so each time; the starter, which is calibrated, does not."""
    wrong = "threshold was never calibrated"
    assert wrong in patchscan("archive", run, "--model-store", tmp_path / "store").stderr
    assert wrong in patchscan("scan", photos, "--run", run, "--out", tmp_path / "out").stdout
    assert wrong not in patchscan("scan", photos, "--out", tmp_path / "starter").stdout
