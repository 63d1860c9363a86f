"""A data set in a bucket is indexed, trained on and evaluated without a copy on disk, and a run can live there too."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from patchscan.common.files import sha256_of
from patchscan.dataset.split import split as divide
from patchscan.detector.engines import load_detector
from patchscan.storage.copying import copy_tree
from patchscan.storage.embedded_s3 import EmbeddedS3
from tests.command import patchscan, start_patchscan
from tests.image_tree import picture, write

TRAIN = ["train", "ssp-lite", "--epochs", "1", "--seen", "gan", "--unseen", "", "--device", "cpu", "--workers", "1"]
URL = "s3://data/sets/mine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One generator, its fakes without fine noise, and a file that is no image."""
    root = tmp_path_factory.mktemp("data") / "mine"
    for split, count in (("train", 32), ("val", 6)):
        for number in range(count):
            real = picture(1000 * (split == "val") + number)
            write(root / "imagenet_ai_0419_gan" / "gan" / split / "nature" / f"n01/{number}.png", real)
            write(root / "imagenet_ai_0419_gan" / "gan" / split / "ai" / f"{number}.png", real // 16 * 16)
    (root / "imagenet_ai_0419_gan" / "gan" / "train" / "ai" / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def s3(folder: Path, empty_s3: EmbeddedS3) -> Iterator[EmbeddedS3]:
    """A bucket that holds the same files under a prefix, and something beside it whose name begins alike."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in empty_s3.environment.items():
            patch.setenv(name, value)
        for bucket in ("data", "models"):
            empty_s3.client().create_bucket(Bucket=bucket)
        copy_tree(str(folder), URL)
        empty_s3.client().put_object(Bucket="data", Key="sets/mine-old/gan/train/ai/1.png", Body=b"other")
        yield empty_s3


def test_a_bucket_is_divided_like_a_folder(s3: EmbeddedS3, tmp_path: Path) -> None:
    """Its index needs a place, which no option of `split` named."""
    images = divide([URL], tmp_path)
    assert len(images) == len(list(tmp_path.glob("mine/**/*.png"))) == 76
    assert (images[images.before == "val"].after == "val").any()


def test_a_bucket_trains_the_same_weights_as_a_folder(s3: EmbeddedS3, folder: Path, tmp_path: Path) -> None:
    indexed = patchscan("index", URL, "--out", tmp_path / "index.parquet", "--workers", 1)
    assert "quarantined: 1" in indexed.stdout, indexed.stderr
    assert "77 files read" in indexed.stdout
    assert "(0 files read" in patchscan("index", URL, "--out", tmp_path / "index.parquet").stdout
    trained = patchscan(*TRAIN, "--data", URL, "--index", tmp_path / "index.parquet", "--run", "s3://models/run")
    assert trained.returncode == 0, trained.stderr
    assert patchscan(*TRAIN, "--data", folder, "--run", tmp_path / "here").returncode == 0
    copy_tree("s3://models/run", str(tmp_path / "there"))
    assert sha256_of(tmp_path / "there/model.safetensors") == sha256_of(tmp_path / "here/model.safetensors")
    assert load_detector(tmp_path / "there").engine == "onnx"
    evaluated = patchscan(
        "evaluate", "--run", tmp_path / "there", "--data", URL, "--index", tmp_path / "index.parquet",
        "--out", tmp_path / "report", "--robustness", 2,
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["data"]["name"], report["data"]["images"]) == ("mine", 12)


def test_an_interrupted_run_in_a_bucket_keeps_its_log_and_first_features(s3: EmbeddedS3, folder: Path) -> None:
    train = [*TRAIN, "--epochs", "99", "--data", folder, "--run", "s3://models/stopped"]
    with start_patchscan(*train, stdout=None) as process:
        assert process.stderr
        begun = next(line for line in process.stderr if line.startswith("epoch: epoch=1 "))
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert process.returncode == 75, begun
    kept = {one["Key"] for one in s3.client().list_objects_v2(Bucket="models", Prefix="stopped/")["Contents"]}
    assert {"stopped/checkpoint.pt", "stopped/log.jsonl", "stopped/features_before.npz"} <= kept


def test_a_bucket_needs_a_place_for_its_index(s3: EmbeddedS3, tmp_path: Path) -> None:
    refused = patchscan(*TRAIN, "--data", URL, "--run", tmp_path / "run")
    assert refused.returncode == 2
    assert "--index FILE" in refused.stderr
    assert "Traceback" not in refused.stderr
    refused = patchscan(*TRAIN, "--data", URL, "--run", tmp_path / "run", "--protocol", "matched")
    assert refused.returncode == 2
    assert f"patchscan match {URL} OUT" in refused.stderr
