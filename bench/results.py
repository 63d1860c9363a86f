"""The bench's results: the schema of build/bench.json (printed by `python -m bench --schema`) and its tables."""

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

from bench.s3_servers import SeaweedFS
from patchscan.common.processes import available_cpus

Section = Literal["decode", "model", "end to end", "steady", "peers", "scaling", "training", "gpu"]
Unit = Literal["ms", "s", "images/s", "GFLOP/s", "GB/s", "MB", "share", "x"]
LIBRARIES = ("torch", "onnxruntime", "numpy", "pillow", "torchserve")
# Of a CPU's instructions those that decide how fast a model is, as /proc/cpuinfo has them.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


class Record(BaseModel):
    """Base class: immutable, without further fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(Record):
    """One row: the median of `rounds` measurements, and the least and greatest of them.

    Unit `x` is a ratio, the median of the ratios of each round; `share` is a fraction, 0..1. `at_least` and `at_most`
    are the project's aims.
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
        """Whether the median, rounded as in the table, reaches the aim; None if there is no aim."""
        if self.at_least is None and self.at_most is None:
            return None
        median = float(f"{self.median:.3g}")
        above = self.at_least is None or median >= self.at_least
        return above and (self.at_most is None or median <= self.at_most)


class NotRun(Record):
    """A measurement that was not run, and why."""

    section: Section
    what: str
    why: str


class Machine(Record):
    """The machine. `load` is the load average of the minute before the bench: over 0.5, other work disturbed it."""

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
        """Describe this machine."""
        import torch

        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
        has = ", ".join(flag for flag in INSTRUCTIONS if flag in flags)
        return cls(
            cpu=f"{names[0] if names else platform.machine()} ({has or 'no AVX2'})",
            cores=available_cpus(),
            memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            system=platform.platform(),
            python=platform.python_version(),
            libraries={name: version(name) for name in LIBRARIES}
            | {"libjpeg-turbo": str(features.version_feature("libjpeg_turbo"))}
            | {"S3 server": "SeaweedFS" if SeaweedFS.program() else "moto"},
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            load=os.getloadavg()[0],
        )


class Bench(Record):
    """The content of build/bench.json. `images` describes the images."""

    format: Literal[1] = 1
    ended_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0
    settings: Literal["full", "quick", "tiny"]
    images: str
    machine: Machine
    figures: list[Figure] = []
    not_run: list[NotRun] = []


COLUMNS = ("", "median", "least to greatest", "aim")


def row_of(figure: Figure) -> tuple[str, str, str, str]:
    """Format a figure as a table row."""
    aim = ""
    if figure.reached is not None:
        wanted = f"at least {figure.at_least:g}" if figure.at_least is not None else f"at most {figure.at_most:g}"
        aim = wanted if figure.reached else f"{wanted}: missed"
    unit = "" if figure.unit == "share" else f" {figure.unit}"
    return figure.name, f"{short(figure.median)}{unit}", f"{short(figure.low)} to {short(figure.high)}", aim


def short(value: float) -> str:
    """Format with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def sections(bench: Bench) -> list[tuple[Section, list[Figure]]]:
    """Group the figures by section, in the order of measurement."""
    found: dict[Section, list[Figure]] = {}
    for figure in bench.figures:
        found.setdefault(figure.section, []).append(figure)
    return list(found.items())


def measured_on(bench: Bench) -> str:
    """Describe in one line when, how long, and on which machine and images the bench ran."""
    machine = bench.machine
    libraries = ", ".join(f"{name} {number}" for name, number in machine.libraries.items())
    return (
        f"Measured {bench.ended_at:%Y-%m-%d} ({bench.settings}, {bench.seconds / 60:.0f} minutes) on {machine.cpu}, "
        f"{machine.cores} cores, {machine.memory_gb:g} GB, {machine.gpu or 'no GPU'}; load before {machine.load:.1f}; "
        f"Python {machine.python}, {libraries}. Images: {bench.images}."
    )


def show(bench: Bench) -> None:
    """Print one table per section."""
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
    """Format the tables as Markdown for docs/performance.md, with the machine."""
    lines = [measured_on(bench)]
    for section, figures in sections(bench):
        lines += ["", f"**{section}**", "", f"| {' | '.join(COLUMNS)} |", "| --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(row_of(figure))} |" for figure in figures]
    if bench.not_run:
        lines += ["", *(f"- Not run: {left_out.what}: {left_out.why}." for left_out in bench.not_run)]
    return "\n".join(lines)
