"""Everything in a scanned folder gets a row, whatever it is."""

import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.common.errors import UserError
from patchscan.dataset.index import default_index_path, load_index
from patchscan.dataset.layout import UNREADABLE, LayoutError, find_files
from patchscan.evaluation.evaluate import EvaluationError, Options, evaluate, validation_images
from patchscan.scanning import report
from patchscan.scanning.plan import ScanSource
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.store import FailureCode, ObjectError, ObjectInfo, StoreError
from tests.scan_kit import StubScorer, image, table_of

NOBODY = 65534


def outcome(photos: Path, out: Path) -> dict[str, tuple[str, str | None]]:
    """Scan the folder; status and error code by key."""
    store, scorer = open_store(str(out)), StubScorer()
    plan = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=scorer.card), store)
    worker = Worker(plan, store, scorer, WorkSettings(threads=2, deadline_s=0.2))
    for index in range(plan.shards):
        worker.work(index)
    assert report.reduce(store, plan)["totals"]["adds_up"]
    return {key: (row["status"], row["error_code"]) for key, row in table_of(store, plan.scan).items()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "good.png").write_bytes(image(1))
    return folder


def test_what_is_no_file_is_a_row(photos: Path, tmp_path: Path) -> None:
    os.mkfifo(photos / "pipe.png")
    (photos / "dangling.png").symlink_to("nothing")
    (photos / "loop.png").symlink_to("loop.png")
    (photos / "folder.png").mkdir()
    (photos / "folder.png" / "up").symlink_to("..")
    (photos / "elsewhere").symlink_to(tmp_path)
    (photos / "link.png").symlink_to("good.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(photos / "socket.png"))
        found = outcome(photos, tmp_path / "out")
    assert found == {
        "good.png": ("scored", None),
        "link.png": ("scored", None),
        "pipe.png": ("rejected", "not_an_image"),
        "socket.png": ("rejected", "not_an_image"),
        "folder.png/up": ("rejected", "not_an_image"),
        "elsewhere": ("rejected", "not_an_image"),
        "loop.png": ("rejected", "not_an_image"),
        "dangling.png": ("rejected", "not_an_image"),
    }


@pytest.mark.slow
def test_what_is_no_file_is_told_of_once_and_scored_when_it_is_a_file(photos: Path, tmp_path: Path) -> None:
    os.mkfifo(photos / "pipe.png")
    (photos / "dangling.png").symlink_to(tmp_path / "later.png")
    outcome(photos, tmp_path / "out")
    store = open_store(str(tmp_path / "out"))
    plan = plan_scan(ScanRequest(source=ScanSource(url=str(photos)), card=StubScorer().card), store)
    assert (plan.listed, plan.unchanged) == (3, 3)
    report.reduce(store, plan)
    (photos / "pipe.png").unlink()
    (photos / "pipe.png").write_bytes(image(2))
    (tmp_path / "later.png").write_bytes(image(3))
    found = outcome(photos, tmp_path / "out")
    assert found == dict.fromkeys(("good.png", "pipe.png", "dangling.png"), ("scored", None))


@pytest.mark.parametrize("seconds", [10**12, -(10**12)])
def test_a_file_with_a_time_that_no_calendar_has_is_listed(
    seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(image(1))
    values = list(file.stat())
    times = {"st_mtime": float(seconds), "st_mtime_ns": seconds * 10**9}  # not every file system takes such a one
    told = os.stat_result(values, times)
    assert told.st_mtime_ns == seconds * 10**9
    monkeypatch.setattr(Path, "stat", lambda *_, **__: told)
    (info,) = open_store(str(tmp_path)).objects()
    assert (info.key, info.last_modified) == ("a.png", None)


def test_a_name_that_is_not_utf_8_is_scored(photos: Path, tmp_path: Path) -> None:
    for number, name in enumerate([b"caf\xe9.png", b"\xff\xfe", b"\xc3\xa9\xe9.png", b"sub\xe9/in.png"]):
        path = photos / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image(number))
    (photos / r"literal\xe9.png").write_bytes(image(9))
    found = outcome(photos, tmp_path / "out")
    keys = {"good.png", r"caf\xe9.png", r"\xff\xfe", r"é\xe9.png", r"sub\xe9/in.png", r"literal\xe9.png"}
    assert found == dict.fromkeys(keys, ("scored", None))


@pytest.mark.parametrize("limit", [0, 1, 10, 100_000])
def test_a_file_is_read_to_its_end_or_the_limit_whatever_its_size_is_said_to_be(limit: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10)
    assert open_store(str(tmp_path)).fetch(ObjectInfo(key="file"), limit).data == b"x" * min(10, limit + 1)
    told = open_store("/proc/self").fetch(ObjectInfo(key="limits"), limit).data  # its size is said to be 0
    assert told == Path("/proc/self/limits").read_bytes()[: limit + 1]


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder of a user who, unlike root, is held to the rights of folders; the test runs as that user."""
    before = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        open_store(folder)  # imports libraries, which may lie where that user cannot read
        if before == 0:
            os.chown(folder, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield Path(folder)
        finally:
            os.seteuid(before)


@pytest.mark.parametrize(("rights", "key"), [(0o000, "closed/"), (0o300, "closed/"), (0o600, "closed/in.png")])
def test_a_folder_that_cannot_be_read_is_a_row(as_nobody: Path, rights: int, key: str) -> None:
    closed = as_nobody / "closed"
    closed.mkdir()
    for file in (closed / "in.png", as_nobody / "good.png"):
        file.write_bytes(image(2))
    closed.chmod(rights)
    store = open_store(str(as_nobody))
    found = {info.key: info for info in store.objects()}
    assert set(found) == {"good.png", key}
    with pytest.raises(ObjectError) as failure:
        store.fetch(found[key], 1000)
    assert failure.value.code == FailureCode.ACCESS_DENIED
    closed.chmod(0o700)
    assert {info.key for info in store.objects()} == {"good.png", "closed/in.png"}


def test_the_index_of_a_data_set_that_cannot_be_written_lies_in_the_cache(
    as_nobody: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(as_nobody / "cache"))
    data = as_nobody / "data"
    (data / "gan/val/ai").mkdir(parents=True)
    (data / "gan/val/ai/good.png").write_bytes(image(1))
    (data / "gan/val/ai/bad.png").write_bytes(b"bad")
    data.chmod(0o500)
    try:
        for _ in range(2):  # built, and read
            assert set(validation_images(data).path) == {"gan/val/ai/good.png", "gan/val/ai/bad.png"}
            (cached,) = (as_nobody / "cache").rglob("index.parquet")
            assert f"cannot be written, so its index is {cached}" in capsys.readouterr().err
        assert {entry.name for entry in data.iterdir()} == {"gan"}
        monkeypatch.setenv("XDG_CACHE_HOME", str(data))
        with pytest.raises(UserError, match=r"cannot write .* other commands take --index FILE"):
            load_index(data)
    finally:
        data.chmod(0o700)
    assert len(load_index(data)) == 1
    assert (data / "index.parquet").exists()
    data.chmod(0o500)
    assert default_index_path(data) == data / "index.parquet", "what is there is used"
    data.chmod(0o700)


def test_a_run_folder_that_cannot_be_written_is_told_before_its_images_are_scored(as_nobody: Path) -> None:
    run, data = as_nobody / "run", as_nobody / "data"
    run.mkdir()
    StubScorer().card.write(run)
    (data / "gan/val/ai").mkdir(parents=True)
    (data / "gan/val/ai/good.png").write_bytes(image(1))
    run.chmod(0o500)
    try:
        with pytest.raises(EvaluationError, match="run cannot be written, and its card is to hold what is measured"):
            evaluate([run], {"raw": data}, as_nobody / "report", Options())
    finally:
        run.chmod(0o700)
    assert {path.name for path in as_nobody.iterdir()} == {"run", "data"}


def test_a_closed_folder_of_a_data_set_is_not_left_out_in_silence(as_nobody: Path) -> None:
    closed = as_nobody / "gan/train/ai/closed"
    closed.mkdir(parents=True)
    (closed.parent / "good.png").write_bytes(image(1))
    closed.chmod(0o000)
    try:
        found = {file.path: file.modified_ns for file in find_files(as_nobody).files}
        assert set(found) == {"gan/train/ai/good.png", "gan/train/ai/closed/"}
        assert found["gan/train/ai/closed/"] == UNREADABLE
        (as_nobody / "gan").chmod(0o000)
        with pytest.raises(LayoutError, match="cannot be listed"):
            find_files(as_nobody)
    finally:
        (as_nobody / "gan").chmod(0o700)
        closed.chmod(0o700)


def test_a_folder_that_is_removed_while_its_parent_is_listed_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "sub").mkdir()
    objects = open_store(str(tmp_path)).objects()
    assert next(objects).key == "a.png"
    (tmp_path / "sub").rmdir()
    assert list(objects) == []


def test_a_scanned_folder_that_cannot_be_listed_ends_the_scan(as_nobody: Path) -> None:
    (as_nobody / "closed/inner").mkdir(parents=True)
    (as_nobody / "closed").chmod(0o000)
    for url in (as_nobody / "closed", as_nobody / "closed/inner"):
        with pytest.raises(StoreError):
            list(open_store(str(url)).objects())
    (as_nobody / "closed").chmod(0o700)


@pytest.mark.parametrize(
    ("source", "out", "words"),
    [
        ("", "out", "an address is empty"),
        ("in", "", "an address is empty"),
        ("in", "out\n", r"the address 'out\\n' ends in a line break"),
        ("s3://photos\n", "out", r"the address 's3://photos\\n' ends in a line break"),
    ],
)
def test_an_address_that_nobody_can_mean_is_no_folder(
    source: str, out: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a setting that was left empty: the working folder would be scanned, or filled with results."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["scan", source, "--out", out, "--run", "ssp-lite"])
    assert isinstance(done.exception, StoreError)
    assert re.search(words, str(done.exception))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made_before", [False, True])
def test_a_refused_source_leaves_no_results_folder(tmp_path: Path, made_before: bool) -> None:
    out = tmp_path / "out"
    if made_before:
        out.mkdir()
    with pytest.raises(StoreError, match="misspelt is not a folder"):
        outcome(tmp_path / "misspelt", out)
    assert [*tmp_path.iterdir()] == ([out] if made_before else [])


@pytest.mark.parametrize("key", ["../secret.png", "/etc/passwd", "a//b", "a\0b", "x" * 300, "good.png/"])
def test_a_manifests_key_cannot_leave_the_folder(photos: Path, tmp_path: Path, key: str) -> None:
    (tmp_path / "secret.png").write_bytes(image(3))
    with pytest.raises(ObjectError) as failure:
        open_store(str(photos)).fetch(ObjectInfo(key=key), 1000)
    assert failure.value.code == FailureCode.ACCESS_DENIED


def test_reading_a_result_that_is_a_pipe_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="not a file"):
        open_store(str(tmp_path)).read("pipe")


def test_a_folder_is_opened_without_boto3() -> None:
    """Importing it takes a tenth of the time that a scan of a folder needs to its first row."""
    script = "import sys; from patchscan.storage import open_store; open_store('.'); sys.exit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_result_that_cannot_be_removed_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    store = open_store(str(tmp_path))
    for name in ("none", "none/below", "file/below", "file"):
        store.delete(name)
    assert not (tmp_path / "file").exists()
    with pytest.raises(StoreError, match="folder cannot be removed: "):
        store.delete("folder")


def test_results_are_looked_for_in_their_own_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A results folder holds the files of all scans: a look at one of them, or at the history, walked through all."""
    store, scandir, listed = open_store(str(tmp_path)), os.scandir, set()
    names = {f"scans/{scan}/rows/{part}.parquet" for scan in (1, 2, 12) for part in "ab"} | {"history/1.json"}
    for name in names:
        store.write(name, b"")

    def noted(folder: str) -> Iterator[os.DirEntry[str]]:
        listed.add(str(folder).removeprefix(str(tmp_path)))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", noted)
    assert set(store.names("scans/1/")) == {"scans/1/rows/a.parquet", "scans/1/rows/b.parquet"}
    assert listed == {"/scans/1", "/scans/1/rows"}
    assert set(store.names("scans/1")) == {name for name in names if name.startswith("scans/1")}
    assert set(store.names("none/")) == set()
    assert set(store.names("")) == names
