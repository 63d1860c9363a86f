"""The commands for scans: `scan` and `report`, and the three steps of a scan for many processes: plan, work, reduce."""

import json
import sys
import time
from typing import TYPE_CHECKING

import typer

from patchscan.common.console import INTERNAL_STEPS
from patchscan.scanning import options
from patchscan.scanning.steps import (
    check_labelled,
    check_labels_and_webhook,
    complete_scan,
    estimate_scan,
    make_plan,
    scan_named,
    stop_at,
    work_shards,
)

if TYPE_CHECKING:
    from patchscan.scanning.plan import Plan


def add_to(app: typer.Typer) -> None:
    """Register this package's commands."""
    app.command(rich_help_panel="Scan")(scan)
    app.command("report", rich_help_panel="Scan")(report)
    app.command("scan-plan", rich_help_panel=INTERNAL_STEPS)(scan_plan)
    app.command("scan-worker", rich_help_panel=INTERNAL_STEPS)(scan_worker)
    app.command("scan-reduce", rich_help_panel=INTERNAL_STEPS)(scan_reduce)


def scan(
    source: options.SourceUrl,
    out: options.Out = "scan-results",
    server: options.Server = None,
    model: options.Model = None,
    token_file: options.TokenFile = None,
    run: options.Run = None,
    first: options.First = None,
    then: options.Then = None,
    when: options.When = None,
    device: options.Device = "cpu",
    engine: options.RunEngine = None,
    select: options.SelectBy = None,
    manifest: options.Manifest = None,
    events_from: options.EventsFrom = None,
    max_messages: options.MaxMessages = 10_000,
    suffix: options.Suffix = None,
    min_size: options.MinSize = None,
    max_size: options.MaxSize = None,
    since: options.Since = None,
    until: options.Until = None,
    endpoint_url: options.EndpointUrl = None,
    requester_pays: options.RequesterPays = False,
    shard_objects: options.ShardObjects = 5_000,
    shard_mb: options.ShardMB = 4_096,
    max_objects: options.MaxObjects = 0,
    sample: options.Sample = 0,
    estimate: options.EstimateOnly = False,
    max_seconds: options.MaxSeconds = 0,
    max_requests: options.MaxRequests = 0,
    retry_archived: options.RetryArchived = False,
    c2pa_trust: options.C2paTrust = None,
    threads: options.Threads = 32,
    in_flight: options.InFlight = 32,
    batch: options.Batch = None,
    memory_mb: options.MemoryMB = 256,
    metrics_port: options.MetricsPort = None,
    labels: options.Labels = None,
    compare_with: options.CompareWith = None,
    events: options.Events = None,
    webhook: options.Webhook = None,
    webhook_secret_file: options.WebhookSecretFile = None,
    fail_on: options.FailOn = None,
) -> None:
    """Score every image of a bucket or folder: one row for each object, and a report.

    Interrupted at any moment, the same command continues where it stopped. The next scan scores only what is new or
    changed.

    \b
    Examples:
      patchscan scan ./photos
      patchscan scan s3://photos/2026/ --out s3://results/photos-2026 --server http://127.0.0.1:8080 --model ssp \\
        --token-file build/serve/key_file.json
      patchscan scan s3://photos --out ./results --run runs/ssp --suffix .jpg --suffix .png --since 2026-01-01
      patchscan scan ./photos --server v2+http://127.0.0.1:8000 --model theirs --run runs/theirs
      patchscan scan ./photos --first ssp-lite --then runs/strong --when 0.1,0.9
      patchscan scan s3://photos --events-from https://sqs.eu-west-1.amazonaws.com/123456789012/photos
    """
    from patchscan.common.console import ProgressReport
    from patchscan.detector.decoders import decoder_pool
    from patchscan.scanning.observers import BarObserver, EventObserver
    from patchscan.scanning.planning import ScanRequest
    from patchscan.scanning.worker import Worker, WorkSettings
    from patchscan.storage import open_store

    started = time.monotonic()
    check_labels_and_webhook(labels, webhook, endpoint_url)
    trust = options.read_c2pa_trust(c2pa_trust, endpoint_url)
    options.check_events_from(events_from, manifest, sample, estimate)
    options.check_max_requests(source, max_requests)
    scorer = options.make_cascade(first, then, when, device, engine, (run, server, model, select))
    scorer = scorer or options.make_scorer(server, model, token_file, run, device, in_flight, engine)
    if (select or scorer.select) == "worker":
        decoder_pool().start_first()  # it starts while the source is listed
    results = open_store(out, endpoint_url=endpoint_url)
    earlier = options.read_earlier(compare_with, results, endpoint_url)
    request = ScanRequest(
        source=options.make_source(source, endpoint_url, requester_pays, manifest),
        card=scorer.card,
        filters=options.make_filters(suffix, min_size, max_size, since, until),
        shard_objects=shard_objects,
        shard_bytes=shard_mb * options.MB,
        retry_archived=retry_archived,
        sample=sample,
        c2pa_trust=trust,
    )
    settings = WorkSettings(
        select=select, threads=threads, in_flight=in_flight, batch=batch, memory=memory_mb * options.MB
    )
    if estimate:
        estimate_scan(request, scorer, results, settings)
        return
    metrics, stream = options.metrics_observers(metrics_port), options.open_events(events)

    left = max_objects or None

    def work(plan: "Plan") -> int:
        """Work on all shards and write the reports; returns the exit code."""
        nonlocal left
        check_labelled(labels, results, plan)
        worker = Worker(plan, results, scorer, settings)
        worker.objects_left = left
        with ProgressReport("scanning", plan.to_score, "objects") as progress:
            told = [EventObserver(stream, plan.scan, plan.to_score)] if stream else []
            worker.observers = [BarObserver(progress), *metrics, *told]
            with stop_at(worker, started + max_seconds if max_seconds else None, max_requests):
                work_shards(worker, range(plan.shards))
        left = worker.objects_left
        return complete_scan(results, plan, labels, webhook, webhook_secret_file, fail_on, earlier)

    if events_from is None:
        raise typer.Exit(work(make_plan(request, results)))
    raise typer.Exit(scan_named(events_from, max_messages, request, results, work))


