"""Write the evaluation report: report.json; report.html, RESULTS_SUMMARY.txt and RESULTS_TABLE.md made from it alone;
and pictures, as PNG files and embedded in the page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from patchscan.dataset.layout import POOLED, UNNAMED
from patchscan.detector.presets import preset_to_dict
from patchscan.evaluation import pictures
from patchscan.evaluation.comparison import compare
from patchscan.evaluation.evidence import evidence, evidence_curves
from patchscan.evaluation.findings import findings
from patchscan.evaluation.markdown import results_tables
from patchscan.evaluation.results import (
    PREVALENCES,
    Evaluated,
    calibration_summary,
    operating_points,
    protocol_title,
    result_rows,
    row_places,
)
from patchscan.evaluation.scoreboard import bounds_by_tier, scoreboard
from patchscan.evaluation.training_facts import training_facts, training_text
from patchscan.reporting import likelihood_plots, plots
from patchscan.reporting.pages import render, show, write_json, write_text
from patchscan.reporting.statistics import principal_components

SCHEMA = "patchscan-evaluation/1"


def build_report(
    models: list[Evaluated],
    data: dict[str, Any],
    groups: Mapping[str, list[str]] | None = None,
    runs: Sequence[Path] = (),
) -> dict[str, Any]:
    """Build report.json's content; `data` describes the evaluated images (name, digest, images, overlap with
    training), `groups` the means over generators that the scoreboard shows besides its own; `runs` are the folders of
    the first models, as far as these have any."""
    protocols = list(models[0].tables)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": data,
        "protocols": protocols,
        "prevalences": list(PREVALENCES),
        "models": [_model(model, groups or {}, run) for model, run in zip_longest(models, runs)],
        "comparisons": {name: compare(models, name) for name in protocols} if len(models) > 1 else {},
    }
    report["findings"] = findings(report)
    return report


def _model(evaluated: Evaluated, groups: Mapping[str, list[str]], run: Path | None) -> dict[str, Any]:
    card = evaluated.card
    return {
        "name": card.name,
        "version": card.version,
        "digest": card.digest,
        "architecture": card.architecture,
        "preset": preset_to_dict(card.preset),
        "weights_sha256": card.weights_sha256,
        "seen": sorted(evaluated.seen),
        "training": training_facts(card),
        "explained_variance": None if run is None else _explained_variance(run),
        "decision": asdict(card.decision),
        "calibrated_on": evaluated.calibrated_on,
        "warnings": card.all_warnings,
        "robustness": card.robustness,
        "scoreboard": scoreboard(evaluated, groups),
        "bounds": bounds_by_tier(evaluated),
        "evidence": evidence(evaluated),
        "results": {
            protocol: {
                "rows": result_rows(evaluated, protocol),
                "operating_points": operating_points(evaluated, protocol),
                "calibration": calibration_summary(evaluated, protocol),
            }
            for protocol in evaluated.tables
        },
    }


def _explained_variance(run: Path) -> dict[str, list[float]] | None:
    """The shares of the first two principal components of the features, by moment; None where the folder has none."""
    moments = pictures.feature_moments(run)
    shares = {moment: principal_components(features)[1][:2].tolist() for moment, (features, *_) in moments.items()}
    return shares or None


def write_report(report: dict[str, Any], models: list[Evaluated], runs: list[Path], out: Path) -> None:
    """Write all files of the report into `out` (made if missing)."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawings = _drawings(report, models, runs)
    images = {name: plots.write_png(drawing, folder / f"{name}.png") for name, drawing in drawings.items()}
    write_json(out / "report.json", report)
    places = {protocol: row_places(report, protocol) for protocol in report["protocols"]} if len(models) > 1 else {}
    names = {"pooled": POOLED, "unnamed": UNNAMED}
    page = render("patchscan.evaluation", "evaluation.html", report, images=images, row_places=places, **names)
    write_text(out / "report.html", page)
    write_text(out / "RESULTS_SUMMARY.txt", summary_text(report))
    write_text(out / "RESULTS_TABLE.md", results_tables(report))


def _drawings(report: dict[str, Any], models: list[Evaluated], runs: list[Path]) -> dict[str, Figure]:
    drawings: dict[str, Figure] = {}
    for protocol in report["protocols"]:
        drawings |= pictures.overview(report, protocol)
        for model in models:
            drawings |= pictures.model_pictures(model, protocol)
    for model, run in zip(models, runs, strict=True):
        if moments := pictures.feature_moments(run):
            titled = {pictures.MOMENTS[moment]: values for moment, values in moments.items()}
            drawings[f"{model.card.name}-features"] = plots.features(titled)
        if model.deliveries is not None:
            drawings[f"{model.card.name}-risk-coverage-by-tier"] = pictures.risk_coverage_by_tier(model)
        for data, curves in evidence_curves(model).items():
            drawings[f"{model.card.name}-{data}-tippett"] = likelihood_plots.tippett(curves)
            drawings[f"{model.card.name}-{data}-cross-entropy"] = likelihood_plots.empirical_cross_entropy(curves)
        if model.card.robustness:
            drawings[f"{model.card.name}-robustness"] = plots.robustness(model.card.robustness["rows"])
    return drawings


def summary_text(report: dict[str, Any]) -> str:
    """Return the findings, warnings and main figures as plain text."""
    data = report["data"]
    lines = [
        "RESULTS SUMMARY",
        f"Data: {data['name']}, {data['images']:,} validation images, digest {data['digest'][:16]}",
        f"Written: {report['created']} by patchscan",
        "",
        "Findings",
        *(f"- {sentence}" for part in report["findings"].values() for sentence in part),
    ]
    for model in report["models"]:
        lines += ["", f"{model['name']} {model['version']} (digest {model['digest'][:16]})"]
        lines += [f"  Training: {training_text(model['training'])}"]
        for moment, shares in (model["explained_variance"] or {}).items():
            told = " and ".join(show(share, "%1") for share in shares)
            lines.append(f"  Features {pictures.MOMENTS[moment]}: {told} of the variance on the first two components")
        lines += [f"  Warning: {warning}" for warning in model["warnings"]]
        lines += [f"  Decision: p_ai >= {model['decision']['threshold']:.4f}; {model['decision']['chosen_by']}"]
        for protocol, result in model["results"].items():
            lines += [f"  {protocol_title(protocol)}", f"    {'':22}{'images':>7}  {'accuracy':>24}  {'AUC':>24}"]
            lines += [f"    {_summary_line(row)}" for row in result["rows"]]
    return "\n".join(lines) + "\n"


def _summary_line(row: dict[str, Any]) -> str:
    accuracy, auc = (_in_brackets(row["metrics"][name]) for name in ("accuracy", "auc"))
    name = row["name"] if row["kind"] == "group" else f"{row['name']} ({row['kind']})"
    return f"{name:22}{row['counts']['scored']:>7}  {accuracy:>24}  {auc:>24}"


def _in_brackets(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return show(None)
    return f"{show(estimate['value'], '3')} [{show(estimate['low'], '3')}, {show(estimate['high'], '3')}]"
