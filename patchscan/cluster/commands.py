"""The commands for clusters: submit, show and end Jobs; and, run inside the cluster, coordinate a scan or roll out a
model."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from patchscan.common.console import INTERNAL_STEPS, printable, say, tell
from patchscan.common.errors import UserError
from patchscan.scanning import options

if TYPE_CHECKING:
    from patchscan.cluster.client import Cluster, Job
    from patchscan.cluster.status import JobStatus

CRON_JOB = "patchscan-scan"
WATCH_INTERVAL_S = 5.0

Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; by default the kubeconfig's.")]
Context = Annotated[str | None, typer.Option(help="The kubeconfig's context; by default the current one.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Name of the Job, as `patchscan jobs status` shows it.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a setting; may be repeated.")
]

submit = typer.Typer(help="Start a training or a scan on a cluster.", no_args_is_help=True)
jobs = typer.Typer(help="Show the Jobs on a cluster and their logs, or cancel one.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Register this package's commands."""
    app.add_typer(submit, name="submit", rich_help_panel="Cluster")
    app.add_typer(jobs, name="jobs", rich_help_panel="Cluster")
    app.command("scan-coordinate", rich_help_panel=INTERNAL_STEPS)(scan_coordinate)
    app.command("roll-out", rich_help_panel=INTERNAL_STEPS)(roll_out)