def scan_plan(
    source: options.SourceUrl,
    out: options.Out,
    server: options.Server = None,
    model: options.Model = None,
    token_file: options.TokenFile = None,
    run: options.Run = None,
    manifest: options.Manifest = None,
    suffix: options.Suffix = None,
    min_size: options.MinSize = None,
    max_size: options.MaxSize = None,
    since: options.Since = None,
    until: options.Until = None,
    endpoint_url: options.EndpointUrl = None,
    requester_pays: options.RequesterPays = False,
    shard_objects: options.ShardObjects = 5_000,
    shard_mb: options.ShardMB = 4_096,
    sample: options.Sample = 0,
    retry_archived: options.RetryArchived = False,
    c2pa_trust: options.C2paTrust = None,
) -> None:
    """Plan a scan for many processes: list, compare with the last scan, cut into shards; prints JSON.

    \b
    Example:
      patchscan scan-plan s3://photos --out s3://results/photos --model ssp --server http://serve:8080 --token-file FILE
    """
    from patchscan.scanning.planning import ScanRequest
    from patchscan.storage import open_store

    trust = options.read_c2pa_trust(c2pa_trust, endpoint_url)
    scorer = options.make_scorer(server, model, token_file, run)
    results = open_store(out, endpoint_url=endpoint_url)
    request = ScanRequest(
        source=options.make_source(source, endpoint_url, requester_pays, manifest),
        card=scorer.card,
        filters=options.make_filters(suffix, min_size, max_size, since, until),
        shard_objects=shard_objects,
        shard_bytes=shard_mb * options.MB,
        retry_archived=retry_archived,
        sample=sample,
        c2pa_trust=trust,
    )
    plan = make_plan(request, results)
    counts = {name: getattr(plan, name) for name in ("shards", "listed", "unchanged", "deleted")}
    print(json.dumps({"plan": plan.address(results), **counts}))


