"""The report on one image, and its replay to the bit."""

import json
import os
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from patchscan.detector.card import Card
from patchscan.detector.watermark import MESSAGES
from patchscan.evaluation.evidence import Weight
from patchscan.reporting import pages
from patchscan.scanning.case import (
    CaseDiffersError,
    CaseError,
    build_case,
    changed_versions,
    differences,
    weight_in_words,
)
from patchscan.scanning.evidence_commands import case as case_command
from patchscan.scanning.evidence_commands import verify_case
from tests.c2pa_kit import CAPTURED, identity, sign
from tests.scan_kit import image as noise

STARTER = Path(__file__).parents[2] / "model_store" / "starter"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, pictures: None) -> Path:
    """A folder with an image, a run with bounds for its LRs, and the case of the image."""
    folder = tmp_path_factory.mktemp("case")
    run, image = folder / "run", folder / f"{HOSTILE}.png"
    shutil.copytree(STARTER, run)
    bounds = {"lower": -0.5, "upper": 0.5, "ai": 12, "real": 34}
    replace(Card.read(STARTER), evidence=dict.fromkeys(("native", "web", "hard", "enlarged"), bounds)).write(run)
    texts = PngInfo()
    texts.add_text("parameters", f"a cat {HOSTILE}\nSteps: 20, Sampler: Euler")
    Image.open(BytesIO(noise(5, side=200))).save(image, pnginfo=texts)
    case_command(image, run, folder / "out")
    return folder


def written(made: Path) -> dict[str, Any]:
    return dict(json.loads((made / "out" / "case.json").read_text()))


@pytest.mark.slow
def test_the_page_says_what_the_json_says_and_runs_nothing_of_the_file(made: Path) -> None:
    found, page = written(made), (made / "out" / "case.html").read_text()
    assert found["provenance"]["generator"].startswith("Stable Diffusion web UI")
    assert ["parameters", f"a cat {HOSTILE} Steps: 20, Sampler: Euler"] in found["texts"]
    assert found["watermarks"]["found"] is None
    assert {one["name"] for one in found["watermarks"]["messages"]} == set(MESSAGES)
    assert "None of those that this program can read" in page
    assert HOSTILE not in page
    assert "&lt;img src=x" in page
    for text in (found["image"]["sha256"], found["model"]["digest"], found["picture_sha256"], *found["versions"]):
        assert text in page
    assert found["weight"]["at_bound"] == (abs(found["weight"]["unbounded"]) >= 0.5)
    assert abs(found["weight"]["log10_lr"]) <= 0.5
    assert "dalle3" in found["never_saw"][0]
    assert (made / "out" / "views.png").read_bytes()[:4] == b"\x89PNG"
    assert not set(found["doubts"]) & set(found["warnings"])


