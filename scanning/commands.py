"""The command line of scanning."""

import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detector.errors import UserError

if TYPE_CHECKING:
    from scanning.client import Scorer
    from scanning.plan import Plan
    from scanning.rows import Row
    from scanning.store import Store

EXIT_FAILED_ROWS = 1
EXIT_INTERRUPTED = 75
STARTER = Path("model_store/ssp-lite")


def add_to(app: typer.Typer) -> None:
    """Register this room's commands."""
    app.command()(scan)
    app.command("report")(report)


def scan(
    source: Annotated[str, typer.Argument(help="s3://bucket/prefix, or a folder.")],
    out: Annotated[str, typer.Option(help="Where results go: s3://bucket/prefix, or a folder.")] = "scan-results",
    server: Annotated[str | None, typer.Option(help="TorchServe's inference address, http://host:8080.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name on the server.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the server's inference key.")] = None,
    run: Annotated[Path | None, typer.Option(help="Score in this process with this run folder, no server.")] = None,
    device: Annotated[str, typer.Option(help="Where --run computes: cpu or cuda.")] = "cpu",
) -> None:
    """Score every image of a bucket or folder: one row an object, a report, and on the next run only what changed.

    Stopped at any moment, the same command goes on where it was.

    \b
    Examples:
      patchscan scan ./photos
      patchscan scan s3://photos/2026/ --out s3://results/photos --server http://127.0.0.1:8080 --model ssp
      patchscan scan s3://photos --out ./results --run runs/ssp
    """
    from scanning.plan import Filters, Source, plan
    from scanning.report import reduce
    from scanning.store import open_store

    stop = stop_on_signals()
    scorer = open_scorer(server, model, token_file, run, device)
    results = open_store(out)
    made = plan(Source(url=source), Filters(), scorer.card, results)
    if work(made, results, scorer, stop):
        raise typer.Exit(EXIT_INTERRUPTED)
    found = reduce(results, made)
    print(summary_text(found, f"{out}/report.html"))
    if found["totals"]["failed"]:
        raise typer.Exit(EXIT_FAILED_ROWS)


def report(
    out: Annotated[str, typer.Argument(help="The results folder of a scan: s3://bucket/prefix, or a folder.")],
) -> None:
    """Write a scan's report again and print its short form.

    \b
    Examples:
      patchscan report scan-results
      patchscan report s3://results/photos
    """
    from scanning.plan import last_complete
    from scanning.report import reduce
    from scanning.store import open_store

    results = open_store(out)
    made = last_complete(results)
    if made is None:
        raise UserError(f"{out} holds no complete scan; run `patchscan scan` first")
    print(summary_text(reduce(results, made), f"{out}/report.html"))


def work(made: "Plan", results: "Store", scorer: "Scorer", stop: threading.Event) -> bool:
    """Work all shards of a plan here; whether it was interrupted before the end."""
    from console import ProgressReport
    from scanning.retries import Interrupted
    from scanning.worker import Worker

    with ProgressReport("scanning", made.listed - made.unchanged, "objects") as progress:
        worker = Worker(made, results, scorer, stop=stop, observers=[Bar(progress)])
        try:
            for index in range(made.shards):
                worker.work(index)
        except Interrupted:
            print("patchscan: interrupted; the same command goes on from here", file=sys.stderr)
            return True
    return False


class Bar:
    """Shows finished rows on a progress report."""

    def __init__(self, progress: Any):
        self.progress = progress
        self.bytes = self.errors = 0

    def row(self, row: "Row", fetched_bytes: int) -> None:
        """One object more."""
        self.bytes += fetched_bytes
        self.errors += row["status"] != "scored"
        self.progress.advance(1, f"{self.bytes / 1e6:,.0f} MB, {self.errors:,} without a score")


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and Ctrl-C set; a second Ctrl-C ends the process at once."""
    stop = threading.Event()

    def ask(number: int, _: Any) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
        stop.set()

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    return stop


def open_scorer(
    server: str | None, model: str | None, token_file: Path | None, run: Path | None, device: str
) -> "Scorer":
    """The scorer that the options name: a server, a run folder, or else the starter run folder."""
    from scanning.client import InProcess, ServerSettings, TorchServe

    if server and run:
        raise UserError("give --server or --run, not both")
    if server:
        if not model:
            raise UserError("--server also needs --model, the model's name there")
        return TorchServe(ServerSettings(url=server, model=model, token_file=token_file))
    return InProcess(run or Path(__file__).parent.parent / STARTER, device)


def summary_text(found: dict[str, Any], where: str) -> str:
    """The short form of a report, for a terminal."""
    totals, verdicts = found["totals"], found["verdicts"]
    counts = ", ".join(f"{totals[name]:,} {name}" for name in ("scored", "rejected", "failed", "unchanged"))
    lines = [
        f"{found['source']}: {totals['listed']:,} objects listed = {counts}; {totals['deleted']:,} are gone",
        f"verdicts: {verdicts['ai']:,} AI, {verdicts['uncertain']:,} uncertain, {verdicts['real']:,} real",
        *(f"{row['status']} {row['code']}: {row['n']:,}, e.g. {row['examples'][0]['key']}" for row in found["errors"]),
        *(f"warning: {warning}" for warning in found["model"]["warnings"]),
        f"report: {where}",
    ]
    return "\n".join(lines)
