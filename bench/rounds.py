"""Measure in rounds: contenders alternate, so that a machine that slows down affects all of them."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from bench.results import Figure, NotRun, Section, Unit

Values = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to measure; 0 or () skips a measurement.

    `seconds`: length of one measurement of a rate (`serving_seconds` for serving). `sizes`: width and height of the
    decoded images. `models`: models to measure alone; `served`: end to end; `images`: number of different images for
    these. `steady`: models scanned with for `steady_seconds`, `steady_warm_seconds` after its plan; `peer_seconds`:
    as long is each peer measured. `scanned`: least number of objects in a scan, so that its start and end have little
    influence. `listed`: numbers of objects to plan and scan with a stub scorer. `indexed`, `trained`: numbers of images
    to index and train on.
    """

    name: Literal["full", "quick", "tiny"]
    rounds: int = 3
    seconds: float = 1.5
    serving_seconds: float = 5.0
    scanned: int = 100
    sizes: tuple[tuple[int, int], ...] = ((256, 256), (500, 375), (1920, 1080), (4000, 3000))
    models: tuple[str, ...] = ("ssp", "ssp-lite", "resnet50", "simplecnn")
    served: tuple[str, ...] = ("ssp", "ssp-lite")
    images: int = 64
    steady: tuple[str, ...] = ("starter", "ssp-lite")
    steady_seconds: float = 60.0
    steady_warm_seconds: float = 12.0
    peer_seconds: float = 20.0
    listed: tuple[int, ...] = (10_000,)
    indexed: int = 2_000
    trained: int = 256
    scaling: bool = True


FULL = Settings(name="full")
QUICK = Settings(
    name="quick",
    seconds=0.5,
    serving_seconds=2.0,
    sizes=((256, 256), (500, 375)),
    models=("ssp", "ssp-lite"),
    served=("ssp-lite",),
    images=32,
    steady=(),
    scanned=0,
    listed=(),
    indexed=0,
    trained=0,
    scaling=False,
)
TINY = Settings(
    name="tiny",
    rounds=1,
    seconds=0.05,
    serving_seconds=0.05,
    sizes=((64, 48),),
    models=("ssp-lite",),
    served=("ssp-lite",),
    images=4,
    steady=("ssp-lite",),
    steady_seconds=4.0,
    steady_warm_seconds=3.0,
    peer_seconds=0.5,
    scanned=8,
    listed=(40,),
    indexed=20,
    trained=16,
)


@dataclass
class Recorder:
    """Collects the figures of one section."""

    section: Section
    figures: list[Figure] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)

    def add(
        self,
        name: str,
        unit: Unit,
        values: Iterable[float],
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Add a row: the median of the values, their least and greatest."""
        values = list(values)
        self.figures.append(
            Figure(
                section=self.section,
                name=name,
                unit=unit,
                median=statistics.median(values),
                low=min(values),
                high=max(values),
                rounds=len(values),
                at_least=at_least,
                at_most=at_most,
            )
        )

    def ratio(
        self,
        name: str,
        over: list[float],
        under: list[float],
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Add a row of the ratios `over` / `under` of each round."""
        self.add(name, "x", (a / b for a, b in zip(over, under, strict=True)), at_least, at_most)

    def left_out(self, what: str, why: str) -> None:
        """Note a measurement that was not run."""
        self.not_run.append(NotRun(section=self.section, what=what, why=why))


def alternate(contenders: dict[str, Callable[[], float]], rounds: int) -> Values:
    """Run all contenders in turn, once per round; every second round in reverse order. Each is first run once to warm
    up. Returns the values by contender."""
    values: Values = {name: [] for name in contenders}
    for measure in contenders.values():
        measure()
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            values[name].append(contenders[name]())
    return values


def summary(values: list[float]) -> str:
    """The median of the rounds, and the least and greatest of them, in three digits."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
