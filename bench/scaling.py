"""Measure scans of many objects with a stub scorer (seconds and peak memory of each step), and indexing of files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import index
from bench.rounds import Recorder, Settings
from bench.scale_scan import MOST_IN_MOTO

SCANS, STEPS = ("first scan", "1 % changed"), ("plan", "work", "reduce")
FIRST_SCAN = "first scan, share of what the S3 server gives"


def names(settings: Settings) -> list[str]:
    """Return the names of the rows that `measure` adds to the section on scaling."""
    found = ["index", "index again, nothing changed"]
    for count in settings.listed:
        found.append(f"{count:,} objects: {FIRST_SCAN}")
        for step in (f"{count:,} objects, {scan}: {step}" for scan in SCANS for step in STEPS):
            found += [step, f"{step}, peak memory"]
    return found


def measure(settings: Settings, folder: Path) -> Recorder:
    """Measure each size once, because it takes long, so these rows have no spread. With more objects than the embedded
    S3 server can hold, only listing and planning are measured."""
    recorder = Recorder("scaling")
    for count in settings.listed:
        scale = _scan(count)
        for step in scale["steps"]:
            scan, what = step["name"].split(": ")
            name = f"{count:,} objects, {scan}: {what.split()[0]}"
            recorder.add(name, "s", [step["seconds"]])
            recorder.add(f"{name}, peak memory", "MB", [step["peak_mb"]])
        if scale["objects_per_s"] is not None:
            recorder.add(f"{count:,} objects: {FIRST_SCAN}", "share", [scale["objects_per_s"] / scale["gets_per_s"]])
    if max(settings.listed, default=0) < 1_000_000:
        recorder.left_out("scans of more objects", "they take longer than a bench may: give --listed 1000000")
    if settings.indexed:
        indexed = index.measure(settings.indexed, folder)
        recorder.add("index", "images/s", [indexed.files / indexed.seconds])
        recorder.add("index again, nothing changed", "s", [indexed.seconds_again])
    return recorder


def _scan(count: int) -> dict[str, Any]:
    """Run bench.scale_scan with `count` objects."""
    # In a fresh process: the peak memory of a child forked from this one would include this one's memory, with torch.
    command = [sys.executable, "-m", "bench.scale_scan", str(count), "--json"]
    command += ["--plan-only"] if count > MOST_IN_MOTO else []
    figures: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return figures
