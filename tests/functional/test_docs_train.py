"""The commands of docs/train.md run as they stand there, on a tiny data set: one epoch, two processes for four."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from patchscan.detector.card import Card
from patchscan.detector.device import cpu_has_bf16
from patchscan.detector.models import SSP
from patchscan.storage.copying import copy_tree
from patchscan.storage.embedded_s3 import EmbeddedS3
from tests.command import environment, patchscan
from tests.image_tree import picture, write
from tests.imagenet_weights import lite0_state, resnet50_state

PAGE = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
# The weights here are drawn at random, and not what the files' names say.
UNCHECKED = {"patchscan.training.pretrained.PUBLISHED": ()}
GENERATORS = ("sd_v1", "ldm", "stylegan2_ada", "biggan", "sd_v1_5", "adm")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, forked_commands: None, empty_s3: EmbeddedS3) -> Iterator[Path]:
    """A folder with all that the page takes for granted: DATA, the same in a bucket, photographs of a kind, ImageNet
    weights as files and in torchvision's cache, and a checkpoint with the authors' names."""
    desk = tmp_path_factory.mktemp("desk")
    for number, generator in enumerate(GENERATORS):
        for split in ("train", "val"):  # one image a class: SSP takes seconds for each
            real = picture(1000 * number + len(split), 256, 256)
            write(desk / "DATA" / generator / split / "nature" / "0.jpg", real, quality=90)
            write(desk / "DATA" / generator / split / "ai" / "0.png", real // 16 * 16)
    torch.save(resnet50_state(), desk / "resnet50-11ad3fa6.pth")
    (desk / "cache" / "hub" / "checkpoints").mkdir(parents=True)
    (desk / "cache" / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth").symlink_to(desk / "resnet50-11ad3fa6.pth")
    torch.save(lite0_state(), desk / "efficientnet-lite0-57934424.pth")
    write(desk / "alarms" / "art" / "val" / "nature" / "0.png", picture(1, 256, 256))
    authors = {name.replace("disc.resnet.", "disc."): value for name, value in SSP().state_dict().items()}
    torch.save(authors, desk / "sdv15.pth")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in empty_s3.environment.items():
            patch.setenv(name, value)
        for bucket in ("images", "models"):
            empty_s3.client().create_bucket(Bucket=bucket)
        copy_tree(str(desk / "DATA"), "s3://images/genimage")
        yield desk


def run(command: str, desk: Path) -> None:
    """The command in that folder, made small: one epoch, on the CPU, two processes where the page says four; one of
    SSP's two generators."""
    words = shlex.split(command.replace("--nproc-per-node 4", "--nproc-per-node 2"))
    if " train " in command or "training." in command:
        words += ["--epochs", "1", "--device", "cpu", "--workers", "1"]
    if " train ssp " in command:
        words += ["--seen", "sd_v1_5"]
    variables = environment() | {"TORCH_HOME": str(desk / "cache")}
    if words[0] == "patchscan":
        unchecked = UNCHECKED if ".pth" in command and " train " in command else {}
        done = patchscan(*words[1:], cwd=desk, env=variables, constants=unchecked)
    else:
        done = subprocess.run(words, cwd=desk, env=variables, capture_output=True, text=True, check=False)
    if "bf16" in words and not cpu_has_bf16():
        assert "use --precision fp32" in done.stderr
        return
    assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:60])
def test_the_commands_of_the_page_run(desk: Path, block: str) -> None:
    for command in block.splitlines():
        run(command, desk)


def test_the_commands_leave_what_the_page_says(desk: Path) -> None:
    cards = {path.parent.name: Card.read(path.parent) for path in (desk / "runs").glob("*/card.json")}
    assert cards.keys() - {"bf16"} == {"ssp-lite", "ssp-lite-4", "ssp", "ssp-scratch", "lite0", "official"}
    assert (desk / "model_store" / "ssp-lite.mar").exists()
    assert cards["ssp-lite"].metrics.keys() == {"raw", "matched"}
    copy_tree("s3://models/runs/ssp-lite", str(desk / "from-bucket"))
    assert Card.read(desk / "from-bucket").training["seen"] == cards["ssp-lite-4"].training["seen"]
