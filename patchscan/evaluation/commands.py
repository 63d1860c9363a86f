"""Commands for evaluation: evaluate, explain, power, scan-video."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from patchscan.common.console import say, sentence
from patchscan.common.shipped import find_run, is_shipped
from patchscan.dataset.commands import INDEX
from patchscan.detector.answer import TIERS, Engine

Run = Annotated[Path, typer.Option(parser=find_run, metavar="RUN", help="Run folder, or starter, ssp-lite.")]


def add_to(app: typer.Typer) -> None:
    """Register this package's commands."""
    app.command(rich_help_panel="Judge")(evaluate)
    app.command(rich_help_panel="Judge")(explain)
    app.command(rich_help_panel="Judge")(power)
    app.command("scan-video", rich_help_panel="Scan")(scan_video)


def evaluate(
    run: Annotated[
        list[Path],
        typer.Option(
            parser=find_run, metavar="RUN", help="Run folder, or starter, ssp-lite; may be repeated, to compare."
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(help="A data set, folder or s3:// URL: DATA/<generator>/val/{ai,nature}; may be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
    protocol: Annotated[
        Literal["raw", "matched", "both"],
        typer.Option(help="Score DATA as it is, its matched version (built first if missing), or both."),
    ] = "raw",
    matched: Annotated[
        Path | None, typer.Option(help="Folder of the matched version, if not DATA-matched. It is reported as well.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="Fit temperature, bias, threshold and abstain band, and write them to the card.")
    ] = True,
    max_fpr: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="Highest share of real images that may be called AI.")
    ] = 0.05,
    max_fnr: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="Highest share of AI images that may be called real.")
    ] = 0.05,
    device: Annotated[str, typer.Option(help="Where to score: cpu, cuda, cuda:1.")] = "cpu",
    engine: Annotated[
        Engine | None,
        typer.Option(help="torch, onnx or openvino. Default: onnx on a CPU, where a run folder has a model.onnx."),
    ] = None,
    index: INDEX = None,
    robustness: Annotated[
        int, typer.Option(min=0, help="Also measure robustness, on this many images of each generator and class.")
    ] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score at most this many images of each generator and class.")
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            help="Score the images as delivered by native, web, hard or enlarged (default: all); may be repeated."
        ),
    ] = None,
    sources: Annotated[
        Path | None, typer.Option(help="CSV with columns file and source, if not DATA/sources.csv or beside DATA.")
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="NAME=GENERATOR,GENERATOR: show the mean over these; may be repeated.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Score the images of this CSV (key, label; a file or s3:// URL) instead of the val split: keys below"
            " the folder DATA, or of its bucket. The cards stay as they are."
        ),
    ] = None,
    when: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH",
            help="Judge two runs as a cascade too: the second decides where the first one's p_ai is in this band.",
        ),
    ] = None,
    when_loss: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="The same, with the band that asks the second least often while the cascade's error on seen generators"
            " is at most this much above the second one's.",
        ),
    ] = None,
) -> None:
    """Score the validation split, calibrate on the seen generators, and write a report.

    Writes report.html, report.json, RESULTS_SUMMARY.txt, RESULTS_TABLE.md, figures/ and the scores to OUT. A second run
    with the same weights and images reuses the scores. The images are scored as stored and re-delivered by each tier;
    a folder of real images only, DATA/<kind>/val/nature, shows false alarms by kind. The decision is fitted on the
    first data set.

    \b
    Examples:
      patchscan evaluate --run runs/ssp --data data/genimage --out build/report
      patchscan evaluate --run runs/ssp --run runs/resnet50 --data data/genimage --out build/report --max-fpr 0.01
      patchscan evaluate --run runs/ssp --data data/genimage --protocol both --out build/report --robustness 50
      patchscan evaluate --run runs/ssp --data data/genmix --data data/alarms --out build/report
      patchscan evaluate --run runs/small --run runs/strong --data data/genimage --out build/report --when-loss 0.01
      patchscan evaluate --run runs/ssp --data s3://photos --labels audits/labels.csv --out build/report
    """
    from patchscan.dataset.sources import find_sources
    from patchscan.detector.card import CARD_FILE
    from patchscan.detector.cascade import parse_band
    from patchscan.evaluation.calibration import Target
    from patchscan.evaluation.evaluate import Options
    from patchscan.evaluation.evaluate import evaluate as run_evaluation

    if when and when_loss is not None:
        raise typer.BadParameter("give --when or --when-loss, not both")
    if unknown := set(tier or ()) - set(TIERS):
        raise typer.BadParameter(f"--tier takes {', '.join(TIERS)}, not {', '.join(sorted(unknown))}")
    sets = _data_sets(data, protocol, matched, index, labels)
    options = Options(
        device=device,
        engine=engine,
        calibrate=calibrate,
        target=Target(max_fpr, max_fnr),
        limit=limit,
        # --index is the index of DATA; the matched version has its own.
        index=index if next(iter(sets.values())) == data[0] else None,
        robustness=robustness,
        tiers=tuple(one for one in TIERS if one in (tier or TIERS) or one == "native"),
        # A matched version may lie elsewhere than the data, and their sources.
        sources=sources or (find_sources(data[0]) if "matched" in sets else None),
        groups=dict(_group(one) for one in group or []),
        labels=labels,
        when=parse_band(when) if when else None,
        when_loss=when_loss,
    )
    report = run_evaluation(run, sets, out, options)
    for finding in report["findings"]["models"]:
        say(sentence(f"- {finding}"))
    if not labels:
        for one, model in zip(run, report["models"], strict=False):  # a cascade, the last of them, has no card
            what = "decision and figures" if model["calibrated_on"] else "figures"
            kept = "came with patchscan, and stays as it is: evaluate a copy to calibrate it"
            say(f"{one / CARD_FILE} {kept}" if is_shipped(one) else f"{what} written to {one / CARD_FILE}")
    say(f"report: {out / 'report.html'}")


