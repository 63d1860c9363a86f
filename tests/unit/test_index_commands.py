import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from patchscan.cli import app
from tests.image_tree import jpeg_versus_png


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_index_audit_and_match_lead_from_a_biased_to_a_fair_data_set(tmp_path: Path) -> None:
    data = jpeg_versus_png(tmp_path / "data", count=20)
    (data / "imagenet_ai_0419_biggan" / "train" / "ai" / "empty.png").touch()
    said = run("index", data, "--workers", 1)
    assert "quarantined: 1" in said
    assert "empty: 1, such as imagenet_ai_0419_biggan/train/ai/empty.png" in said
    assert "81 files read" in said
    said = run("audit", data, "--out", tmp_path / "audit.json")
    assert "BIASED DATA: biggan" in said
    assert json.loads((tmp_path / "audit.json").read_text())["biased"] is True
    said = run("match", data, tmp_path / "matched", "--size", 64, "--workers", 1)
    assert "left out, smaller than 64 x 64" not in said
    assert f"next: patchscan audit {tmp_path / 'matched'}" in said
    assert "BIASED" not in run("audit", tmp_path / "matched")


@pytest.mark.parametrize(
    "command",
    [["match", "data", "out", "--seed", "-1"], ["train", "ssp", "--data", "data", "--run", "run", "--workers", "-1"]],
    ids=" ".join,
)
def test_a_negative_number_is_a_wrong_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, f"Invalid value for '{command[-2]}'" in result.output) == (2, True)
