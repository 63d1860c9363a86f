"""From a report's dict to one self-contained HTML page. Every figure on a page is fetched by its path in the report and
carries that path in `data-json`, so a reader (or a test) can trace it to the JSON file beside the page."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from patchscan.common.files import atomic_write

MISSING = "–"


class Figures:
    """Looks up and prints values of one report by dotted path; a template calls its methods."""

    def __init__(self, report: Mapping[str, Any]):
        self.report = report

    def at(self, path: str) -> Any:
        """The value at a dotted path such as `models.0.name`. Raises KeyError or IndexError where there is none."""
        value: Any = self.report
        for part in path.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        return value

    def text(self, path: str, style: str = "") -> Markup:
        """The value in the given format style, as a span that names its path."""
        return Markup('<span data-json="{}" data-style="{}">{}</span>').format(path, style, show(self.at(path), style))

    def cell(self, path: str, style: str = "") -> Markup:
        """A table cell for the value; sorts by the value itself."""
        value = self.at(path)
        key = "" if value is None else value
        return Markup('<td data-sort="{}">{}</td>').format(key, self.text(path, style))

    def estimate(self, path: str, style: str = "3") -> Markup:
        """A table cell for an estimate {value, low, high}: the value above its 95 % interval."""
        value = self.at(path)["value"]
        if value is None:
            return Markup('<td data-sort="">{}</td>').format(self.text(f"{path}.value", style))
        if self.at(path)["low"] is None:
            return Markup('<td data-sort="{}">{}<small>no interval</small></td>').format(
                value, self.text(f"{path}.value", style)
            )
        low, high = self.text(f"{path}.low", style), self.text(f"{path}.high", style)
        return Markup('<td data-sort="{}">{}<small>{} to {}</small></td>').format(
            value, self.text(f"{path}.value", style), low, high
        )


def show(value: Any, style: str = "") -> str:
    """A value as a page prints it. Styles: a digit (decimals), `%` and `%1` (per cent, decimals), `n` (thousands
    separated), `p` (p-value), `share` (per cent, as many decimals as it has), `time` (an ISO time in
    UTC), empty (as it is)."""
    if value is None:
        return MISSING
    if style == "time":
        return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M UTC")
    if style == "n":
        return f"{value:,}"
    if style == "p":
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    if style == "share":
        return f"{value * 100:g}\u00a0%"
    if style.startswith("%"):
        return _rounded(value, int(style[1:] or 0) + 2, 100, "\u00a0%")
    if style:
        return _rounded(value, int(style), 1, "")
    return str(value)


def _rounded(value: float, decimals: int, scale: int, unit: str) -> str:
    """`value` rounded to so many decimals, times `scale`; a share is never rounded to a certainty that it is not."""
    places = decimals - len(str(scale)) + 1
    step = 10**-places
    # 3 / 80 and 1 - 77 / 80 differ in the last bit, and would be rounded to 3.8 and 3.7 %.
    scaled = round(value * scale, 9)
    if value > 0 and scaled <= step / 2:
        return f"< {step:.{places}f}{unit}"
    if scaled >= scale - step / 2 and value < 1:
        return f"> {scale - step:.{places}f}{unit}"
    return f"{scaled:.{places}f}{unit}"


def render(package: str, template: str, report: Mapping[str, Any], **extra: Any) -> str:
    """Render a template of `package`, such as patchscan.scanning, over a report; the template sees `report`, its
    `figures` and `extra`, and may extend reporting's base.html."""
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("patchscan.reporting")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["show"] = show
    return environment.get_template(template).render(report=report, figures=Figures(report), escape=escape, **extra)


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, whole or not at all; a NaN in it is a bug and raises ValueError."""
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as file:
        file.write_text(text, encoding="utf-8")
