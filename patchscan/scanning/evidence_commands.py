"""The commands by which people check a detector: `audit-sample` and `audit-report` a scan, `case` and `verify-case` one
image."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from patchscan.common.console import say, sentence
from patchscan.common.shipped import find_run
from patchscan.detector.answer import Engine
from patchscan.scanning import options


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("audit-sample", rich_help_panel="Scan")(audit_sample)
    app.command("audit-report", rich_help_panel="Scan")(audit_report)
    app.command(rich_help_panel="Judge")(case)
    app.command("verify-case", rich_help_panel="Judge")(verify_case)


def audit_sample(
    results: options.Results,
    out: Annotated[Path, typer.Option(help="Folder for the review page and the list of images.")],
    n: Annotated[int, typer.Option(min=20, max=1_000, help="How many images to draw.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw: the same seed draws the same images.")] = 0,
    endpoint_url: options.EndpointUrl = None,
) -> None:
    """Draw images of the newest scan for people to label: a random sample by score, folder and tier, and a review page.

    Writes OUT/review.html, which works offline and on a phone, and OUT/sample.json; the sample is also kept in RESULTS.

    \b
    Examples:
      patchscan audit-sample scan-results --out build/audit
      patchscan audit-sample s3://results/photos --n 400 --seed 7 --out build/audit
    """
    from patchscan.reporting.pages import write_json, write_text
    from patchscan.scanning.audit_sample import build_sample, write_sample
    from patchscan.scanning.history import newest_scan
    from patchscan.scanning.review_page import review_page
    from patchscan.scanning.table import ScanTable
    from patchscan.storage import open_store

    store = open_store(results, endpoint_url=endpoint_url)
    plan = newest_scan(store, endpoint_url)
    with tempfile.TemporaryDirectory(prefix="patchscan-audit-", ignore_cleanup_errors=True) as scratch:
        sample = build_sample(ScanTable(store, plan, Path(scratch)), n, seed)
    page = review_page(sample, plan.source.open())
    write_sample(store, sample)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "sample.json", sample)
    write_text(out / "review.html", page)
    say(f"{len(sample['rows']):,} of {sample['population']:,} scored images of {sample['source']} drawn")
    say(f"review page: {out / 'review.html'}; then: patchscan audit-report {results} LABELS")


def audit_report(
    results: options.Results,
    labels: Annotated[Path, typer.Argument(help="What the review page saved: a .json or .csv file.")],
    labels2: Annotated[Path | None, typer.Argument(help="The same of a second reviewer.")] = None,
    max_fpr: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="Highest share of real images that may be called AI.")
    ] = 0.05,
    endpoint_url: options.EndpointUrl = None,
) -> None:
    """Say what an audit's labels tell: the share of AI images, the detector's error rates in this bucket, thresholds.

    Writes report.html, report.json and the labels to RESULTS/audits/<audit>, and adds the labels to
    RESULTS/audits/labels.csv, by which later scans are judged with `--labels`.

    \b
    Examples:
      patchscan audit-report scan-results labels.json
      patchscan audit-report s3://results/photos first.json second.csv --max-fpr 0.01
    """
    from patchscan.scanning.audit_report import write_audit
    from patchscan.scanning.audit_sample import AUDITS
    from patchscan.storage import open_store

    store = open_store(results, endpoint_url=endpoint_url)
    report = write_audit(store, [labels, *([labels2] if labels2 else [])], max_fpr)
    for one in (*report["findings"], *(f"warning: {one}" for one in report["warnings"])):
        say(sentence(one))
    say(f"report: {store.url.rstrip('/')}/{AUDITS}/{report['audit']}/report.html")


def case(
    image: Annotated[Path, typer.Argument(help="The image file.")],
    run: Annotated[Path, typer.Option(parser=find_run, metavar="RUN", help="Run folder, or starter, ssp-lite.")],
    out: Annotated[Path, typer.Option(help="Folder for case.html, case.json and views.png.")],
    engine: Annotated[
        Engine | None,
        typer.Option(help="torch, onnx or openvino. Default: onnx, where the run folder has a model.onnx."),
    ] = None,
    c2pa_trust: options.C2paTrust = None,
    endpoint_url: options.EndpointUrl = None,
) -> None:
    """Report on one image: hashes, what the file says, verdict, weight of evidence, limits, and how to check it all.

    \b
    Examples:
      patchscan case photo.jpg --run runs/ssp --out build/case
      patchscan case photo.jpg --run runs/ssp --out build/case --c2pa-trust c2pa-authorities.pem
    """
    from patchscan.common.files import sha256_of
    from patchscan.scanning.case import CASE_FILE, PAGE_FILE, build_case, write_case

    trust = options.read_c2pa_trust(c2pa_trust, endpoint_url)
    made = write_case(build_case(image, run, engine, trust), image, run, out)
    say(made["finding"])
    say(made["weight_in_words"])
    say(f"report: {out / PAGE_FILE}; sha256 of {CASE_FILE}: {sha256_of(out / CASE_FILE)}")


def verify_case(
    file: Annotated[Path, typer.Argument(metavar="CASE", help="The case.json.")],
    image: Annotated[Path | None, typer.Option(help="The image, if it is not where it was.")] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            parser=find_run,
            metavar="RUN",
            help="Run folder of the model (or starter, ssp-lite), if it is not where it was.",
        ),
    ] = None,
) -> None:
    """Score the image of a case again and compare every figure, to the bit; exit code 3 where one differs.

    \b
    Examples:
      patchscan verify-case build/case/case.json
      patchscan verify-case case.json --image photo.jpg --run runs/ssp
    """
    from patchscan.scanning.case import CaseDiffersError, build_case, changed_versions, differences, read_case

    written = read_case(file)
    trust = (written["c2pa_trust"] or {}).get("pem")
    now = build_case(image or Path(written["file"]), run or Path(written["run"]), written["engine"], trust)
    others = changed_versions(written, now)
    if others:
        say(f"other versions than the case's: {'; '.join(others)}")
    found = differences(written, now)
    for line in found:
        say(line)
    if found:
        raise CaseDiffersError(f"{len(found)} figures of {file} differ from what is found now")
    say(f"equal: all figures of {file}, for the image with SHA-256 {now['image']['sha256']}")
