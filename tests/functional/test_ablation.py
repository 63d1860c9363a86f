"""The variants of the ablation are trained, scored with more patches too, and compared in one table."""

import sys
from pathlib import Path

import pytest

from bench import ablation
from patchscan.detector.card import Card
from patchscan.detector.device import cpu_has_bf16
from tests.image_tree import picture, write


def test_each_variant_is_trained_and_stands_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, generator in enumerate(("first", "second", "third", "fourth")):
        for split in ("train", "val"):
            for image in range(3):
                real = picture(1000 * number + 10 * image + len(split))
                write(tmp_path / "data" / generator / split / "nature" / f"{image}.png", real)
                write(tmp_path / "data" / generator / split / "ai" / f"{image}.png", real // 16 * 16)
    trained = ("simplest", "random-unfiltered", "simplest-enlarged")
    monkeypatch.setattr(ablation, "COUNTS", (5,))
    options = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--epochs", "1"]
    precision = "bf16" if cpu_has_bf16() else "fp32"
    options += ["--seen", "first,second", "--unseen", "third,fourth", "--device", "cpu", "--precision", precision]
    options += ["--variants", *trained]
    monkeypatch.setattr(sys, "argv", ["bench.ablation", *options])
    ablation.main()
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    heading = ["| variant", *(f"mean of {group}, {tier}" for group in ("seen", "unseen") for tier in ("native", "web"))]
    assert lines[0] == [*heading[:-1], f"{heading[-1]} |"]
    assert [line[0][2:] for line in lines[2:]] == ["simplest", "simplest-5", "random-unfiltered", "simplest-enlarged"]
    assert len({tuple(line[1:]) for line in lines[2:]}) > 1
    assert (tmp_path / "out" / "report" / "report.html").exists()
    assert {Card.read(tmp_path / "out" / name).training["precision"] for name in trained} == {precision}
