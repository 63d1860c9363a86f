"""A new version of a model serves only after it has proved itself; the way back is one command."""

import json
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

from patchscan.common.errors import UserError
from patchscan.detector.answer import Answer
from patchscan.detector.detector import Detector
from patchscan.serving.archive import archive, digest_file, load_archived
from patchscan.serving.registry import only_change
from patchscan.serving.verify import verify
from tests.command import patchscan
from tests.import_kit import imported_run
from tests.serving_kit import Served, png, rewritten, tiny_run


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of another model, as version 2.0 of `tiny`, for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("second")
    return archive(tiny_run(folder / "run", seed=1), folder / "store", version="2.0", engine="onnx")


def test_the_same_run_gives_the_same_archive(second: Path, tmp_path: Path) -> None:
    again = archive(tiny_run(tmp_path / "run", seed=1), tmp_path / "store", version="2.0", engine="onnx")
    assert again.read_bytes() == second.read_bytes()
    assert digest_file(again).read_text() == f"{verify(second).sha256}  tiny.mar\n"


def test_verify_names_what_is_wrong(second: Path, tmp_path: Path) -> None:
    done = patchscan("verify", second)
    assert done.returncode == 0
    assert verify(second).sha256 in done.stdout
    weights = zipfile.ZipFile(second).read("model.safetensors")
    golden = json.loads(zipfile.ZipFile(second).read("golden/answers.json"))
    golden["noise.bmp"]["logit"] += 0.01
    cases = {
        "other code": {"patchscan/detector/answer.py": b"import os\n"},
        "other code than this version of patchscan: image_detector.py": {"image_detector.py": b"class H: pass\n"},
        "`patchscan archive` does not write: model.pt": {"model.pt": b"\x80\x04N."},
        "`patchscan archive` does not write: requirements.txt": {"requirements.txt": b"evil\n"},
        "its sha256 differs": {"model.safetensors": weights[:-4] + b"\0\0\0\0"},
        "does not score as when it was archived: noise.bmp": {"golden/answers.json": json.dumps(golden).encode()},
        "the manifest says": {"MAR-INF/MANIFEST.json": b'{"model": {"handler": "os:system"}}'},
    }
    for number, (message, change) in enumerate(cases.items()):
        with pytest.raises(UserError, match=message):
            verify(rewritten(second, tmp_path / f"{number}.mar", change))
    with pytest.raises(UserError, match="not the expected archive"):
        verify(second, "0" * 64)
    sha256 = verify(second).sha256
    for written in (f"sha256:{sha256.upper()}", f"{sha256}  tiny.mar\n"):
        assert verify(second, written).sha256 == sha256
    for written in ("", "tiny.mar", sha256[:-1], "md5:0", "\udcff"):
        with pytest.raises(UserError, match="is no SHA-256"):
            verify(second, written)
    (tmp_path / "text.mar").write_text("no zip")
    with pytest.raises(UserError, match="not a model archive"):
        verify(tmp_path / "text.mar")


def test_register_promote_rollback(served: Served, second: Path) -> None:
    def version() -> str:
        with served.client() as client:
            return str(client.put("/predictions/tiny", content=png(1)).json()["version"])

    try:
        done = patchscan("register", second, "--no-promote", *served.options())
        assert (done.returncode, done.stderr) == (0, "")
        assert version() == "1.0"
        done = patchscan("register", second, *served.options())
        assert done.returncode == 2
        assert "loaded already" in done.stderr
        with served.registry() as registry:
            registry.promote("tiny", "2.0")
            assert version() == "2.0"
            with served.client() as client:
                served_p_ai = client.put("/predictions/tiny", content=png(1)).json()["p_ai"]
            assert served_p_ai == pytest.approx(eager_p_ai(second), abs=1e-5)
            assert verify(served.store / "tiny.mar").card.version == "2.0"  # what a restart serves
            assert registry.rollback("tiny", None) == "1.0"
            assert version() == "1.0"
            assert verify(served.store / "tiny.mar").card.version == "1.0"
            with pytest.raises(UserError, match=r"the server has 1\.0, 2\.0 of tiny"):
                registry.promote("tiny", "3.0")
        said = patchscan("status", "--management", served.said["management"], "--keys", served.keys).stdout
        assert [line.split()[:3] for line in said.splitlines()] == [["tiny", "1.0", "default"], ["tiny", "2.0", "1"]]
    finally:
        with served.management() as management:
            management.delete("/models/tiny/2.0")
        # Another archive of this version would be refused.
        for path in served.store.glob("tiny-2.0.mar*"):
            path.unlink()


