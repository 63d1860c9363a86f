"""Write a report's main figures as Markdown tables, for a page or an issue."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from patchscan.common.console import printable
from patchscan.dataset.layout import POOLED
from patchscan.evaluation.results import protocol_title, side_by_side
from patchscan.evaluation.scoreboard import LOW_FPRS
from patchscan.evaluation.training_facts import training_text
from patchscan.reporting.pages import show, show_estimate

Row = dict[str, Any]
# Each model's row of a generator or group, by its name.
Rows = Mapping[str, Sequence[Row | None]]
# What Markdown would take for a table's line, code, a link or a tag in a name from outside.
MARKS = re.compile(r"[\\`\[\]<>|]")


def results_tables(report: dict[str, Any]) -> str:
    """Return the accuracy (one line per model, one column per generator, as the study has it) and the AUC (one line per
    generator, one column per model) under each protocol, with what each model was trained from, and each model's
    scoreboard where it has several tiers."""
    tables, models = [], [model["name"] for model in report["models"]]
    for protocol in report["protocols"]:
        rows = side_by_side(report, protocol)
        title = protocol_title(protocol)
        whose = title if title == protocol else f"{title}, {_plain(report['data']['name'])}"
        under = f"{whose}; 95 % intervals in brackets; * unseen in training"
        tables += [f"Accuracy (%) at each model's threshold, {under}.", *_accuracy_table(models, rows)]
        tables += [f"AUC, {under}.", *_auc_table(models, rows)]
        trained = (f"{model['name']}: {training_text(model['training'])}" for model in report["models"])
        tables.append(f"Training: {_plain('; '.join(trained))}.")
    for model in report["models"]:
        for data in model["scoreboard"]:
            if len(data["rows"][0]["tiers"]) > 1:
                tables += _scoreboard_tables(model["name"], data)
    return "\n\n".join(tables) + "\n"


def _accuracy_table(models: Sequence[str], rows: Rows) -> list[str]:
    generators = {name: each for name, each in rows.items() if name not in POOLED}
    lines = (
        [model, *(_accuracy_cell(each[number]) for each in generators.values())] for number, model in enumerate(models)
    )
    return [_table(["model", *generators], lines), *_reasons(_without(models, generators, "accuracy"))]


def _accuracy_cell(row: Row | None) -> str:
    if row is None or row["metrics"]["accuracy"]["value"] is None:
        return show(None)
    accuracy = row["metrics"]["accuracy"]
    value, low, high = (_percent(accuracy[key], "2") for key in ("value", "low", "high"))
    return f"{value}{'*' if row['kind'] == 'unseen' else ''} [{low}, {high}]"


def _auc_table(models: Sequence[str], rows: Rows) -> list[str]:
    lines = ([name, *map(_auc_cell, each)] for name, each in rows.items())
    return [_table(["", *models], lines), *_reasons(_without(models, rows, "auc"))]


def _auc_cell(row: Row | None) -> str:
    if row is None:
        return show(None)
    return show_estimate(row["metrics"]["auc"], "3") + ("*" if row["kind"] == "unseen" else "")


def _without(models: Sequence[str], rows: Rows, metric: str) -> Iterator[tuple[str, str]]:
    """Which of these generators and groups lack the figure, with the models in brackets unless all do, and why."""
    for name, each in rows.items():
        concerned: dict[str, list[str]] = {}
        for model, row in zip(models, each, strict=True):
            if row is None or row["metrics"][metric]["value"] is None:
                concerned.setdefault(_why_not_measured(row), []).append(model)
        for why, those in concerned.items():
            yield name if len(those) == len(models) else f"{name} ({', '.join(those)})", why


def _why_not_measured(row: Row | None) -> str:
    if row is None:
        return "fewer than two such generators"
    if not row["counts"]["scored"]:
        return "no image was scored"
    return "no photograph was scored" if row["counts"]["ai"] else "no AI image was scored"


def _reasons(empty: Iterable[tuple[str, str]]) -> list[str]:
    """A line that says why cells are empty: where, and why."""
    places: dict[str, list[str]] = {}
    for where, why in empty:
        places.setdefault(why, []).append(where)
    told = [f"{', '.join(where)}: {why}" for why, where in places.items()]
    return [f"{show(None)} {_plain('; '.join(told))}."] if told else []


def _scoreboard_tables(model: str, data: dict[str, Any]) -> list[str]:
    """Titles and tables of one data set by delivery; all but the AUC of means and kinds only, where there are any."""
    means = [row for row in data["rows"] if row["kind"] in ("group", "real")] or data["rows"]
    found = "AI images found where {} of the photographs are called AI, %"
    measured: list[tuple[str, str, list[Row], str]] = [
        ("AUC", "auc", data["rows"], "2"),
        ("AI images found at the threshold, %", "found", means, "0"),
        (found.format("1 %"), "tpr_at_fpr_1", means, "0"),
        (found.format("0.1 %"), "tpr_at_fpr_01", means, "0"),
        ("calibration error (ECE) of p_ai", "ece", means, "3"),
    ]
    if not data["both_classes"]:
        measured = []
    measured.append(("real images called AI, %", "false_alarms", means, "0"))
    tables = []
    for title, figure, rows, style in measured:
        tables += [
            f"{_plain(model)} on {_plain(data['name'])}: {title}.",
            *_scoreboard_table(figure, rows, style, data["real"]),
        ]
    return tables


def _scoreboard_table(figure: str, rows: list[Row], style: str, photographs: int) -> list[str]:
    """The table, and why cells are empty; that alone where all are."""
    missing = [row for row in rows if any(one[figure]["value"] is None for one in row["tiers"].values())]
    needed = 1 / LOW_FPRS.get(figure, 1)
    if photographs < needed:
        return [f"Not given: these data have {photographs:,} photographs, and at least {needed:,.0f} are needed."]
    form = show if figure in ("auc", "ece") else _percent
    lines = ([row["name"], *(show_estimate(one[figure], style, form) for one in row["tiers"].values())] for row in rows)
    return [_table(["", *rows[0]["tiers"]], lines), *_reasons((row["name"], _why_empty(row)) for row in missing)]


def _why_empty(row: Row) -> str:
    if row["kind"] == "real":
        return "no image was scored"
    if row["kind"] == "group":
        return "one of its generators has no figure"
    if not row["ai"] or not row["real"]:
        return "no photographs" if row["ai"] else "no AI images"
    return "no image of one of the classes was scored"


def _percent(share: float, decimals: str) -> str:
    """A share in per cent, without the sign: `< 1` and `> 99` where it is not 0 or all."""
    return show(share, f"%{decimals}").removesuffix("\u00a0%")


def _plain(text: str) -> str:
    """Text with names from outside, as one line in which Markdown finds no mark."""
    return MARKS.sub(r"\\\g<0>", printable(text))


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose columns and lines have names from outside."""
    named = ([_plain(name), *cells] for name, *cells in lines)
    rows = [[_plain(name) for name in header], ["---"] * len(header), *named]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