@submit.command("train")
def submit_train(
    manifest: Annotated[str, typer.Argument(help="Manifest of the Job, such as k8s/train-ssp.yaml.")],
    name: Annotated[str | None, typer.Option(help="Name of the new Job; by default the manifest's.")] = None,
    settings: Settings = None,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Start a training Job from its manifest, with changed settings where given.

    \b
    Examples:
      patchscan submit train k8s/train-ssp.yaml
      patchscan submit train k8s/train-ssp.yaml --name ssp-2 --set RUN=s3://models/runs/ssp-2 --set DATA=s3://mine
    """
    from patchscan.cluster.client import Cluster
    from patchscan.cluster.submitting import parse_settings, submit_manifest

    created = submit_manifest(Cluster.connect(namespace, context), manifest, name, parse_settings(settings or []))
    say(f"{created} is submitted; see: patchscan jobs logs --follow {created}")


@submit.command("scan")
def submit_scan(
    source: Annotated[
        str | None, typer.Argument(metavar="[SOURCE]", help="What to scan; by default what the nightly scan does.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Results folder; each source needs its own.")] = None,
    cron_job: Annotated[str, typer.Option(help="The CronJob whose settings are used.")] = CRON_JOB,
    settings: Settings = None,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Start the nightly scan now, or a scan of another source with the same settings.

    \b
    Examples:
      patchscan submit scan
      patchscan submit scan s3://photos/2026/ --out s3://results/photos-2026
    """
    from patchscan.cluster.client import Cluster
    from patchscan.cluster.submitting import parse_settings, submit_from_cron_job

    if (source is None) != (out is None):
        raise UserError("give SOURCE and --out together: each source has its own results")
    chosen = parse_settings(settings or [])
    if {"SOURCE", "RESULTS"} & chosen.keys():
        raise UserError("give SOURCE and --out as such, not with --set: each source has its own results")
    chosen |= {"SOURCE": source, "RESULTS": out} if source and out else {}
    created = submit_from_cron_job(Cluster.connect(namespace, context), cron_job, chosen)
    say(f"{created} is submitted; see: patchscan jobs logs --follow {created}")


@jobs.command("status")
def jobs_status(
    namespace: Namespace = None,
    context: Context = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, one object a Job.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Print again whenever something has changed.")] = False,
) -> None:
    """Show every training, scan and roll-out on the cluster: its state, how much is done, and why it waits or failed.

    \b
    Examples:
      patchscan jobs status -n patchscan
      patchscan jobs status --watch
      patchscan jobs status --json
    """
    from patchscan.cluster.client import Cluster
    from patchscan.cluster.status import JobStatus, job_statuses

    cluster = Cluster.connect(namespace, context)
    shown: list[JobStatus] | None = None
    while True:
        found = job_statuses(cluster)
        if found != shown:
            print(json.dumps([asdict(status) for status in found])) if as_json else _print_table(
                found, cluster.namespace
            )
            sys.stdout.flush()
        if not watch:
            return
        shown = found
        time.sleep(WATCH_INTERVAL_S)


def _print_table(statuses: "Sequence[JobStatus]", namespace: str) -> None:
    """Print a line for each Job, and why it waits or failed below it. No name is cut: people copy them."""
    if not statuses:
        say(f"there are no Jobs of patchscan in the namespace {namespace}; another one: --namespace")
        return
    rows: list[tuple[str, ...]] = [
        ("job", "kind", "state", "done", "running", "pending", "failed", "created", "source")
    ]
    for status in statuses:
        counts = (status.pods_running, status.pods_pending, status.pods_failed)
        cells = (f"{status.done} of {status.total}", *map(str, counts), status.created, printable(status.source))
        rows.append((status.job, status.kind, status.state, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, reason in zip(rows, ("", *(status.reason for status in statuses)), strict=True):
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if reason:
            say(f"    {reason}")


@jobs.command("logs")
def jobs_logs(
    job: JobName,
    index: Annotated[
        int | None, typer.Option(min=0, help="Show the pod of this index; by default the newest pod.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the pod has ended.")] = False,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Print the log of a Job's newest pod, container by container. With --follow, wait for a pod that has not started.

    \b
    Examples:
      patchscan jobs logs train-ssp --follow
      patchscan jobs logs patchscan-20261122t020000z-1a2b3c-1 --index 7
    """
    from patchscan.cluster.client import Cluster
    from patchscan.cluster.submitting import log_lines

    for line in log_lines(Cluster.connect(namespace, context), job, index, follow, tell):
        say(line)


@jobs.command("cancel")
def jobs_cancel(job: JobName, namespace: Namespace = None, context: Context = None) -> None:
    """End a Job and its pods. Finished work is kept: submitted again, a training or scan continues from there.

    \b
    Example:
      patchscan jobs cancel train-ssp
    """
    from patchscan.cluster.api_server import ClusterError
    from patchscan.cluster.client import Cluster

    cluster = Cluster.connect(namespace, context)
    found = cluster.job(job)
    if found is None:
        raise ClusterError(f"there is no Job {job}; `patchscan jobs status` lists all Jobs")
    found.check_ours()
    cluster.delete_job(job)
    say(f"{job} is cancelled")


def scan_coordinate(
    source: options.SourceUrl,
    out: options.Out,
    server: Annotated[str, typer.Option(help="TorchServe's inference address in the cluster.")],
    model: Annotated[str, typer.Option(help="The model's name on the server.")],
    token_file: options.TokenFile = None,
    manifest: options.Manifest = None,
    suffix: options.Suffix = None,
    min_size: options.MinSize = None,
    max_size: options.MaxSize = None,
    since: options.Since = None,
    until: options.Until = None,
    requester_pays: options.RequesterPays = False,
    shard_objects: options.ShardObjects = 5_000,
    shard_mb: options.ShardMB = 4_096,
    max_objects: Annotated[
        int, typer.Option(min=0, help="End before anything is scored if there are more objects to score (0: no limit).")
    ] = 0,
    c2pa_trust: options.C2paTrust = None,
    select: options.SelectBy = None,
    threads: options.Threads = 32,
    in_flight: options.InFlight = 32,
    batch: options.Batch = None,
    memory_mb: options.MemoryMB = 256,
    metrics_port: options.MetricsPort = None,
    parallelism: Annotated[int, typer.Option(min=1, help="Worker pods that run at once.")] = 8,
    min_parallelism: Annotated[
        int,
        typer.Option(
            min=0, help="Start with so many worker pods, and run more while the server has room (0: always all)."
        ),
    ] = 0,
    worker_cpu: Annotated[str, typer.Option(help="CPU requested by a worker pod.")] = "1",
    worker_memory: Annotated[str, typer.Option(help="Memory requested by a worker pod, and its limit.")] = "1Gi",
    queue: Annotated[str | None, typer.Option(help="Kueue's LocalQueue that the workers wait in, if any.")] = None,
    labels: options.Labels = None,
    webhook: options.Webhook = None,
    webhook_secret_file: options.WebhookSecretFile = None,
    fail_on: options.FailOn = None,
    job: Annotated[str, typer.Option(envvar="JOB_NAME", help="The Job that this pod belongs to.")] = "",
) -> None:
    """Run a scan with many pods, from inside the cluster: plan it, create an Indexed Job of workers, write the report.

    Interrupted at any moment, the same command finds the running Job again, or creates one for the missing shards only.

    \b
    Example:
      patchscan scan-coordinate s3://photos --out s3://results/photos --model ssp \\
        --server http://patchscan-serve:8080 --token-file /run/secrets/patchscan/token
    """
    from patchscan.cluster.client import Cluster
    from patchscan.cluster.coordinator import (
        ConfigurationError,
        ShardsFailedError,
        WorkerSettings,
        check_amounts,
        clean_up,
        work_shards,
    )
    from patchscan.cluster.settings import check_settings
    from patchscan.common.retries import waits
    from patchscan.scanning.planning import ScanRequest
    from patchscan.scanning.steps import check_labelled, check_labels_and_webhook, complete_scan, make_plan
    from patchscan.storage import open_store

    check_settings(os.environ)
    check_amounts(worker_cpu, worker_memory)
    check_labels_and_webhook(labels, webhook, None)
    trust = options.read_c2pa_trust(c2pa_trust, None)
    cluster = Cluster.connect(patience_s=300)
    coordinator = _own_job(cluster, job)
    waits.listener = lambda text: cluster.record(coordinator.reference, "Waiting", text, warning=True)
    results, scorer = open_store(out), options.make_scorer(server, model, token_file, None)
    request = ScanRequest(
        source=options.make_source(source, None, requester_pays, manifest),
        card=scorer.card,
        filters=options.make_filters(suffix, min_size, max_size, since, until),
        shard_objects=shard_objects,
        shard_bytes=shard_mb * options.MB,
        max_objects=max_objects,
        c2pa_trust=trust,
    )
    plan = make_plan(request, results)
    check_labelled(labels, results, plan)
    passed_on: dict[str, object] = {
        "--select": select,
        "--threads": threads,
        "--in-flight": in_flight,
        "--memory-mb": memory_mb,
    }
    passed_on |= {"--batch": batch, "--token-file": token_file, "--metrics-port": metrics_port}
    command = ["patchscan", "scan-worker", "--server", server, "--model", model]
    command += [text for option, value in passed_on.items() if value for text in (option, str(value))]
    # Kueue admits a Job with its number of pods, and would end one that asks for more.
    least = 0 if queue else min(min_parallelism, parallelism)
    workers = WorkerSettings(
        command=command, parallelism=parallelism, least=least, cpu=worker_cpu, memory=worker_memory, queue=queue or None
    )
    try:
        work_shards(cluster, plan, results, workers, coordinator, scorer.has_room)
    except ConfigurationError as error:
        if options.make_scorer(server, model, token_file, None).card.digest == plan.digest:
            raise
        raise ShardsFailedError(f"{model} was replaced during the scan; the next try plans it anew") from error
    except KeyboardInterrupt:
        tell("the workers keep running, and the same command finds them again")
        raise
    clean_up(cluster, plan)
    raise typer.Exit(complete_scan(results, plan, labels, webhook, webhook_secret_file, fail_on))


def roll_out(
    model: Annotated[str, typer.Argument(help="Name of the served model: MODEL.mar in the model store.")],
    model_store: Annotated[str, typer.Option(help="Where new archives are published: s3://bucket/prefix.")],
    versions: Annotated[str, typer.Option(help="Where every archive is kept, under its digest.")],
    deployment: Annotated[str, typer.Option(help="The serving Deployment.")] = "patchscan-serve",
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Roll out the published model to the serving pods: does the one step that is due, and ends.

    A new archive in the model store is rolled out. One whose pods do not become ready is rolled back, while the old
    pods serve, and is not tried again. Nothing is rolled out while a scan runs. The CronJob patchscan-roll-out runs
    this every five minutes.

    \b
    Example:
      patchscan roll-out ssp --model-store s3://models/store --versions s3://models/versions
    """
    from patchscan.cluster.client import Cluster
    from patchscan.cluster.rollout import next_step
    from patchscan.cluster.settings import check_settings
    from patchscan.storage import open_store

    check_settings(os.environ)
    cluster = Cluster.connect(namespace, context)
    say(next_step(cluster, deployment, model, open_store(model_store), open_store(versions)))


def _own_job(cluster: "Cluster", name: str) -> "Job":
    from patchscan.cluster.api_server import ClusterError

    found = cluster.job(name) if name else None
    if found is None:
        raise ClusterError("scan-coordinate runs in a pod of a Job; from elsewhere: patchscan submit scan")
    return found
