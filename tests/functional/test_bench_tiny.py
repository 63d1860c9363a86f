"""The whole bench in small: every section runs, against a real TorchServe and a real S3 server, and is written down."""

import json
import os
import sys

import pytest

from bench import serving
from bench.__main__ import bench, known_rows, main
from bench.results import Bench
from bench.rounds import TINY


def test_a_tiny_bench_measures_every_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of one core, where one worker is all; it is kept busy by two clients."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(serving, "CLIENTS_PER_WORKER", 2)
    done = bench(TINY, None)
    found = {figure.name for figure in done.figures}
    assert {figure.section for figure in done.figures} >= {"decode", "model", "end to end", "scaling", "training"}
    assert found <= known_rows(TINY)
    assert {"ssp-lite: served", "ssp-lite: scanned", "40 objects, 1 % changed: plan"} <= found
    # The system counts a program's CPU time in hundredths of a second, of which a short scan may take none.
    measured = [figure for figure in done.figures if (figure.section, figure.unit) != ("steady", "ms")]
    assert all(figure.low > 0 for figure in measured if figure.unit != "share")
    assert {"ssp-lite: scanned in process", "ssp-lite: scanned through TorchServe"} <= found
    assert Bench.model_validate_json(done.model_dump_json()) == done


def test_one_section_is_measured_alone() -> None:
    done = bench(TINY, None, only=["scaling", "gpu"])
    assert {figure.section for figure in done.figures} <= {"scaling", "gpu"}
    assert "40 objects, 1 % changed: plan" in {figure.name for figure in done.figures}


def test_the_schema_is_documented(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--schema"])
    main()
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(Bench.model_fields)
