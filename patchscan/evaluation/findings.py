"""Write a report's findings as sentences, which claim no more than the intervals and p-values support."""

from itertools import product
from typing import Any

from patchscan.dataset.layout import UNNAMED
from patchscan.reporting.pages import show, show_estimate

SIGNIFICANT = 0.05
TESTS = {"accuracy": "Accuracy", "auc": "AUC"}
# More names than these are told as a number: the table of comparisons has them.
LISTED = 5


def findings(report: dict[str, Any]) -> dict[str, list[str]]:
    """Return the sentences about each model under `models`, and those about pairs of models under `comparisons`."""
    several = len(report["protocols"]) > 1
    about = _model_findings if len(report["models"]) == 1 else _short_findings
    models, comparisons = [], []
    for protocol in report["protocols"]:
        prefix = f"[{protocol}] " if several else ""
        for model in report["models"]:
            models += [prefix + text for text in about(model, protocol)]
        comparisons += [prefix + text for text in _comparison_findings(report["comparisons"].get(protocol))]
    for model in report["models"]:
        models += [text for data in model["scoreboard"] for text in scoreboard_findings(model["name"], data)]
    models += [text for data in report["models"][0]["scoreboard"] for text in single_collections(data)]
    return {"models": models, "comparisons": comparisons}


def _model_findings(model: dict[str, Any], protocol: str) -> list[str]:
    rows = model["results"][protocol]["rows"]
    sentences = _generator_findings(model["name"], [row for row in rows if row["kind"] != "group"])
    point = model["results"][protocol]["operating_points"][0]
    group = "unseen" if point["groups"]["unseen"]["fake_detection"]["value"] is not None else "seen"
    precision = point["groups"][group]["precision"][1]
    if precision["value"] is not None:
        measured = [row for row in rows if row["kind"] == group]
        whose = "the AI images" if {row["name"] for row in measured} == {UNNAMED} else f"{group} generators' images"
        found, alarms = point["groups"][group]["fake_detection"], point["groups"][group]["false_alarms"]
        if alarms["value"]:
            false = {"value": 1 - precision["value"], "low": 1 - precision["high"], "high": 1 - precision["low"]}
            called = f"{show_estimate(alarms, '%1')} of the"
            told = f"{show_estimate(false, '%')} of its alarms would be false"
        else:  # the share of false alarms would be 0 %, with an interval up to nearly all
            called = f"none of the {sum(row['counts']['real'] for row in measured):,}"
            told = f"up to {show(1 - precision['low'], '%1')} of its alarms could be false, since up to "
            told += f"{show(alarms['high'], '%1')} of such real images could be called AI"
        sentences.append(
            f"By its threshold alone, as if no image were uncertain, {model['name']} finds "
            f"{show_estimate(found, '%1')} of {whose} and calls {called} real images in those data AI: where 1 % of "
            f"all images are AI, {told}."
        )
    return sentences


def single_collections(data: dict[str, Any]) -> list[str]:
    """Say whose images in a data set of the scoreboard come from one collection, so that no interval covers others."""
    rows = [row for row in data["rows"] if row["kind"] != "group"] if data["sources_known"] else []
    real = "the real images beside" if data["both_classes"] else "the real images of"
    told = []
    for one, images in (("ai", "the AI images of"), ("real", real)):
        names = [row["name"] for row in rows if row[f"{one}_collections"] == 1]
        if names:
            told.append(f"{images} {', '.join(names) if len(names) <= LISTED else f'{len(names)} of {len(rows)}'}")
    if not told:
        return []
    which = "; ".join(told)
    return [f"[{data['name']}] From one collection each, so that no interval covers other collections: {which}."]


def scoreboard_findings(model: str, data: dict[str, Any]) -> list[str]:
    """Return what delivery does to the mean AUC of one data set of the scoreboard, on unseen generators if there are
    several; for real images alone, the kind that is called AI most often."""
    rows = {row["name"]: row["tiers"] for row in data["rows"]}
    if not data["both_classes"]:
        return _kind_findings(model, data)
    name = next((name for name in ("mean of unseen", "mean of seen") if name in rows), None)
    tiers = {} if name is None else {tier: one["auc"] for tier, one in rows[name].items()}
    if len(tiers) < 2 or any(auc["value"] is None for auc in tiers.values()):
        return []
    figures = ", ".join(f"{show_estimate(auc, '2')} as {tier}" for tier, auc in tiers.items())
    return [f"[{data['name']}] {model}'s AUC, {name} generators, by delivery: {figures}."]


def _kind_findings(model: str, data: dict[str, Any]) -> list[str]:
    alarms = {row["name"]: row["tiers"]["native"]["false_alarms"] for row in data["rows"] if row["kind"] != "group"}
    known = {name: share for name, share in alarms.items() if share["value"] is not None}
    if not known:
        return []
    worst = max(known, key=lambda name: known[name]["value"])
    if not known[worst]["value"]:
        return [f"[{data['name']}] {model} calls no real image of any kind AI, as stored."]
    share = show(known[worst]["value"], "%1")
    return [
        f"[{data['name']}] Of the kinds of real images {model} calls {worst} AI most often: {share} of them as stored."
    ]


