"""The command line of scanning: `scan` on one machine, or its three steps apart: plan, work a shard, reduce."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchscan.common.console import INTERNAL_STEPS
from patchscan.common.errors import EXIT_INTERRUPTED, UserError
from patchscan.scanning import options as o

if TYPE_CHECKING:
    from patchscan.scanning.listing import Filters
    from patchscan.scanning.plan import Plan, ScanSource
    from patchscan.scanning.scorers import Scorer
    from patchscan.scanning.worker import Worker
    from patchscan.storage.store import Store

EXIT_FAILED_ROWS = 1
EXIT_ALERT = 3


def add_to(app: typer.Typer) -> None:
    """Register this package's commands."""
    app.command(rich_help_panel="Scan")(scan)
    app.command("report", rich_help_panel="Scan")(report)
    app.command("scan-plan", rich_help_panel=INTERNAL_STEPS)(scan_plan)
    app.command("scan-worker", rich_help_panel=INTERNAL_STEPS)(scan_worker)
    app.command("scan-reduce", rich_help_panel=INTERNAL_STEPS)(scan_reduce)


def scan(
    source: o.SourceUrl,
    out: o.Out = "scan-results",
    server: o.Server = None,
    model: o.Model = None,
    token_file: o.TokenFile = None,
    run: o.Run = None,
    device: o.Device = "cpu",
    select: o.SelectBy = None,
    manifest: o.Manifest = None,
    suffix: o.Suffix = None,
    min_size: o.MinSize = None,
    max_size: o.MaxSize = None,
    since: o.Since = None,
    until: o.Until = None,
    endpoint_url: o.EndpointUrl = None,
    requester_pays: o.RequesterPays = False,
    shard_objects: o.ShardObjects = 5_000,
    shard_mb: o.ShardMB = 4_096,
    threads: o.Threads = 32,
    in_flight: o.InFlight = 32,
    batch: o.Batch = None,
    memory_mb: o.MemoryMB = 256,
    metrics_port: o.MetricsPort = None,
    labels: o.Labels = None,
    events: o.Events = None,
    webhook: o.Webhook = None,
    webhook_secret_file: o.WebhookSecretFile = None,
    fail_on: o.FailOn = None,
) -> None:
    """Score every image of a bucket or folder: one row an object, a report, and the next time only what changed.

    Stopped at any moment, the same command goes on where it was.

    \b
    Examples:
      patchscan scan ./photos
      patchscan scan s3://photos/2026/ --out s3://results/photos --server http://127.0.0.1:8080 --model ssp
      patchscan scan s3://photos --out ./results --run runs/ssp --suffix .jpg --suffix .png --since 2026-01-01
    """
    from patchscan.common.console import ProgressReport
    from patchscan.scanning.observers import Bar
    from patchscan.storage import open_store

    scorer = o.make_scorer(server, model, token_file, run, device, in_flight)
    results = open_store(out, endpoint_url=endpoint_url)
    where = o.make_source(source, endpoint_url, requester_pays, manifest)
    filters = o.make_filters(suffix, min_size, max_size, since, until)
    made = make_plan(where, filters, scorer, results, shard_objects, shard_mb)
    worker = o.make_worker(made, results, scorer, o.make_settings(select, threads, in_flight, batch, memory_mb))
    with ProgressReport("scanning", made.listed - made.unchanged, "objects") as progress:
        worker.observers = [Bar(progress), *o.metrics_observers(metrics_port), *o.event_observers(events, made)]
        _work(worker, range(made.shards))
    finish(results, made, labels, webhook, webhook_secret_file, fail_on)


def scan_plan(
    source: o.SourceUrl,
    out: o.Out,
    server: o.Server = None,
    model: o.Model = None,
    token_file: o.TokenFile = None,
    run: o.Run = None,
    manifest: o.Manifest = None,
    suffix: o.Suffix = None,
    min_size: o.MinSize = None,
    max_size: o.MaxSize = None,
    since: o.Since = None,
    until: o.Until = None,
    endpoint_url: o.EndpointUrl = None,
    requester_pays: o.RequesterPays = False,
    shard_objects: o.ShardObjects = 5_000,
    shard_mb: o.ShardMB = 4_096,
) -> None:
    """Plan a scan in many processes: list, compare with the last scan, cut into shards; prints JSON.

    \b
    Examples:
      patchscan scan-plan s3://photos --out s3://results/photos --server http://serve:8080 --model ssp
    """
    from patchscan.storage import open_store

    scorer = o.make_scorer(server, model, token_file, run, "cpu")
    results = open_store(out, endpoint_url=endpoint_url)
    where = o.make_source(source, endpoint_url, requester_pays, manifest)
    filters = o.make_filters(suffix, min_size, max_size, since, until)
    made = make_plan(where, filters, scorer, results, shard_objects, shard_mb)
    counts = {name: getattr(made, name) for name in ("shards", "listed", "unchanged", "deleted")}
    print(json.dumps({"plan": made.address(results), **counts}))


