"""Write a report's main figures as Markdown tables, for a page or an issue."""

from collections.abc import Iterable, Sequence
from typing import Any

from patchscan.evaluation.training_facts import training_text
from patchscan.reporting.pages import show

Row = dict[str, Any]


def results_tables(report: dict[str, Any]) -> str:
    """Return the accuracy (one line per model, one column per generator, as the study has it) and the AUC (one line per
    generator, one column per model) under each protocol, with what each model was trained from, and each model's
    scoreboard where it has several tiers."""
    tables = []
    for protocol in report["protocols"]:
        rows = {model["name"]: model["results"][protocol]["rows"] for model in report["models"]}
        under = f"{protocol} protocol, {report['data']['name']}; 95 % intervals in brackets; * unseen in training"
        tables += [f"Accuracy (%) at each model's threshold, {under}.", _accuracy_table(rows)]
        tables += [f"AUC, {under}.", _auc_table(rows)]
        trained = (f"{model['name']}: {training_text(model['training'])}" for model in report["models"])
        tables.append(f"Training: {'; '.join(trained)}.")
    for model in report["models"]:
        for data in model["scoreboard"]:
            if len(data["rows"][0]["tiers"]) > 1:
                tables += _scoreboard_tables(model["name"], data)
    return "\n\n".join(tables) + "\n"


def _accuracy_table(rows: dict[str, list[Row]]) -> str:
    names = list(dict.fromkeys(row["name"] for part in rows.values() for row in part if row["kind"] != "group"))
    lines = ([model, *(_accuracy_cell(part, name) for name in names)] for model, part in rows.items())
    return _table(["model", *names], lines)


def _accuracy_cell(rows: Sequence[Row], name: str) -> str:
    row = next((row for row in rows if row["name"] == name), None)
    if row is None or row["metrics"]["accuracy"]["value"] is None:
        return show(None)
    accuracy = row["metrics"]["accuracy"]
    value, low, high = (f"{accuracy[key] * 100:.2f}" for key in ("value", "low", "high"))
    return f"{value}{'*' if row['kind'] == 'unseen' else ''} [{low}, {high}]"


def _auc_table(rows: dict[str, list[Row]]) -> str:
    by_name = {model: {row["name"]: row for row in part} for model, part in rows.items()}
    names = dict.fromkeys(name for part in by_name.values() for name in part)

    def cell(row: Row | None) -> str:
        if row is None:
            return show(None)
        return _interval(row["metrics"]["auc"], "3") + ("*" if row["kind"] == "unseen" else "")

    lines = ([name, *(cell(part.get(name)) for part in by_name.values())] for name in names)
    return _table(["", *rows], lines)


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
    tables = []
    for title, figure, rows, style in measured if data["both_classes"] else []:
        tables += _scoreboard_table(f"{model} on {data['name']}: {title}.", figure, rows, style)
    title = f"{model} on {data['name']}: real images called AI, %."
    return tables + _scoreboard_table(title, "false_alarms", means, "0")


def _scoreboard_table(title: str, figure: str, rows: list[Row], style: str) -> list[str]:
    if all(one[figure]["value"] is None for row in rows for one in row["tiers"].values()):
        return []
    scale = 1 if figure in ("auc", "ece") else 100
    lines = ([row["name"], *(_interval(one[figure], style, scale) for one in row["tiers"].values())] for row in rows)
    return [title, _table(["", *rows[0]["tiers"]], lines)]


def _interval(estimate: Row, style: str, scale: int = 1) -> str:
    """An estimate, and its interval where it has one of more than a point."""
    if estimate["value"] is None:
        return show(None)
    value, low, high = (
        None if estimate[key] is None else show(estimate[key] * scale, style) for key in ("value", "low", "high")
    )
    return f"{value}" if low in (None, high) else f"{value} ({low} to {high})"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
