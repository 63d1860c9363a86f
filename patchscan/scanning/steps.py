"""The steps of a scan that its commands share: plan, work until done or stopped, finish; or estimate."""

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from patchscan.common.console import run_interruptibly, say, stop_on_signals, tell
from patchscan.common.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from patchscan.scanning.plan import Plan, ScanSource
    from patchscan.scanning.planning import ScanRequest
    from patchscan.scanning.scorers import Scorer
    from patchscan.scanning.worker import Worker, WorkSettings
    from patchscan.storage.store import Store

EXIT_FAILED_ROWS = 1
EXIT_ALERT = 3


def make_plan(request: "ScanRequest", results: "Store") -> "Plan":
    """Plan a scan (`plan_scan`), and warn where the results store ignores conditional writes."""
    from patchscan.scanning.history import withdraw_announcement
    from patchscan.scanning.planning import plan_scan

    try:
        plan = run_interruptibly(lambda: plan_scan(request, results))
    except KeyboardInterrupt:
        withdraw_announcement(results)
        raise
    _warn_of_unconditional_writes(plan, results)
    return plan


def _warn_of_unconditional_writes(plan: "Plan", results: "Store") -> None:
    if not plan.conditional_writes:
        message = (
            f"{results.url} ignores conditional writes: if two scans are started at once, one of them ends with 75"
        )
        tell(f"warning: {message}")


def scan_named(
    events_from: str, max_messages: int, request: "ScanRequest", results: "Store", work: "Callable[[Plan], int]"
) -> int:
    """Scan the objects that events name, and only then delete their messages; returns the exit code."""
    from patchscan.scanning.bucket_events import STANDARD_INPUT, EventReader
    from patchscan.scanning.planning import plan_named
    from patchscan.storage.queue import Queue

    source = request.source
    reader = EventReader(source)
    queue = None if events_from == STANDARD_INPUT else Queue(events_from)
    if queue:
        run_interruptibly(lambda: reader.read_queue(queue, max_messages))
    else:
        reader.read_lines(sys.stdin.buffer)
    if reader.outside:
        say(f"{reader.outside:,} of the names do not begin as the keys of {source.url} do")
    codes = {EXIT_FAILED_ROWS} if reader.unreadable else {0}
    is_ours = False
    while not is_ours:
        plan, is_ours = run_interruptibly(lambda: plan_named(request, results, reader.keys))
        if plan and plan.shards:
            _warn_of_unconditional_writes(plan, results)
            codes.add(work(plan))
        else:
            say(_nothing_to_score(source, plan))
    if queue and (left := queue.delete(reader.messages)):
        tell(f"{left:,} messages could not be deleted: they come again")
    return EXIT_FAILED_ROWS if EXIT_FAILED_ROWS in codes else max(codes)


def _nothing_to_score(source: "ScanSource", plan: "Plan | None") -> str:
    counts = plan.named if plan and plan.named else dict.fromkeys(("objects", "unchanged", "missing"), 0)
    return (
        f"{source.url}: nothing to score, the table stays as it is; {counts['objects']:,} objects were named, "
        f"{counts['unchanged']:,} of them unchanged; {counts['missing']:,} names are of no object"
    )


def check_labels_and_webhook(labels: str | None, webhook: str | None, endpoint_url: str | None) -> None:
    """Find out before the scan whether its labels can be read, and whether its webhook has an address."""
    if labels is not None:
        from patchscan.scanning.labels import check  # slow

        check(labels, endpoint_url)
    if webhook is not None:
        from patchscan.scanning.alerts import check_webhook

        check_webhook(webhook)


def check_labelled(labels: str | None, results: "Store", plan: "Plan") -> None:
    """Find out before the scan whether its labels are of any object that it has. Of an empty source another is told."""
    if labels is not None and plan.listed:
        from patchscan.scanning.labels import check_listed

        check_listed(results, plan, labels)