def scan_worker(
    plan_url: o.PlanUrl,
    index: o.Index,
    within: o.Within = None,
    server: o.Server = None,
    model: o.Model = None,
    token_file: o.TokenFile = None,
    run: o.Run = None,
    device: o.Device = "cpu",
    select: o.SelectBy = None,
    endpoint_url: o.EndpointUrl = None,
    threads: o.Threads = 32,
    in_flight: o.InFlight = 32,
    batch: o.Batch = None,
    memory_mb: o.MemoryMB = 256,
    metrics_port: o.MetricsPort = None,
) -> None:
    """Score one shard of a plan; any number of these may run at once, and each may be run again.

    Progress and findings are JSON lines on standard error.

    \b
    Examples:
      patchscan scan-worker --plan s3://results/photos/scans/SCAN/plan.json --index $JOB_COMPLETION_INDEX \\
        --server http://serve:8080 --model ssp
    """
    from patchscan.scanning.observers import EventStream
    from patchscan.scanning.plan import Plan, locate
    from patchscan.storage import open_store

    shard = o.shard_number(index, within)
    scorer = o.make_scorer(server, model, token_file, run, device, in_flight)
    out, name = locate(plan_url)
    results = open_store(out, endpoint_url=endpoint_url)
    made = Plan.read(results, name)
    worker = o.make_worker(made, results, scorer, o.make_settings(select, threads, in_flight, batch, memory_mb))
    stream = EventStream(sys.stderr, made.scan, len(worker.objects(shard)))
    worker.observers = [stream, *o.metrics_observers(metrics_port)]
    _work(worker, [shard])
    stream.progress()


def scan_reduce(
    plan_url: o.PlanUrl,
    endpoint_url: o.EndpointUrl = None,
    labels: o.Labels = None,
    webhook: o.Webhook = None,
    webhook_secret_file: o.WebhookSecretFile = None,
    fail_on: o.FailOn = None,
) -> None:
    """Finish a scan: count the rows of all shards, write the reports and _SUCCESS.

    \b
    Examples:
      patchscan scan-reduce --plan s3://results/photos/scans/SCAN/plan.json
    """
    from patchscan.scanning.plan import Plan, locate
    from patchscan.storage import open_store

    out, name = locate(plan_url)
    results = open_store(out, endpoint_url=endpoint_url)
    finish(results, Plan.read(results, name), labels, webhook, webhook_secret_file, fail_on)


def report(
    out: Annotated[str, typer.Argument(help="The results folder of a scan: s3://bucket/prefix, or a folder.")],
    endpoint_url: o.EndpointUrl = None,
    labels: o.Labels = None,
) -> None:
    """Write the newest scan's report again and print its short form.

    \b
    Examples:
      patchscan report scan-results
      patchscan report s3://results/photos
    """
    from patchscan.scanning.plan import last_complete
    from patchscan.storage import open_store

    results = open_store(out, endpoint_url=endpoint_url)
    made = last_complete(results)
    if made is None:
        raise UserError(f"{out} holds no complete scan; run `patchscan scan` first")
    finish(results, made, labels)


def make_plan(
    source: "ScanSource", filters: "Filters", scorer: "Scorer", results: "Store", shard_objects: int, shard_mb: int
) -> "Plan":
    from patchscan.scanning.plan import ShardSize, plan

    made = plan(source, filters, scorer.card, results, ShardSize(max_objects=shard_objects, max_bytes=shard_mb * o.MB))
    if not made.conditional_writes:
        message = f"{results.url} ignores conditional writes: of two scans started at once one will end with 75"
        print(f"patchscan: warning: {message}", file=sys.stderr)
    return made


def _work(worker: "Worker", indexes: Iterable[int]) -> None:
    """Work these shards; exits with 75 where the scan is stopped before the end."""
    from patchscan.common.retries import StoppedError

    try:
        for index in indexes:
            worker.work(index)
    except StoppedError:
        print("patchscan: interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def finish(
    results: "Store",
    made: "Plan",
    labels: str | None = None,
    webhook: str | None = None,
    webhook_secret_file: Path | None = None,
    fail_on: Sequence[str] | None = None,
) -> None:
    """Reduce, tell the webhook, print the short form, and exit as the scan's outcome asks."""
    from patchscan.scanning.alerts import message_of, post
    from patchscan.scanning.report import reduce, summary_text

    found = reduce(results, made, labels)
    print(summary_text(found))
    print(f"report: {results.url.rstrip('/')}/report.html")
    if webhook:
        post(webhook, message_of(found), webhook_secret_file)
    if found["totals"]["failed"]:
        raise typer.Exit(EXIT_FAILED_ROWS)
    if {alert["kind"] for alert in found["alerts"]} & set(fail_on or ()):
        raise typer.Exit(EXIT_ALERT)