def test_versions_are_changed_by_one_command_at_a_time(served: Served) -> None:
    for command in (["promote", "tiny", "1.0"], ["rollback", "tiny"], ["register", served.store / "tiny.mar"]):
        with only_change(served.keys):
            done = patchscan(*command, *served.options())
        assert (done.returncode, done.stderr.count("another `patchscan register`")) == (75, 1)


def eager_p_ai(mar: Path) -> float:
    """The score of PyTorch, in this process, with the archive's run folder."""
    (answer,) = Detector.load(mar.parents[1] / "run").score([png(1)])
    assert isinstance(answer, Answer)
    return answer.p_ai


def test_a_version_that_scores_otherwise_never_serves(
    served: Served, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive is well where it was verified; on the server it scores otherwise, as on a broken accelerator."""
    golden = json.loads(zipfile.ZipFile(second).read("golden/answers.json"))
    golden["noise.bmp"]["logit"] += 0.01
    bad = rewritten(second, tmp_path / "tiny.mar", {"golden/answers.json": json.dumps(golden).encode()})
    monkeypatch.setattr("patchscan.serving.golden.LOGIT_TOLERANCE", 0.1)
    good = verify(bad)
    monkeypatch.undo()
    monkeypatch.setattr("patchscan.serving.registry.verify", lambda mar: good if mar == bad else verify(mar))
    with served.registry() as registry:
        with pytest.raises(UserError, match=r"fails the smoke test, the old version still serves: noise\.bmp: logit"):
            registry.register(bad, 1)
        assert [(one.version, one.default) for one in registry.status()] == [("1.0", True)]
    assert not (served.store / "tiny-2.0.mar").exists()


def test_a_version_that_does_not_become_ready_is_removed_again(
    served: Served, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its one worker is fewer than are waited for, and there is no more patience."""
    with served.registry() as registry:
        monkeypatch.setattr("patchscan.serving.registry.READY_TIMEOUT_S", -1)
        wait = registry._wait_ready
        monkeypatch.setattr(registry, "_wait_ready", lambda name, version, workers: wait(name, version, workers + 1))
        with pytest.raises(UserError, match=r"tiny 2\.0 had \d of 2 workers READY; it is removed again"):
            registry.register(second, 1)
        assert [(one.version, one.default) for one in registry.status()] == [("1.0", True)]
    assert not (served.store / "tiny-2.0.mar").exists()


def test_an_imported_detector_is_registered_and_serves(served: Served, tmp_path: Path) -> None:
    mar = archive(imported_run(tmp_path / "run"), tmp_path)
    done = patchscan("register", mar, *served.options())
    try:
        assert (done.returncode, done.stderr) == (0, "")
        (right,) = load_archived(tmp_path / "run").score([png(1)])
        assert isinstance(right, Answer)
        with served.client() as client:
            assert client.put("/predictions/theirs", content=png(1)).json() == asdict(right)
    finally:
        with served.management() as management:
            management.delete("/models/theirs/1.0")
        for stored in served.store.glob("theirs*"):
            stored.unlink()


def test_a_server_that_is_not_there_is_one_line(served: Served, second: Path) -> None:
    options = served.options()
    options[1] = "http://127.0.0.1:9"
    done = patchscan("register", second, *options)
    assert done.returncode == 75
    assert "http://127.0.0.1:9 does not answer" in done.stderr
    assert "Traceback" not in done.stderr