def scan_worker(
    plan_url: options.PlanUrl,
    index: options.Index,
    within: options.Within = None,
    server: options.Server = None,
    model: options.Model = None,
    token_file: options.TokenFile = None,
    run: options.Run = None,
    device: options.Device = "cpu",
    engine: options.RunEngine = None,
    select: options.SelectBy = None,
    endpoint_url: options.EndpointUrl = None,
    threads: options.Threads = 32,
    in_flight: options.InFlight = 32,
    batch: options.Batch = None,
    memory_mb: options.MemoryMB = 256,
    metrics_port: options.MetricsPort = None,
) -> None:
    """Score one shard of a plan; many workers may run at once, and a worker may be run again.

    Writes progress and findings to standard error as JSON lines.

    \b
    Example:
      patchscan scan-worker --plan s3://results/photos/scans/SCAN/plan.json --index $JOB_COMPLETION_INDEX \\
        --server http://serve:8080 --model ssp --token-file FILE
    """
    from patchscan.scanning.observers import EventObserver
    from patchscan.scanning.plan import Plan, parse_plan_url
    from patchscan.scanning.worker import Worker, WorkSettings
    from patchscan.storage import open_store

    shard = options.shard_number(index, within)
    scorer = options.make_scorer(server, model, token_file, run, device, in_flight, engine)
    out, name = parse_plan_url(plan_url)
    results = open_store(out, endpoint_url=endpoint_url)
    plan = Plan.read(results, name).at(endpoint_url)
    settings = WorkSettings(
        select=select, threads=threads, in_flight=in_flight, batch=batch, memory=memory_mb * options.MB
    )
    worker = Worker(plan, results, scorer, settings)
    stream = EventObserver(sys.stderr, plan.scan, len(worker.objects(shard)))
    worker.observers = [stream, *options.metrics_observers(metrics_port)]
    work_shards(worker, [shard])
    stream.progress()


def scan_reduce(
    plan_url: options.PlanUrl,
    endpoint_url: options.EndpointUrl = None,
    labels: options.Labels = None,
    compare_with: options.CompareWith = None,
    webhook: options.Webhook = None,
    webhook_secret_file: options.WebhookSecretFile = None,
    fail_on: options.FailOn = None,
) -> None:
    """Finish a scan: count the rows of all shards, write the reports and _SUCCESS.

    \b
    Example:
      patchscan scan-reduce --plan s3://results/photos/scans/SCAN/plan.json
    """
    from patchscan.scanning.plan import Plan, parse_plan_url
    from patchscan.storage import open_store

    check_labels_and_webhook(labels, webhook, endpoint_url)
    out, name = parse_plan_url(plan_url)
    results = open_store(out, endpoint_url=endpoint_url)
    earlier = options.read_earlier(compare_with, results, endpoint_url)
    plan = Plan.read(results, name).at(endpoint_url)
    raise typer.Exit(complete_scan(results, plan, labels, webhook, webhook_secret_file, fail_on, earlier))


def report(
    out: options.Results = "scan-results",
    endpoint_url: options.EndpointUrl = None,
    labels: options.Labels = None,
    compare_with: options.CompareWith = None,
) -> None:
    """Write the newest scan's report again and print its summary.

    \b
    Examples:
      patchscan report
      patchscan report s3://results/photos --compare-with s3://results/photos-in-january
    """
    from patchscan.scanning.history import newest_scan
    from patchscan.storage import open_store

    results = open_store(out, endpoint_url=endpoint_url)
    plan = newest_scan(results, endpoint_url)
    earlier = options.read_earlier(compare_with, results, endpoint_url)
    raise typer.Exit(complete_scan(results, plan, labels, earlier=earlier))
