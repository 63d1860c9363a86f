"""Estimate what a scan will take, from a random sample of the objects that it would score."""

import time
from collections.abc import Callable, Mapping
from itertools import pairwise

from patchscan.common.console import format_duration, printable
from patchscan.detector.decoders import decoder_pool
from patchscan.reporting.statistics import Estimate, mean_interval, population_count
from patchscan.scanning.observers import Observer
from patchscan.scanning.plan import Plan
from patchscan.scanning.rows import Row

# The objects that are scored, and the groups that they are measured in: an interval comes from the groups' differences.
SAMPLE = 200
GROUPS = 10
MEASURES = ("bytes", "requests", "core_hours", "seconds")
# How what is not counted in whole numbers is shown.
FORMATS: dict[str, Callable[[float], str]] = {"core_hours": "{:,.3g}".format, "seconds": format_duration}


class Meter(Observer):
    """An observer that notes after each group of objects what was used so far; `requests` are the source's, which is a
    folder where there are none. `served_s`: seconds of a core that a server has told so far."""

    def __init__(self, objects: int, requests: Mapping[str, int], served_s: Callable[[], float] = lambda: 0.0):
        self.group = max(1, objects // GROUPS)
        self.requests, self.served_s = requests, served_s
        self.scored = self.done = self.tries = self.bytes = 0
        self.notes = [self._now()]

    def row(self, row: Row, fetched_bytes: int) -> None:
        self.done += 1
        self.scored += row["status"] == "scored"
        self.tries += row["attempts"]
        self.bytes += fetched_bytes
        if self.done % self.group == 0:
            self.notes.append(self._now())

    def per_object(self, measure: str) -> Estimate:
        """What an object took: the mean over the groups. The first is left out where there are others: it waits for
        connections and for the processes that decode."""
        if measure == "requests" and not any(self.requests.values()):
            return mean_interval([0.0, 0.0])
        notes = self.notes[1:] if len(self.notes) > 2 else self.notes
        return mean_interval([(after[measure] - before[measure]) / self.group for before, after in pairwise(notes)])

    def _now(self) -> dict[str, float]:
        core_hours = (time.process_time() + decoder_pool().cpu_s() + self.served_s()) / 3600
        # Not the requests so far: the objects of the next groups are being fetched already.
        return dict(zip(MEASURES, (self.bytes, self.tries, core_hours, time.monotonic()), strict=True))


def estimate(plan: Plan, meter: Meter) -> dict[str, Estimate]:
    """What scoring all objects of the plan takes, with 95 % intervals: `images` that get a score, `bytes` and
    `requests` of the source, `core_hours` of the scan's processes and of the model on a server that tells them, and
    `seconds`; requests and seconds with listing."""
    listing = {"seconds": plan.listing["seconds"], "requests": sum(plan.listing["requests"].values())}
    found = {"images": population_count(meter.scored, meter.done, plan.to_score)}
    for measure in MEASURES:
        one, more = meter.per_object(measure), listing.get(measure, 0)
        ends = (one.value, one.low, one.high)
        value, low, high = (None if each is None else each * plan.to_score + more for each in ends)
        found[measure] = Estimate(value, low, high, one.method)
    if plan.bytes_to_score is not None:
        found["bytes"] = Estimate(plan.bytes_to_score, plan.bytes_to_score, plan.bytes_to_score, "as listed")
    return found


def estimate_text(plan: Plan, meter: Meter) -> str:
    """Return the estimate for the terminal."""
    counts = f"{plan.to_score:,} objects to score, {plan.unchanged:,} unchanged; {meter.done:,} were tried"
    lines = [f"{plan.source.url}: {counts}"]
    for name, one in estimate(plan, meter).items():
        label = {"core_hours": "core-hours", "seconds": "duration"}.get(name, name)
        show = FORMATS.get(name, "{:,.0f}".format)
        if one.value is not None:
            bounds = "" if one.low is None or one.high is None else f" ({show(one.low)} to {show(one.high)})"
            lines.append(f"{label}: {show(one.value)}{bounds}")
    return "\n".join(map(printable, [*lines, "intervals are 95 %; nothing was kept"]))
