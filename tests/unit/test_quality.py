"""The quality gate of a training Job: what its bounds mean, and when they are met."""

from dataclasses import replace
from typing import Any

import pytest

from patchscan.evaluation.quality import Bound, BoundError, QualityError, check_quality, parse_bounds
from tests.scan_kit import card


def row(kind: str, auc: float | None) -> dict[str, Any]:
    return {"kind": kind, "auc": [auc, 0.0, 1.0]}


ROWS = {
    "sd": row("seen", 0.9),
    "gan": row("seen", 0.8),
    "new": row("unseen", 0.23),
    "all seen": row("group", 0.85),
    "overall": row("group", 0.7),
}
EVALUATED = replace(card(), metrics={"raw": ROWS})


def test_bounds_are_parsed() -> None:
    assert parse_bounds("auc:unseen:0.8, real_detection:seen:1") == [
        Bound("auc", "unseen", 0.8),
        Bound("real_detection", "seen", 1.0),
    ]


@pytest.mark.parametrize(
    "text", ["", "auc", "auc:0.8", "auc:unseen:much", "auc:unseen:80", "auc::0.8", "auc:unseen:nan", "AUC:unseen:0.8"]
)
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(BoundError, match="MIN_METRIC"):
        parse_bounds(text)


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("auc:unseen:0.8", False),
        ("auc:unseen:0.23", True),
        ("auc:seen:0.85", True),
        ("auc:seen:0.86", False),
        ("auc:gan:0.8", True),
        ("auc:overall:0.6,auc:sd:0.95", False),
    ],
)
def test_a_bound_is_met_or_names_what_is_missing(text: str, met: bool) -> None:
    if met:
        assert check_quality(EVALUATED, parse_bounds(text))
    else:
        with pytest.raises(QualityError, match=r"not published: auc of \w+ is 0\.\d+, less than 0\.\d+") as caught:
            check_quality(EVALUATED, parse_bounds(text))
        assert caught.value.exit_code == 3


def test_the_matched_images_count_where_they_were_scored() -> None:
    both = replace(EVALUATED, metrics={"raw": ROWS, "matched": ROWS | {"new": row("unseen", 0.9)}})
    assert check_quality(both, parse_bounds("auc:unseen:0.8")) == ["auc of unseen is 0.900, at least 0.8"]


@pytest.mark.parametrize("text", ["auc:other:0.5", "accuracy:seen:0.5"])
def test_what_the_evaluation_does_not_have_is_said(text: str) -> None:
    with pytest.raises(BoundError, match=r"no group other; there are seen, unseen, sd|accuracy of seen is not defined"):
        check_quality(EVALUATED, parse_bounds(text))
