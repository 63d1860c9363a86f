"""Render a report's dict as one self-contained HTML page. Every figure on the page is looked up by its path in the
report and has that path in its `data-json` attribute, so that it can be found in the JSON file beside the page."""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from patchscan.common.files import atomic_write

MISSING = "–"


class Figures:
    """Looks up and formats a report's values by dotted path, for templates."""

    def __init__(self, report: Mapping[str, Any]):
        self.report = report

    def at(self, path: str) -> Any:
        """Return the value at a dotted path such as `models.0.name`. Raises KeyError or IndexError if there is none."""
        value: Any = self.report
        while path:
            if isinstance(value, list):
                part, _, path = path.partition(".")
                value = value[int(part)]
            else:  # a key may have dots: one is the name of a data set's folder
                part = max((key for key in value if f"{path}.".startswith(f"{key}.")), key=len, default=path)
                value, path = value[part], path[len(part) + 1 :]
        return value

    def text(self, path: str, style: str = "") -> Markup:
        """Return the value in the given format style, as a span with its path."""
        return Markup('<span data-json="{}" data-style="{}">{}</span>').format(path, style, show(self.at(path), style))

    def cell(self, path: str, style: str = "") -> Markup:
        """Return a table cell for the value; tables sort by the value, not by its text."""
        value = self.at(path)
        key = "" if value is None else value
        return Markup('<td data-sort="{}">{}</td>').format(key, self.text(path, style))

    def estimate(self, path: str, style: str = "3", mark: str = "") -> Markup:
        """Return a table cell for an estimate {value, low, high}: the value and a mark above its 95 % interval."""
        estimate, interval = self.at(path), "no interval"
        if estimate["value"] is None:
            return self.cell(f"{path}.value", style)
        if estimate["low"] is not None:
            interval = self.text(f"{path}.low", style) + " to " + self.text(f"{path}.high", style)
        return Markup('<td data-sort="{}">{}{}<small>{}</small></td>').format(
            estimate["value"], self.text(f"{path}.value", style), mark, interval
        )


def show(value: Any, style: str = "") -> str:
    """Format a value for a page. Styles: a digit (decimals), `%` and `%1` (per cent, decimals), `+%1` (a difference of
    shares, in percentage points with its sign), `n` (thousands separated), `p` (p-value), `share` (per cent, as many
    decimals as it has), `time` (an ISO time in UTC), empty (as it is)."""
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
    if style.startswith("+%"):
        return f"{value * 100:+.{int(style[2:] or 0)}f}"
    if style.startswith("%"):
        return _rounded(value, int(style[1:] or 0) + 2, 100, "\u00a0%")
    if style:
        return _rounded(value, int(style), 1, "")
    return str(value)


def show_estimate(estimate: Mapping[str, Any], style: str, form: Callable[[Any, str], str] = show) -> str:
    """Format an estimate {value, low, high} for a text: the value, and its interval where it has one of more than a
    point."""
    value, low, high = (
        None if estimate[key] is None else form(estimate[key], style) for key in ("value", "low", "high")
    )
    if value is None or low in (None, high):
        return value or MISSING
    return f"{value} ({low} to {high})"


def _rounded(value: float, decimals: int, scale: int, unit: str) -> str:
    """`value` times `scale`, rounded. A share is never rounded to 0 or to 1: `< 0.1 %`, `> 99.9 %`."""
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
    """Render a template of `package`, such as patchscan.scanning, for a report. The template can use `report`,
    `figures` and `extra`, and extend base.html of patchscan.reporting."""
    found = _templates(package).get_template(template)
    script = files("patchscan.reporting.templates").joinpath("sort.js").read_text(encoding="utf-8")
    values = {"script": script, "policy": script_policy(script)} | extra
    page = found.render(report=report, figures=Figures(report), **values)
    return page.encode("utf-8", "backslashreplace").decode()  # a file's name need not be UTF-8


def script_policy(script: str) -> str:
    """Return a Content-Security-Policy that lets a page run this one script, whatever a file's name would smuggle in,
    and fetch nothing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


@cache
def _templates(package: str) -> Environment:
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("patchscan.reporting")])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, atomically. Raises ValueError if it contains NaN, which is a bug."""
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with atomic_write(path) as file:
        file.write_text(text, encoding="utf-8")