def test_a_replay_is_equal_to_the_bit(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_case(made / "out" / "case.json")
    assert capsys.readouterr().out.startswith("equal: all figures")
    moved = made / "elsewhere.png"
    shutil.copy(made / f"{HOSTILE}.png", moved)
    verify_case(made / "out" / "case.json", image=moved, run=made / "run")


def test_a_replay_names_what_differs(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = written(made)
    changed["answer"]["logit"] += 1e-12
    changed["versions"]["numpy"] = "0.1"
    (tmp_path / "case.json").write_text(json.dumps(changed))
    with pytest.raises(CaseDiffersError, match="1 figures"):
        verify_case(tmp_path / "case.json")
    told = capsys.readouterr().out
    assert "numpy 0.1, now" in told
    assert "answer.logit: " in told
    other = tmp_path / "other.png"
    Image.open(made / f"{HOSTILE}.png").rotate(90).save(other)
    with pytest.raises(CaseDiffersError):
        verify_case(made / "out" / "case.json", image=other)
    assert "image.sha256" in capsys.readouterr().out
    assert CaseDiffersError.exit_code == 3


def test_a_finding_or_an_error_rate_that_was_rewritten_differs(made: Path) -> None:
    before = written(made)
    changed = json.loads(json.dumps(before))
    changed["finding"], changed["never_saw"] = "The image is AI-generated.", []
    changed["card_rates"]["seen generators"]["fpr"] = 0.0
    paths = {line.partition(":")[0] for line in differences(changed, before)}
    assert paths == {"finding", "never_saw", "card_rates.seen generators.fpr"}


def test_a_file_s_name_need_not_be_utf_8(made: Path, tmp_path: Path) -> None:
    image = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copy(made / f"{HOSTILE}.png", image)
    found = build_case(image, made / "run") | {"doubts": [], "picture_sha256": None}
    pages.write_text(tmp_path / "case.html", pages.render("patchscan.scanning", "case.html", found, picture=None))
    assert "caf\\udce9.png" in (tmp_path / "case.html").read_text()


def test_another_card_is_another_case(made: Path, tmp_path: Path) -> None:
    shutil.copytree(STARTER, tmp_path / "run")
    replace(Card.read(STARTER), evidence={}).write(tmp_path / "run")
    before, now = written(made), build_case(made / f"{HOSTILE}.png", tmp_path / "run")
    paths = {line.partition(":")[0] for line in differences(before, now)}
    assert paths == {"weight", "weight_in_words", *(f"weight.{name}" for name in before["weight"])}
    assert now["weight_in_words"].startswith("No likelihood ratio is stated: the model's card holds no bounds")
    assert changed_versions(before, now) == []


@pytest.mark.slow
def test_a_trusted_signer_is_named_and_the_list_is_replayed(tmp_path: Path) -> None:
    cameras = identity("cameras", authority=True)
    buffer = BytesIO()
    Image.open(BytesIO(noise(6, side=120))).save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(sign(buffer.getvalue(), identity("Camera", cameras), "Camera", CAPTURED))
    (tmp_path / "list.pem").write_text(cameras.pem)
    case_command(tmp_path / "a.jpg", STARTER, tmp_path / "out", c2pa_trust=str(tmp_path / "list.pem"))
    found, page = written(tmp_path), (tmp_path / "out" / "case.html").read_text()
    assert found["provenance"]["c2pa"] == "Trusted"
    assert found["c2pa_trust"]["sha256"] in page
    assert "--c2pa-trust FILE" in page
    verify_case(tmp_path / "out" / "case.json")
    found["c2pa_trust"] = None
    (tmp_path / "case.json").write_text(json.dumps(found))
    with pytest.raises(CaseDiffersError):
        verify_case(tmp_path / "case.json")
    found["c2pa_trust"] = {"pem": "rubbish"}
    (tmp_path / "case.json").write_text(json.dumps(found))
    with pytest.raises(CaseError, match="is no case"):
        verify_case(tmp_path / "case.json")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema": "patchscan-case/2"}', '{"schema": "patchscan-case/1"}']
)
def test_what_is_no_case_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "case.json").write_text(content)
    with pytest.raises(CaseError, match="is no case"):
        verify_case(tmp_path / "case.json")


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("text")
    with pytest.raises(CaseError, match="cannot be scored: not_an_image"):
        case_command(tmp_path / "a.jpg", STARTER, tmp_path / "out")
    with pytest.raises(CaseError, match="cannot read"):
        case_command(tmp_path / "b.jpg", STARTER, tmp_path / "out")


def test_a_film_given_by_mistake_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "film.jpg").open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(CaseError, match=r"film.jpg is too large: 4,398,046,511,104 bytes; the limit is 33,554,432"):
        case_command(tmp_path / "film.jpg", STARTER, tmp_path / "out")


@pytest.mark.parametrize(
    ("log10_lr", "unbounded", "says"),
    [
        (1.44, 1.44, "about 28 times more probable if the image is made by one of the generators"),
        (1.44, 1.44, "moderate support"),
        (-2.1, -2.1, "about 130 times more probable if the image is a photograph"),
        (-2.1, -2.1, "moderately strong support"),
        (0.1, 0.1, "supports neither"),
        (0.1, 0.1, "ratio 1.3:"),
        (2.5, 9.0, "the limit of what the validation's 40 AI images and 60 photographs carry"),
        (3.5, 3.5, "about 3,200 times"),
    ],
)
def test_the_weight_is_said_in_plain_words(log10_lr: float, unbounded: float, says: str) -> None:
    upper = 2.5 if unbounded > 5 else 5
    said = weight_in_words(Weight(log10_lr, -5, upper, unbounded, 40, 60))
    assert says in said
    assert "not the probability" in said or "supports neither" in said
