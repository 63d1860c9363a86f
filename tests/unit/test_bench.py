"""A bench file is what its schema says, ratios are taken round by round, and docs/performance.md shows real rows."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from bench import official, training
from bench.__main__ import known_rows
from bench.images import encoded, photograph
from bench.results import Bench, Figure, Machine, NotRun, markdown
from bench.rounds import FULL, TINY, Recorder, alternate
from patchscan.detector.patches import complexity

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def rows_shown(text: str) -> list[str]:
    """The first cell of every row of every table of a bench in a page."""
    return [name for name in re.findall(r"^\| ([^|]+?) +\| [\d.,]+(?: \S+)? \| ", text, re.MULTILINE) if name != "---"]


def some_bench() -> Bench:
    recorder = Recorder("decode")
    recorder.add("500 x 375 JPEG: ours", "ms", [2.0, 1.0, 4.0])
    recorder.ratio("500 x 375 JPEG: ours / decode alone", [2.0, 4.0], [1.0, 1.0], at_most=1.15)
    return Bench(
        settings="tiny",
        images="none",
        machine=Machine.here(),
        figures=recorder.figures,
        not_run=[NotRun(section="gpu", what="fp16", why="no GPU")],
    )


def test_a_written_bench_is_read_again() -> None:
    bench = some_bench()
    assert Bench.model_validate_json(bench.model_dump_json()) == bench


@pytest.mark.parametrize("wrong", [{"median": 9.0}, {"unit": "parsecs"}, {"rounds": 0}, {"mean": 1.0}])
def test_a_figure_that_the_schema_does_not_know_is_refused(wrong: dict[str, object]) -> None:
    values = {"section": "decode", "name": "a", "unit": "ms", "median": 2.0, "low": 1.0, "high": 3.0, "rounds": 5}
    Figure.model_validate(values)
    with pytest.raises(ValidationError):
        Figure.model_validate(values | wrong)


def test_a_table_shows_median_spread_and_aim() -> None:
    text = markdown(some_bench())
    assert "| 500 x 375 JPEG: ours | 2 ms | 1 to 4 |  |" in text
    assert "| 500 x 375 JPEG: ours / decode alone | 3 x | 2 to 4 | at most 1.15: missed |" in text
    assert "- Not run: fp16: no GPU." in text
    assert rows_shown(text) == ["500 x 375 JPEG: ours", "500 x 375 JPEG: ours / decode alone"]


def test_the_docs_show_rows_that_the_bench_knows() -> None:
    shown = rows_shown(PAGE.read_text().partition("<!-- bench -->")[2].partition("<!-- /bench -->")[0])
    assert shown
    known = known_rows(replace(FULL, listed=(10_000, 100_000, 1_000_000)))
    assert [name for name in shown if name not in known] == []


def test_contenders_take_turns_forwards_and_backwards() -> None:
    called: list[str] = []

    def contender(name: str) -> float:
        called.append(name)
        return float(len(called))

    values = alternate({name: partial(contender, name) for name in "abc"}, rounds=2)
    assert "".join(called) == "abc" + "abc" + "cba"
    assert values == {"a": [4.0, 9.0], "b": [5.0, 8.0], "c": [6.0, 7.0]}


@pytest.mark.slow
def test_a_training_step_is_held_against_a_bare_pass() -> None:
    recorder, settings = Recorder("training"), replace(TINY, trained=4)
    training.measure_steps(settings, recorder)
    (figure,) = recorder.figures
    assert (figure.name, figure.unit, figure.at_most) == ("training ssp-lite: step / bare pass", "x", 1.15)
    assert figure.name in training.names(settings)
    assert figure.low > 0


def test_the_official_way_measures_texture_as_ours_does() -> None:
    pixels = photograph(1, 32, 32)
    assert official.texture(Image.fromarray(pixels)) == complexity(pixels[None])[0]


def test_large_photographs_keep_their_detail() -> None:
    large = photograph(0, 1920, 1080)
    assert large.shape == (1080, 1920, 3)
    assert complexity(large[None, -64:, -64:])[0] > complexity(np.full((1, 64, 64, 3), 9, np.uint8))[0]
    assert len(encoded(large, "JPEG")) > 200_000
