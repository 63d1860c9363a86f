"""What a training Job's settings ask for, and its older copy of the data, are compared with the names of the data's
files, before any is copied."""

import os
import shutil
from pathlib import Path

import pytest

from patchscan.common.errors import UserError
from patchscan.dataset.layout import LayoutError
from patchscan.dataset.outdated import remove_outdated
from patchscan.training.settings import check_settings


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    """Data of `gan` with all its images, `fakes` without real ones, and `early` with train images alone."""
    for place in ("gan/train/ai", "gan/train/nature", "gan/val/ai", "gan/val/nature", "fakes/val/ai", "early/train/ai"):
        (tmp_path / "data" / place).mkdir(parents=True)
        (tmp_path / "data" / place / "1.png").touch()
    places = {name: str(tmp_path / name) for name in ("RUN", "MODEL_STORE", "VERSIONS", "REPORT")}
    return {"DATA": str(tmp_path / "data"), "SEEN": "gan", "EPOCHS": "1", "DEVICE": "cpu", "LOADERS": "0", **places}


def check(settings: dict[str, str]) -> None:
    check_settings("ssp-lite", settings, settings["DATA"], Path(settings["DATA"]))


@pytest.mark.parametrize(
    ("unseen", "bound"),
    [
        ("", "auc:seen:0.8, auc:gan:0.8, auc:overall:0.8, fake_detection:fakes:0.5, accuracy:fakes:0.1"),
        ("fakes", "fake_detection:unseen:0.5"),
    ],
)
def test_a_bound_on_what_will_be_measured_is_taken(settings: dict[str, str], unseen: str, bound: str) -> None:
    check(settings | {"UNSEEN": unseen, "MIN_METRIC": bound})


@pytest.mark.parametrize(
    ("unseen", "bound", "words"),
    [
        ("fakes", "auc:unseen:0.8", "MIN_METRIC: auc of unseen needs images in val/nature"),
        ("fakes", "real_detection:fakes:0.8", "MIN_METRIC: real_detection of fakes needs images in val/nature"),
        ("", "auc:adm:0.8", "no val images of adm; there are seen, unseen, overall, early, fakes, gan"),
        ("", "auc:seen:80", "MIN_METRIC auc:seen:80: write"),
        ("", "auc:early:0.8", "no val images of early; there are"),
        ("early", "", "UNSEEN: early in .* has no images in val, which the evaluation measures"),
    ],
)
def test_what_could_not_be_measured_is_told_at_the_start(
    settings: dict[str, str], unseen: str, bound: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        check(settings | {"UNSEEN": unseen, "MIN_METRIC": bound})


def test_without_unseen_generators_there_is_no_bound_on_them(settings: dict[str, str]) -> None:
    (Path(settings["DATA"]) / "fakes/val/ai/1.png").unlink()
    with pytest.raises(UserError, match="no val images of unseen; there are"):
        check(settings | {"MIN_METRIC": "auc:unseen:0.8"})


def test_a_generator_called_as_a_row_of_reports_is_told_at_the_start(settings: dict[str, str]) -> None:
    (Path(settings["DATA"]) / "fakes").rename(Path(settings["DATA"]) / "overall")
    with pytest.raises(UserError, match="reports have a row overall of their own"):
        check(settings)


def test_a_name_with_a_comma_is_said_to_be_none_for_a_list(settings: dict[str, str]) -> None:
    (Path(settings["DATA"]) / "fakes").rename(Path(settings["DATA"]) / "fakes, 2024")
    with pytest.raises(UserError, match=r"no generator fakes; there are early, fakes, 2024, gan; 'fakes, 2024' has a"):
        check(settings | {"UNSEEN": "fakes, 2024"})


def test_an_older_copy_loses_what_was_removed_or_replaced(settings: dict[str, str], tmp_path: Path) -> None:
    """Images that were taken out of the data were trained on for as long as the volume lived."""
    data = Path(settings["DATA"])
    kept, gone, longer, later, *_ = sorted(data.rglob("*.png"))
    with pytest.raises(LayoutError):
        remove_outdated(str(tmp_path / "RUN"), data)
    copy = Path(shutil.copytree(data, tmp_path / "set"))
    (copy / "index.parquet").touch()
    assert remove_outdated(str(data), copy) == 0
    gone.unlink()
    longer.write_text("another")
    os.utime(longer, (0, 0))
    os.utime(later, (2e9, 2e9))
    assert remove_outdated(str(data), copy) == 3
    left = {path.relative_to(copy) for path in copy.rglob("*.*")}
    assert left & {path.relative_to(data) for path in (kept, gone, longer, later)} == {kept.relative_to(data)}
    assert Path("index.parquet") in left
