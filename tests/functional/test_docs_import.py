"""The commands of docs/import.md run as they stand there, with the YAML of the page, on tiny data and tiny models."""

import json
import re
import shlex
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from patchscan.detector.card import Card
from tests.command import environment, patchscan
from tests.image_tree import picture, write
from tests.import_kit import graph

PAGE = (Path(__file__).parents[2] / "docs" / "import.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
(YAML,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
SIDE = 224  # as the page's YAML says


def sized(model: onnx.ModelProto) -> bytes:
    """The model for pictures of that size."""
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = SIDE
    data: bytes = model.SerializeToString()
    return data


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the page takes for granted."""
    desk = tmp_path_factory.mktemp("desk")
    for number, generator in enumerate(("sd_v1", "glide")):
        for split in ("train", "val"):
            for seed in range(2):
                real = picture(1000 * number + 10 * seed + len(split), SIDE, SIDE)
                write(desk / "DATA" / generator / split / "nature" / f"{seed}.jpg", real, quality=90)
                write(desk / "DATA" / generator / split / "ai" / f"{seed}.png", real // 16 * 16)
    write(desk / "photos" / "a.png", picture(1, SIDE, SIDE))
    (desk / "theirs.yaml").write_text(YAML)
    (desk / "backbone.yaml").write_text(YAML.partition("output:")[0] + "source:" + YAML.partition("source:")[2])
    (desk / "theirs.onnx").write_bytes(sized(graph(2)))
    (desk / "backbone.onnx").write_bytes(sized(graph(5)))
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    torch.export.save(torch.export.export(model, (torch.rand(1, 3, SIDE, SIDE),)), desk / "theirs.pt2")
    torch.jit.script(model).save(str(desk / "theirs.ts"))
    (desk / "their-export").mkdir()
    (desk / "their-export" / "model.onnx").write_bytes(sized(graph(2)))
    (desk / "their-export" / "config.json").write_text(json.dumps({"id2label": {"0": "real", "1": "fake"}}))
    preprocessor = {
        "resample": 2,
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (desk / "their-export" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return desk


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:60])
def test_the_commands_of_the_page_run(desk: Path, block: str) -> None:
    for command in block.splitlines():
        done = patchscan(*shlex.split(command, comments=True)[1:], cwd=desk, env=environment())
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_the_commands_leave_what_the_page_says(desk: Path) -> None:
    assert {path.parent.name for path in (desk / "runs").glob("*/card.json")} == {"theirs", "probe"}
    assert (desk / "model_store" / "theirs.mar").exists()
    assert Card.read(desk / "runs" / "probe").metrics  # evaluate has run
