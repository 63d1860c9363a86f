"""Recipes are the study's, and a mistake in one is answered with its line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from patchscan.training.recipe import RECIPES, RecipeError, load_recipe

SSP = (RECIPES / "ssp.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "epochs", "weight_decay", "flip"),
    [("simplecnn", 10, 0.0, "none"), ("resnet50", 10, 1e-4, "none"), ("ssp", 30, 0.0, "horizontal")],
)
def test_the_studys_recipes(name: str, epochs: int, weight_decay: float, flip: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.learning_rate, recipe.batch_size, recipe.epochs) == (1e-4, 32, epochs)
    assert (recipe.weight_decay, recipe.flip, recipe.augment) == (weight_decay, flip, None)
    assert (recipe.seen, recipe.unseen) == (["biggan", "sd_v1_5"], ["adm"])


def test_ssp_takes_the_simplest_of_30_patches() -> None:
    preset = load_recipe("ssp").preset
    assert preset.kind == "patch"
    assert (preset.size, preset.rule, preset.candidates, preset.count) == (32, "simplest", 30, 1)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_named_for_its_file(path: Path) -> None:
    assert load_recipe(path.stem).name == path.stem


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (SSP + "optimiser: sgd\n", r"line 12: optimiser: Extra inputs"),
        (SSP.replace("epochs: 30", "epochs: many"), r"line 8: epochs: Input should be a valid integer"),
        (SSP.replace("rule: simplest", "rule: simple"), r"line 4: preset.patch.rule: Input should be"),
        (SSP.replace("seen: [biggan, sd_v1_5]", "seen: []"), r"line 5: seen: List should have at least 1"),
        (SSP.replace("name: ssp\n", ""), r"name: Field required"),
        (SSP + "delivery: {size: 128, quality: [97, 60]}\n", r"line 12: delivery.quality: the first number of a range"),
        (
            SSP + "augment: {probability: 1, jpeg_quality: [0, 60]}\n",
            r"line 12: augment.jpeg_quality.0: Input",
        ),
        (SSP + "augment: {probability: 1, resize: [-1, 2]}\n", r"line 12: augment.resize.0: Input should be greater"),
        ("[1, 2\n", r"is not YAML"),
        ("just text\n", r"the file: keys and values are needed"),
        (SSP.replace("epochs: 30", "epochs: 30\nepochs: 3"), r"line 9 is not YAML: epochs stands here twice"),
    ],
)
def test_a_mistake_names_its_line(tmp_path: Path, wrong: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(wrong)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(RecipeError, match="resnet50, simplecnn, ssp"):
        load_recipe("ssp2")


def test_overrides_are_checked_like_the_file() -> None:
    assert load_recipe("ssp", epochs=1, seen=["sd_v1"], unseen=None).seen == ["sd_v1"]
    with pytest.raises(RecipeError, match="epochs"):
        load_recipe("ssp", epochs=0)
    with pytest.raises(RecipeError, match="seed"):
        load_recipe("ssp", seed=2**63)
    with pytest.raises(RecipeError, match="seen and unseen both name adm"):
        load_recipe("ssp", seen=["biggan", "adm"])
    assert load_recipe("ssp", seen=["adm"], unseen=["biggan"]).unseen == ["biggan"]


def test_a_run_of_an_older_version_is_of_the_same_recipe_whatever_fields_came_and_went() -> None:
    recipe = load_recipe("ssp")
    saved = json.loads(recipe.model_dump_json())
    del saved["delivery"]
    assert recipe.is_that_of(json.dumps(saved | {"gone": ["train"]}))
    assert not recipe.is_that_of(json.dumps(saved | {"epochs": 3}))
    assert not recipe.is_that_of(json.dumps(saved | {"epochs": "no number"}))


def test_a_recipe_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    text = (RECIPES / "ssp-lite.yaml").read_text("utf-8") + "notice: f\u00fcr den Anfang\n"
    (tmp_path / "mine.yaml").write_text(text, "utf-8-sig")
    script = "import sys; from patchscan.training import recipe; print(ascii(recipe.load_recipe(sys.argv[1]).notice))"
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "mine.yaml"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | locale,
    )
    assert done.stdout == "'f\\xfcr den Anfang'\n", done.stderr
