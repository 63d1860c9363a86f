"""How many images a claim takes: against simulation, and claims that cannot be shown."""

import numpy as np
import pytest
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.evaluation.power import PowerError, design_effect, images_needed
from patchscan.reporting.statistics import wilson


@pytest.mark.parametrize(
    ("limit", "true", "power"),
    [(0.01, 0.003, 0.8), (0.05, 0.03, 0.9), (0.9, 0.95, 0.8), (0.5, 0.7, 0.8), (0.01, 0, 0.8)],
)
def test_so_many_images_show_the_claim_as_often_as_asked(limit: float, true: float, power: float) -> None:
    rng = np.random.default_rng(0)

    def shown(images: int) -> float:
        """How often the report's interval keeps off the limit."""
        ends = {}
        for hits in np.unique(drawn := rng.binomial(images, true, 4000)):
            _, low, high = wilson(int(hits), images).bounds
            ends[hits] = high < limit if true < limit else low > limit
        return float(np.mean([ends[hits] for hits in drawn]))

    images = images_needed(limit, true, power)
    assert shown(images) > power - 0.03
    assert shown(int(images * 0.8)) < power


def test_no_false_alarm_among_so_many_is_the_smallest_proof() -> None:
    assert images_needed(0.01, 0) == 381  # Wilson's upper end of 0 of n is z2 / (n + z2)


@pytest.mark.parametrize("true", [0.01, 0.0100001])
def test_rates_that_are_too_near_are_not_told_apart(true: float) -> None:
    with pytest.raises(PowerError, match="too near"):
        images_needed(0.01, true)


def test_sources_that_are_alike_count_as_one() -> None:
    assert design_effect(10, 1) == 10
    assert design_effect(10, 0) == 1


def test_the_command_says_images_and_sources() -> None:
    asked = ["power", "--limit", "0.9", "--true", "0.95", "--per-source", "10", "--alike", "1", "--chance"]
    told = CliRunner().invoke(app, [*asked, "0.8"])
    assert told.exit_code == 0
    images = images_needed(0.9, 0.95)
    assert f"lies above 0.9, with its whole 95 % interval: {images:,} independent" in told.output
    assert f"{images * 10:,} images of {images:,} sources" in told.output
    assert "with a chance of 99.9 %" in CliRunner().invoke(app, [*asked, "0.999"]).output