OUTCOMES = {
    "better": "separates AI from real images better than guessing on",
    "guessing": "is not shown to differ from guessing on",
    "worse": "is worse than guessing (it takes real images for AI and AI images for real) on",
    "unknown": "was scored on one class only, so no AUC can be computed, on",
    "nothing": "has no score of any image of",
}


def _generator_findings(model: str, rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for each outcome, naming the generators it holds for."""

    def with_auc(row: dict[str, Any]) -> str:
        auc = row["metrics"]["auc"]
        return _named(row) if auc["value"] is None else f"{_named(row)}, AUC {show_estimate(auc, '3')}"

    return [
        f"{model} {OUTCOMES[outcome]} {'; '.join(map(with_auc, part))}." for outcome, part in _by_outcome(rows).items()
    ]


def _short_findings(model: dict[str, Any], protocol: str) -> list[str]:
    """One sentence without figures, for a report of several models, whose tables have them: on how many generators the
    model is better than guessing, and on which it is not."""
    rows = [row for row in model["results"][protocol]["rows"] if row["kind"] != "group"]
    those = _by_outcome(rows)
    better = len(those.pop("better", []))
    count = f"all {len(rows)}" if better == len(rows) else f"{better} of {len(rows)}"
    parts = [f"{OUTCOMES['better']} {count} generators"]
    parts += [f"{OUTCOMES[outcome]} {', '.join(map(_named, part))}" for outcome, part in those.items()]
    return [f"{model['name']} {'; '.join(parts)}."]


def _named(row: dict[str, Any]) -> str:
    return "all images" if row["name"] == UNNAMED else f"{row['name']} ({row['kind']})"


def _by_outcome(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The generators' rows of each outcome that any has, in the order of OUTCOMES."""
    outcomes = [_outcome(row["metrics"]["auc"]) if row["counts"]["scored"] else "nothing" for row in rows]
    grouped = {
        outcome: [row for row, one in zip(rows, outcomes, strict=True) if one == outcome] for outcome in OUTCOMES
    }
    return {outcome: part for outcome, part in grouped.items() if part}


def _outcome(auc: dict[str, Any]) -> str:
    if auc["value"] is None:
        return "unknown"
    if auc["low"] <= 0.5 <= auc["high"]:
        return "guessing"
    return "better" if auc["low"] > 0.5 else "worse"


def _comparison_findings(comparison: dict[str, Any] | None) -> list[str]:
    if comparison is None:
        return []
    measured: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row, test in product(comparison["pairs"], TESTS):
        if row[test] is not None:
            measured.setdefault((row["first"], row["second"], test), []).append(row)
    sentences = [_pair_finding(rows, test) for (_, _, test), rows in measured.items() if _differs(rows, test)]
    for test, title in TESTS.items():
        alike = [
            f"{first} and {second}"
            for (first, second, one), rows in measured.items()
            if one == test and not _differs(rows, test)
        ]
        if alike:
            sentences.append(f"{title}: No difference shown on any images between {'; '.join(alike)}.")
    friedman = comparison["friedman"]
    if friedman:
        verb = "rank differently" if friedman["p_value"] < SIGNIFICANT else "are not shown to rank differently"
        sentences.append(
            f"Across {friedman['generators']} generators the {friedman['models']} models {verb} by AUC "
            f"(Friedman, p {_p(friedman['p_value'])})."
        )
    return sentences


def _differs(rows: list[dict[str, Any]], test: str) -> bool:
    return any(row[test]["p_corrected"] < SIGNIFICANT for row in rows)


def _pair_finding(rows: list[dict[str, Any]], test: str) -> str:
    """Say on which images one model of a pair beats the other, by how much, and on how many no difference is shown."""
    first, second = rows[0]["first"], rows[0]["second"]
    better: dict[int, list[str]] = {1: [], -1: []}
    equal = []
    for row in rows:
        result = row[test]
        if result["p_corrected"] >= SIGNIFICANT:
            equal.append(row["generator"])
        else:
            sign = 1 if result["value"] > 0 else -1
            value, low, high = sign * result["value"], *sorted((sign * result["low"], sign * result["high"]))
            size = _difference(value, low, high, test)
            better[sign].append(f"{row['generator']} by {size}, p {_p(result['p_corrected'])}")
    told = [
        f"{one} beats {other} on {'; '.join(places)}."
        for one, other, places in ((first, second, better[1]), (second, first, better[-1]))
        if places
    ]
    if equal:
        told.append(f"No difference shown on {_listed(equal)}.")
    return " ".join([f"{TESTS[test]}:", *told])


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= LISTED else f"the other {len(names)}"


def _difference(value: float, low: float, high: float, test: str) -> str:
    if test == "accuracy":
        return f"{value * 100:.1f} points ({low * 100:.1f} to {high * 100:.1f})"
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _p(value: float) -> str:
    shown = show(value, "p")
    return shown if shown.startswith("<") else f"= {shown}"
