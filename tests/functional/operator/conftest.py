"""What an operator has before anything goes wrong: photos, a run, a data set with a recipe, a bucket."""

from pathlib import Path

import pytest

from patchscan.storage.embedded_s3 import EmbeddedS3
from tests.image_tree import picture, write
from tests.operator_kit import patchscan
from tests.scan_kit import image
from tests.serving_kit import tiny_run

TINY = """\
name: tiny
architecture: ssp-lite
preset: {kind: patch, rule: random, count: 4}
seen: [one]
epochs: 400
batch_size: 8
learning_rate: 1.0e-3
"""


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        (folder / f"{number}.png").write_bytes(image(number))
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in GenImage's layout, indexed, with a recipe that takes long."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for number in range(8):
            real = picture(number)
            write(root / "one" / split / "nature" / f"{number}.png", real)
            write(root / "one" / split / "ai" / f"{number}.png", real // 16 * 16)
    (root / "tiny.yaml").write_text(TINY)
    assert patchscan("index", root).returncode == 0
    return root


@pytest.fixture(scope="module")
def s3(empty_s3: EmbeddedS3, photos: Path) -> EmbeddedS3:
    """An S3 server whose bucket `photos` holds the photos; `results` is empty."""
    for bucket in ("photos", "results"):
        empty_s3.client().create_bucket(Bucket=bucket)
    for path in photos.iterdir():
        empty_s3.client().put_object(Bucket="photos", Key=path.name, Body=path.read_bytes())
    return empty_s3