def _data_sets(
    data: list[str], protocol: str, matched: Path | None, index: Path | None, labels: str | None
) -> dict[str, str | Path]:
    """The data sets to evaluate, by name. Raises BadParameter for options that do not go together."""
    from patchscan.dataset.layout import data_name
    from patchscan.dataset.matched import matched_version, protocol_of

    if labels:
        if len(data) > 1 or protocol != "raw" or matched or index:
            raise typer.BadParameter("--labels takes a single --data, and no --protocol, --matched or --index")
        return {"raw": data[0]}
    if len(data) > 1:
        if protocol != "raw" or matched or index:
            raise typer.BadParameter("--protocol, --matched and --index take a single --data")
        if len({data_name(where) for where in data}) < len(data):
            raise typer.BadParameter("two --data folders have the same name: the report could not tell them apart")
        return {data_name(where): where for where in data}
    sets: dict[str, str | Path] = {} if protocol == "matched" else {protocol_of(data[0]): data[0]}
    if protocol != "raw" or matched:
        sets["matched"] = matched_version(data[0], matched, index)
    return sets


def _group(text: str) -> tuple[str, list[str]]:
    name, _, generators = text.partition("=")
    if not name or not generators:
        raise typer.BadParameter(f"--group takes NAME=GENERATOR,GENERATOR, not {text!r}")
    return name, generators.split(",")


def explain(
    image: Annotated[Path, typer.Argument(help="The image file.")],
    run: Run,
    out: Annotated[Path, typer.Option(help="The picture to write, a PNG file.")] = Path("explanation.png"),
    device: Annotated[str, typer.Option(help="Where to score: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Show why one image got its score: what the model saw, and what makes the answer uncertain.

    For a model that scores patches, the picture shows the chosen patch, its noise and the other candidates; for one
    that scores whole images, which parts raise or lower the score; for an ensemble, each member.

    Writes the picture to OUT and the figures as JSON to standard output.

    \b
    Example:
      patchscan explain photo.jpg --run runs/ssp --out explanation.png
    """
    import json

    from patchscan.evaluation.explain import as_dict
    from patchscan.evaluation.explain_picture import write_explanation

    typer.echo(json.dumps(as_dict(write_explanation(run, image, out, device)), indent=1))
    say(f"picture: {out}", error=True)


def power(
    limit: Annotated[
        float, typer.Option(min=0.00001, max=0.99999, help="The rate that is to be told from the true one.")
    ],
    true: Annotated[float, typer.Option(min=0, max=1, help="What you expect the rate to be.")],
    chance: Annotated[float, typer.Option(min=0.5, max=0.999, help="Chance to show it.")] = 0.8,
    per_source: Annotated[float, typer.Option(min=1, help="Images of each source, such as a photographer.")] = 1,
    alike: Annotated[float, typer.Option(min=0, max=1, help="How alike the results of one source are, 0 to 1.")] = 0.5,
) -> None:
    """Say how many images a claim would take: that a rate, such as the false alarms, lies below or above a limit.

    \b
    Examples:
      patchscan power --limit 0.01 --true 0.003
      patchscan power --limit 0.9 --true 0.95 --per-source 10 --alike 0.3
    """
    from patchscan.evaluation.power import design_effect, images_needed

    images = images_needed(limit, true, chance)
    side = "below" if true < limit else "above"
    say(
        f"To show with a chance of {chance * 100:g} % that a rate which truly is {true:g} lies {side} {limit:g}, with "
        f"its whole 95 % interval: {images:,} independent images."
    )
    if per_source > 1:
        effect = design_effect(per_source, alike)
        sources = math.ceil(images * effect / per_source)
        say(
            f"With {per_source:g} images of each source and results that are alike by {alike:g}: "
            f"{math.ceil(sources * per_source):,} images of {sources:,} sources."
        )


def scan_video(
    video: Annotated[Path, typer.Argument(help="The video file.")],
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder for video.json, video.png and report.html.")],
    frames: Annotated[int, typer.Option(min=2, help="How many frames to score, evenly spread over the video.")] = 60,
    device: Annotated[str, typer.Option(help="Where to score: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Score frames of a video and draw the score over time.

    Neighbouring frames are similar, so the interval of the mean is computed from blocks of frames.

    \b
    Example:
      patchscan scan-video clip.mp4 --run runs/ssp --out build/clip
    """
    from patchscan.evaluation.video import write_video_report

    report = write_video_report(run, video, out, frames, device)
    say(sentence(report["finding"]))
    say(f"report: {out / 'report.html'}")