def estimate_scan(request: "ScanRequest", scorer: "Scorer", results: "Store", settings: "WorkSettings") -> None:
    """Score a few of the objects that a scan would score, and print what all of them would take."""
    from patchscan.common.console import ProgressReport
    from patchscan.scanning.estimate import SAMPLE, Meter, estimate_text
    from patchscan.scanning.observers import BarObserver
    from patchscan.scanning.planning import plan_estimate
    from patchscan.scanning.scorers import TorchServeScorer
    from patchscan.scanning.worker import Worker
    from patchscan.storage import open_store

    with tempfile.TemporaryDirectory(prefix="patchscan-estimate-", ignore_cleanup_errors=True) as folder:
        scratch = open_store(folder)
        plan = run_interruptibly(lambda: plan_estimate(request, results, scratch, SAMPLE))
        worker = Worker(plan, scratch, scorer, settings)
        tried = min(SAMPLE, plan.to_score)
        # In this process the model's seconds are the process's own.
        served = scorer if isinstance(scorer, TorchServeScorer) else None
        meter = Meter(tried, worker.source.requests, lambda: served.model_s["cpu"] if served else 0.0)
        with ProgressReport("trying", tried, "objects") as progress:
            worker.observers = [BarObserver(progress), meter]
            work_shards(worker, range(plan.shards))
        for line in estimate_text(plan, meter).split("\n"):
            say(line)


@contextmanager
def stop_at(worker: "Worker", deadline: float | None, max_requests: int) -> Iterator[None]:
    """Within the block, stop the worker as Ctrl-C does at `deadline` (of time.monotonic), or after `max_requests`
    requests to the source (0: no limit). Objects in work are finished, and all rows saved."""
    from patchscan.scanning.observers import RequestLimit

    def stop(option: str) -> None:
        if not worker.stop.is_set():
            tell(f"{option} is reached")
            worker.stop.set()

    if max_requests:
        limit = RequestLimit(max_requests, worker.source.requests, lambda: stop("--max-requests"))
        worker.observers = [*worker.observers, limit]
    with ExitStack() as stack:
        if deadline is not None:
            timer = threading.Timer(max(0, deadline - time.monotonic()), stop, ["--max-seconds"])
            timer.daemon = True
            timer.start()
            stack.callback(timer.cancel)
        yield


def work_shards(worker: "Worker", indexes: Iterable[int]) -> None:
    """Work on these shards; exits with 75 where the scan is interrupted, its finished rows saved."""
    from patchscan.common.retries import StoppedError

    try:
        with stop_on_signals(worker.stop):
            for index in indexes:
                worker.work(index)
        if worker.stop.is_set():
            raise StoppedError  # the signal came after the last object
    except StoppedError:
        if worker.objects_left is not None and worker.objects_left < 0:
            tell("--max-objects is reached")
        tell("interrupted; run the same command again to continue")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def complete_scan(
    results: "Store",
    plan: "Plan",
    labels: str | None = None,
    webhook: str | None = None,
    webhook_secret_file: Path | None = None,
    fail_on: Sequence[str] | None = None,
    earlier: "tuple[Store, Plan] | None" = None,
) -> int:
    """Write the reports, print the summary and send the webhook; returns the exit code of the scan's outcome."""
    from patchscan.scanning.alerts import post, webhook_message
    from patchscan.scanning.report import reduce, summary_text

    report = run_interruptibly(lambda: reduce(results, plan, labels, earlier))
    for line in summary_text(report).split("\n"):
        say(line)
    say(f"report: {results.url.rstrip('/')}/report.html")
    if report["evaluation"] and report["evaluation"]["report"]:
        say(f"evaluation: {results.url.rstrip('/')}/{report['evaluation']['report']}")
    if webhook:
        post(webhook, webhook_message(report), webhook_secret_file)
    if report["totals"]["failed"]:
        return EXIT_FAILED_ROWS
    return EXIT_ALERT if {alert["kind"] for alert in report["alerts"]} & set(fail_on or ()) else 0
