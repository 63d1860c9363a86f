"""The commands of docs/import.md run as they stand there, with the YAML of the page, on tiny data and tiny models."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import onnx
import pytest
import torch
import yaml
from torch import nn

from patchscan.detector.card import Card
from patchscan.storage.embedded_s3 import EmbeddedS3
from tests.command import environment, patchscan, start_patchscan
from tests.docs import ROOT, Block, Command, blocks, commands
from tests.image_tree import picture, write
from tests.import_kit import graph

PAGE = blocks(ROOT / "docs" / "import.md")
YAML = {yaml.safe_load(block.text)["name"]: block.text for block in PAGE if block.language == "yaml"}
SIDE = 224  # as the page's YAML says
# Free ports in place of those of the page, which another server may have.
PORTS = [f"--{name}=127.0.0.1:0" for name in ("inference", "management", "metrics")]
PORTS_OF_THE_PAGE = "http://127.0.0.1:8080"


def sized(model: onnx.ModelProto) -> bytes:
    """The model for pictures of that size."""
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = SIDE
    data: bytes = model.SerializeToString()
    return data


@dataclass
class Desk:
    """A folder with all that the page takes for granted, and the servers that its commands have started."""

    folder: Path
    servers: list[Popen[str]] = field(default_factory=list)
    address: str = ""

    def run(self, command: Command) -> str:
        """Run a command of the page; returns what it prints. A server goes on."""
        told: dict[str, Any] = {"cwd": self.folder, "env": environment()}
        words = command.words
        if words == ("python", "-"):
            with contextlib.chdir(self.folder):  # here, where torch is imported
                exec(compile(command.stdin, "docs/import.md", "exec"), {})  # noqa: S102
            return ""
        if words[1] == "serve":
            server = start_patchscan(*words[1:], "--workers=1", *PORTS, **told, stderr=None)
            self.servers.append(server)
            assert server.stdout
            said = server.stdout.readline()
            self.address = json.loads(said)["inference"]
            return said
        done = patchscan(*(self.address if word == PORTS_OF_THE_PAGE else word for word in words[1:]), **told)
        assert done.returncode == 0, f"{words}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, empty_s3: EmbeddedS3) -> Iterator[Desk]:
    desk = tmp_path_factory.mktemp("desk")
    for number, generator in enumerate(("sd_v1", "glide")):
        for split in ("train", "val"):
            for seed in range(2):
                real = picture(1000 * number + 10 * seed + len(split), SIDE, SIDE)
                write(desk / "DATA" / generator / split / "nature" / f"{seed}.jpg", real, quality=90)
                write(desk / "DATA" / generator / split / "ai" / f"{seed}.png", real // 16 * 16)
    write(desk / "photos" / "a.png", picture(1, SIDE, SIDE))
    (desk / "theirs.yaml").write_text(YAML["theirs"])
    (desk / "backbone.yaml").write_text(YAML["probe"])
    (desk / "theirs.onnx").write_bytes(sized(graph(2)))
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
    for bucket in ("photos", "results"):
        empty_s3.client().create_bucket(Bucket=bucket)
    empty_s3.client().upload_file(str(desk / "photos" / "a.png"), "photos", "2026/a.png")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in empty_s3.environment.items():
            patch.setenv(name, value)
        found = Desk(desk)
        yield found
    for server in found.servers:
        server.terminate()
        assert server.wait(120) == 0


@pytest.mark.parametrize("block", [block for block in PAGE if block.language == "sh"], ids=str)
def test_the_commands_of_the_page_run(desk: Desk, block: Block) -> None:
    for command in commands(block.text):
        desk.run(command)


def test_the_commands_leave_what_the_page_says(desk: Desk) -> None:
    assert {path.parent.name for path in (desk.folder / "runs").glob("*/card.json")} == {"theirs", "probe"}
    assert (desk.folder / "model_store" / "theirs.mar").exists()
    assert Card.read(desk.folder / "runs" / "probe").metrics  # evaluate has run
    for name in ("theirs", "probe"):
        accuracy = (desk.folder / "build" / name / "RESULTS_TABLE.md").read_text().partition("AUC")[0]
        assert re.search(r"^\| model \| (?=.*glide)(?=.*sd_v1)", accuracy, re.MULTILINE)
        assert re.search(rf"^\| {name} \| \d+\.\d\d \[", accuracy, re.MULTILINE)


def test_the_report_says_whose_it_is_and_on_what_terms(desk: Desk) -> None:
    report = re.sub("<[^>]+>", "", (desk.folder / "build" / "theirs" / "report.html").read_text())
    assert "trained by: Example University; on: GenImage; licence: Apache-2.0" in report


def test_the_second_night_finds_all_unchanged(desk: Desk) -> None:
    (line,) = (block.text for block in PAGE if block.language == "crontab")
    _, nightly = commands(line)
    assert desk.servers, "the commands above have scanned once"
    assert "1 objects listed = 0 scored, 0 rejected, 0 failed, 1 unchanged" in desk.run(nightly)
