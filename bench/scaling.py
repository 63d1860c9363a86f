"""How scans and indexes grow: many listed objects with a stub scorer, seconds and peak memory; files indexed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import index
from bench.rounds import Recorder, Settings

STEPS = ("plan", "work", "reduce")
SCANS = {"first": "first scan", "rescan, 1 % changed": "rescan, 1 % changed"}


def names(settings: Settings) -> list[str]:
    """Every row that `measure` adds to the section on scaling."""
    found = []
    for count in settings.listed:
        for scan in SCANS.values():
            for step in STEPS:
                found += [f"{count:,} objects, {scan}, {step}", f"{count:,} objects, {scan}, {step}: peak memory"]
    return [*found, "index", "index again, nothing changed"]


def measure(settings: Settings, folder: Path) -> Recorder:
    """One run a size: it takes too long for more, so these rows have no spread."""
    recorder = Recorder("scaling")
    for count in settings.listed:
        command = [sys.executable, "-m", "tests.scale_scan", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results = json.loads(done.stdout)
        for key, scan in SCANS.items():
            for step in STEPS:
                _step(recorder, f"{count:,} objects, {scan}, {step}", results[key][step])
    if max(settings.listed, default=0) < 1_000_000:
        recorder.left_out("scans of more objects", "they take longer than a bench may: give --listed 1000000")
    if settings.indexed:
        indexed = index.measure(settings.indexed, folder)
        recorder.add("index", "images/s", [indexed.files / indexed.seconds])
        recorder.add("index again, nothing changed", "s", [indexed.seconds_again])
    return recorder


def _step(recorder: Recorder, name: str, measured: dict[str, Any]) -> None:
    recorder.add(name, "s", [measured["s"]])
    peaks = measured.get("peak_mb_of_each_shard") or [measured["peak_mb"]]
    recorder.add(f"{name}: peak memory", "MB", [max(peaks)])
