"""What a bench writes down (build/bench.json) and how it is shown. The models here are the file's schema:
`python -m bench --schema` prints it as JSON Schema."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Self

from PIL import features
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from rich.table import Table

Section = Literal["decode", "model", "end to end", "scaling", "training", "gpu"]
Unit = Literal["ms", "s", "images/s", "GFLOP/s", "GB/s", "MB", "share", "x"]
LIBRARIES = ("torch", "onnxruntime", "numpy", "pillow", "torchserve")


class Record(BaseModel):
    """No field but those written down here."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(Record):
    """One row: the median of `rounds` measurements, and the least and greatest of them.

    Unit `x` is a ratio, the median of the ratios of each round; `share` a part of one. `at_least` and `at_most` are
    what the project aims at.
    """

    section: Section
    name: str
    unit: Unit
    median: float
    low: float
    high: float
    rounds: int = Field(ge=1)
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.median <= self.high:
            raise ValueError(f"{self.name}: the median lies outside its spread")
        return self

    @property
    def reached(self) -> bool | None:
        """Whether the median, as the table shows it, reaches the aim; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        median = float(f"{self.median:.3g}")
        above = self.at_least is None or median >= self.at_least
        return above and (self.at_most is None or median <= self.at_most)


class NotRun(Record):
    """A measurement that was left out, and why."""

    section: Section
    what: str
    why: str


class Machine(Record):
    """Where it was measured. `load` is the load average of the minute before: over 0.5, other work disturbed it."""

    cpu: str
    cores: int = Field(ge=1)
    memory_gb: float
    system: str
    python: str
    libraries: dict[str, str]
    gpu: str | None
    load: float

    @classmethod
    def here(cls) -> Self:
        """This machine, now."""
        import torch

        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return cls(
            cpu=names[0] if names else platform.machine(),
            cores=len(os.sched_getaffinity(0)),
            memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            system=platform.platform(),
            python=platform.python_version(),
            libraries={name: version(name) for name in LIBRARIES}
            | {"libjpeg-turbo": str(features.version_feature("libjpeg_turbo"))},
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            load=os.getloadavg()[0],
        )


class Bench(Record):
    """The whole of build/bench.json. `images` says what the images were."""

    format: Literal[1] = 1
    began_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0
    settings: Literal["full", "quick", "tiny"]
    images: str
    machine: Machine
    figures: list[Figure] = []
    not_run: list[NotRun] = []


COLUMNS = ("", "median", "least to greatest", "aim")


def row_of(figure: Figure) -> tuple[str, str, str, str]:
    """A figure as a table's row."""
    aim = ""
    if figure.reached is not None:
        wanted = f"at least {figure.at_least:g}" if figure.at_least is not None else f"at most {figure.at_most:g}"
        aim = wanted if figure.reached else f"{wanted}: missed"
    unit = "" if figure.unit == "share" else f" {figure.unit}"
    return figure.name, f"{short(figure.median)}{unit}", f"{short(figure.low)} to {short(figure.high)}", aim


def short(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def sections(bench: Bench) -> list[tuple[Section, list[Figure]]]:
    """The figures by section, in the order they were measured."""
    found: dict[Section, list[Figure]] = {}
    for figure in bench.figures:
        found.setdefault(figure.section, []).append(figure)
    return list(found.items())


def measured_on(bench: Bench) -> str:
    """One line: when, how long, on what machine and images."""
    machine = bench.machine
    libraries = ", ".join(f"{name} {number}" for name, number in machine.libraries.items())
    return (
        f"Measured {bench.began_at:%Y-%m-%d} ({bench.settings}, {bench.seconds / 60:.0f} minutes) on {machine.cpu}, "
        f"{machine.cores} cores, {machine.memory_gb:g} GB, {machine.gpu or 'no GPU'}; load before {machine.load:.1f}; "
        f"Python {machine.python}, {libraries}. Images: {bench.images}."
    )


def show(bench: Bench) -> None:
    """Print one table a section."""
    console = Console()
    console.print(measured_on(bench), markup=False)
    for section, figures in sections(bench):
        table = Table(*COLUMNS, title=section, title_justify="left")
        for figure in figures:
            table.add_row(*row_of(figure))
        console.print(table)
    for left_out in bench.not_run:
        console.print(f"not run: {left_out.what}: {left_out.why}", markup=False)


def markdown(bench: Bench) -> str:
    """The tables of docs/performance.md, with the machine they were measured on."""
    lines = [measured_on(bench)]
    for section, figures in sections(bench):
        lines += ["", f"**{section}**", "", f"| {' | '.join(COLUMNS)} |", "| --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(row_of(figure))} |" for figure in figures]
    if bench.not_run:
        lines += ["", *(f"- Not run: {one.what}: {one.why}." for one in bench.not_run)]
    return "\n".join(lines)
