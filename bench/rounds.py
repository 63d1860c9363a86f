"""How everything is measured: contenders take turns, so that a machine that slows down slows all of them."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from bench.results import Figure, NotRun, Section, Unit

Values = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured. `seconds` is the length of one measurement of a rate; serving takes `serving_seconds`.

    `sizes` are width, height of the decoded images; `models` are measured alone, `served` end to end; `images` is how
    many different images those get; a scan has at least `scanned` objects, so that its ends weigh little. `listed`
    objects are planned and scanned with a stub scorer; `indexed` and `trained` images are indexed and trained on. 0 or
    () leaves a measurement out.
    """

    name: Literal["full", "quick", "tiny"]
    rounds: int = 5
    seconds: float = 1.5
    serving_seconds: float = 5.0
    scanned: int = 150
    sizes: tuple[tuple[int, int], ...] = ((256, 256), (500, 375), (1920, 1080), (4000, 3000))
    models: tuple[str, ...] = ("ssp", "ssp-lite", "resnet50", "simplecnn")
    served: tuple[str, ...] = ("ssp", "ssp-lite")
    images: int = 64
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
    serving_seconds=0.5,
    sizes=((64, 48),),
    models=("ssp-lite",),
    served=("ssp-lite",),
    images=4,
    scanned=16,
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
        """The median of the values, and their spread."""
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
        """`over` / `under`, round by round."""
        self.add(name, "x", (a / b for a, b in zip(over, under, strict=True)), at_least, at_most)

    def left_out(self, what: str, why: str) -> None:
        """A measurement that was not run."""
        self.not_run.append(NotRun(section=self.section, what=what, why=why))


def alternate(contenders: dict[str, Callable[[], float]], rounds: int) -> Values:
    """One value a contender and round. Every contender warms up once; every second round goes backwards."""
    values: Values = {name: [] for name in contenders}
    for measure in contenders.values():
        measure()
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            values[name].append(contenders[name]())
    return values
