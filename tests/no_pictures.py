"""Reports without their pictures, which take most of the time of a small report."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from matplotlib.figure import Figure

from patchscan.reporting import likelihood_plots, plots
from patchscan.scanning import report

BLANK = Figure(figsize=(1, 1))
Functions = list[tuple[ModuleType, str, Callable[..., Any]]]

# What composes a picture, and what makes a file of it.
COMPOSE: Functions = [
    (module, name, function)
    for module in (plots, likelihood_plots, report)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and inspect.signature(function).return_annotation is Figure
]
DRAW: Functions = [(plots, "png", plots.png)]


def stand_ins() -> Functions:
    """The same functions, whose pictures show nothing and take no time."""
    blank = [(module, name, lambda *_, **__: BLANK) for module, name, _ in COMPOSE]
    return [*blank, (plots, "png", lambda *_: b"")]


@contextmanager
def replaced(functions: Functions) -> Iterator[None]:
    """Put functions in the place of those of these names within the block."""
    before = [(module, name, getattr(module, name)) for module, name, _ in functions]
    put(functions)
    try:
        yield
    finally:
        put(before)


def put(functions: Functions) -> None:
    """Put functions in the place of those of these names."""
    for module, name, function in functions:
        setattr(module, name, function)
