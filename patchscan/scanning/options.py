"""The options that the scan commands share, and the objects made from them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from patchscan.common.errors import UserError
from patchscan.common.shipped import find_run, shipped
from patchscan.detector.answer import Engine

if TYPE_CHECKING:
    from patchscan.scanning.listing import Filters
    from patchscan.scanning.observers import Observer
    from patchscan.scanning.plan import Plan, ScanSource
    from patchscan.scanning.scorers import Scorer
    from patchscan.storage.store import Store

STARTER = shipped("model_store") / "starter"
MB = 2**20


class AlertKind(StrEnum):
    """The alerts (alerts.py) that `--fail-on` can name."""

    AI = "ai"
    DRIFT = "drift"
    EMPTY = "empty"


SourceUrl = Annotated[str, typer.Argument(metavar="SOURCE", help="s3://bucket/prefix, or a folder.")]
Results = Annotated[str, typer.Argument(help="Results folder of a scan: s3://bucket/prefix, or a folder.")]
Out = Annotated[str, typer.Option(help="Results folder: s3://bucket/prefix, or a folder.")]
PlanUrl = Annotated[
    str, typer.Option("--plan", help="Path or URL of the plan.json that `patchscan scan-plan` printed.")
]
Index = Annotated[int, typer.Option(min=0, help="Number of the shard, from 0.")]
Within = Annotated[str | None, typer.Option(help="Shards among which --index counts, e.g. 3,7,12-20; by default all.")]
Server = Annotated[
    str | None,
    typer.Option(
        help="TorchServe's inference address, e.g. http://127.0.0.1:8080; or v2+http://HOST:PORT, a server of the Open"
        " Inference Protocol that serves the model.onnx of --run."
    ),
]
Model = Annotated[str | None, typer.Option(help="The model's name on the server.")]
TokenFile = Annotated[Path | None, typer.Option(help="File with the inference token, or TorchServe's key_file.json.")]
Run = Annotated[
    Path | None,
    typer.Option(
        parser=find_run,
        metavar="RUN",
        help="Score in this process, with this run folder (or starter, ssp-lite), instead of a server; with --server"
        " v2+..., what that serves.",
    ),
]
First = Annotated[
    Path | None,
    typer.Option(
        parser=find_run,
        metavar="RUN",
        help="A cascade's first run folder (or starter, ssp-lite), which looks at every image in this process; with"
        " --then, --when.",
    ),
]
Then = Annotated[
    Path | None,
    typer.Option(
        parser=find_run,
        metavar="RUN",
        help="A cascade's second run folder, which looks at what the first one leaves open.",
    ),
]
When = Annotated[
    str | None, typer.Option(metavar="LOW,HIGH", help="The first one's p_ai between which the second decides.")
]
Device = Annotated[str, typer.Option(help="Where --run computes: cpu or cuda.")]
RunEngine = Annotated[
    Engine | None,
    typer.Option(
        "--engine",
        help="What runs --run's model: torch, onnx or openvino. Default: onnx, where the run folder has a model.onnx.",
    ),
]
EndpointUrl = Annotated[str | None, typer.Option(help="Address of an S3 store that is not AWS.")]
RequesterPays = Annotated[bool, typer.Option("--requester-pays", help="Agree to pay for the source's requests.")]
Manifest = Annotated[
    str | None,
    typer.Option(help="Scan the objects this file lists: .csv, .jsonl, .parquet, or an S3 Inventory's manifest.json."),
]
EventsFrom = Annotated[
    str | None,
    typer.Option(
        metavar="QUEUE",
        help="Scan only the objects that a bucket's events name: URL of an SQS queue, or - for standard input, a key or"
        " an event on each line. The rows of all others are kept.",
    ),
]
MaxMessages = Annotated[int, typer.Option(min=1, help="With --events-from: messages received in one run at most.")]
Suffix = Annotated[
    list[str] | None, typer.Option(help="Only keys with this suffix, in upper or lower case; may be repeated.")
]
MinSize = Annotated[int | None, typer.Option(help="Only objects of at least this many bytes.")]
MaxSize = Annotated[int | None, typer.Option(help="Only objects of at most this many bytes.")]
Since = Annotated[datetime | None, typer.Option(help="Only objects changed at or after this time (UTC).")]
Until = Annotated[datetime | None, typer.Option(help="Only objects changed before this time (UTC).")]
ShardObjects = Annotated[int, typer.Option(min=1, help="Maximum number of objects in a shard.")]
ShardMB = Annotated[int, typer.Option(min=1, help="Maximum megabytes in a shard.")]
MaxObjects = Annotated[
    int, typer.Option(min=0, help="Stop after this many objects, with exit code 75 (0: no limit). Run again to go on.")
]
Sample = Annotated[
    int,
    typer.Option(
        min=0,
        help="Score a random sample of this many objects (0: all). A larger one later, or all, scores only the rest.",
    ),
]
EstimateOnly = Annotated[
    bool,
    typer.Option(
        "--estimate",
        help="Try 200 objects, tell what the scan would take (images, bytes, requests, core-hours, time); keep none.",
    ),
]
RetryArchived = Annotated[
    bool,
    typer.Option(
        "--retry-archived",
        help="Try objects again that an earlier scan found in cold storage: after a restore that listings do not show.",
    ),
]
C2paTrust = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Certificates (PEM; a file or s3:// URL) of the authorities whose signers of C2PA manifests are trusted."
        " Default: none are.",
    ),
]
SelectBy = Annotated[
    Literal["worker", "server"] | None,
    typer.Option(
        help="Where images are decoded and the patch is cut: in this worker, which then sends 3 KB a patch, or in the"
        " server. Default: worker, where the server accepts patches and those of an image take 128 KB at most."
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="Objects processed at once.")]
InFlight = Annotated[int, typer.Option(min=1, help="Maximum number of requests in flight.")]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Maximum images in a request of patches. Default: 1, or 8 where the model has a GPU."),
]
MemoryMB = Annotated[
    int, typer.Option(min=1, help="Maximum megabytes of encoded images in memory; pixels take up to twice that.")
]
MaxSeconds = Annotated[
    int, typer.Option(min=0, help="Stop after this many seconds, with exit code 75 (0: no limit). Run again to go on.")
]
MaxRequests = Annotated[
    int,
    typer.Option(
        min=0, help="Stop after reading the source this often, with exit code 75 (0: no limit). Run again to go on."
    ),
]
MetricsPort = Annotated[int | None, typer.Option(min=0, max=65_535, help="Serve Prometheus metrics on this port.")]

Labels = Annotated[
    str | None,
    typer.Option(help="Evaluate against labels: `folders` (named ai and nature), or a CSV with columns key and label."),
]
CompareWith = Annotated[
    str | None,
    typer.Option(
        metavar="SCAN",
        help="Say what changed since this scan: its name, or another results folder, whose newest scan is taken."
        " Default: the previous scan.",
    ),
]
Events = Annotated[Path | None, typer.Option(help="Append findings and progress to this file as JSON lines.")]
Webhook = Annotated[str | None, typer.Option(help="POST a JSON summary here when the scan is finished.")]
WebhookSecretFile = Annotated[
    Path | None,
    # Looked at before a scan that takes hours ends with it.
    typer.Option(exists=True, dir_okay=False, help="File with the key that signs the webhook (HMAC-SHA256)."),
]
FailOn = Annotated[
    list[AlertKind] | None,
    typer.Option(
        help="Exit with 3 where images scored in this scan look AI-generated, scores drifted, or there was nothing to"
        " scan; may be repeated."
    ),
]


def make_source(source: str, endpoint_url: str | None, requester_pays: bool, manifest: str | None) -> "ScanSource":
    """The source that the options name. Folders get their absolute paths, since the plan is read in other processes."""
    from patchscan.scanning.plan import ScanSource, absolute_url

    listed = absolute_url(manifest) if manifest else None
    return ScanSource(
        url=absolute_url(source), endpoint_url=endpoint_url, requester_pays=requester_pays, manifest=listed
    )


def check_events_from(events_from: str | None, manifest: str | None, sample: int, estimate: bool) -> None:
    """Raise UserError where `--events-from` names no queue, or cannot be used."""
    if events_from is None:
        return
    if manifest:
        raise UserError("give --events-from or --manifest, not both")
    if events_from != "-" and not events_from.startswith(("https://", "http://")):
        raise UserError("--events-from takes the URL of an SQS queue, or - for standard input")
    if sample or estimate:
        raise UserError("--sample and --estimate are not for --events-from: events name their objects")


def check_max_requests(source: str, max_requests: int) -> None:
    """Raise UserError where `--max-requests` could count none."""
    from patchscan.storage.store import SCHEME

    if max_requests and not source.startswith(SCHEME):
        raise UserError("--max-requests counts requests to a bucket: for a folder give --max-objects or --max-seconds")


def make_filters(
    suffix: list[str] | None, min_size: int | None, max_size: int | None, since: datetime | None, until: datetime | None
) -> "Filters":
    """The filters that the options name."""
    from patchscan.scanning.listing import Filters

    first, end = (time.replace(tzinfo=UTC).isoformat() if time else None for time in (since, until))
    return Filters(suffixes=tuple(suffix or ()), min_size=min_size, max_size=max_size, since=first, until=end)


def read_c2pa_trust(url: str | None, endpoint_url: str | None) -> str | None:
    """The list of authorities that `--c2pa-trust` names. Raises TrustError and StoreError."""
    from patchscan.scanning.trust import read_trust

    return read_trust(url, endpoint_url) if url else None


def read_earlier(compare_with: str | None, results: "Store", endpoint_url: str | None) -> "tuple[Store, Plan] | None":
    """The scan that `--compare-with` names, and where its results are. Raises PlanError and StoreError."""
    from patchscan.scanning.history import earlier_scan

    return earlier_scan(results, compare_with, endpoint_url) if compare_with else None


def make_scorer(
    server: str | None,
    model: str | None,
    token_file: Path | None,
    run: Path | None,
    device: str = "cpu",
    in_flight: int = 32,
    engine: Engine | None = None,
) -> "Scorer":
    """The scorer that the options name: a server, a run folder, or else the starter run folder."""
    from patchscan.scanning.inference_scorer import SCHEME, InferenceScorer
    from patchscan.scanning.scorers import InProcessScorer, ServerSettings, TorchServeScorer

    if server and run and not server.startswith(SCHEME):
        raise UserError("give --server or --run, not both")
    if server and engine:
        raise UserError("--engine is for --run: a server's archive names its own")
    if server:
        if not model:
            raise UserError("--server also needs --model, the model's name there")
        url = server.removeprefix(SCHEME)
        settings = ServerSettings(url=url, model=model, token_file=token_file, connections=in_flight)
        if url == server:
            return TorchServeScorer(settings)
        if not run:
            raise UserError(f"--server {SCHEME}... also needs --run, the run folder whose model.onnx it serves")
        return InferenceScorer(settings, run)
    if not run and not STARTER.exists():
        raise UserError("the starter is not here (the images hold no detector): give --run a run folder, or --server")
    return InProcessScorer(run or STARTER, device, engine)


def make_cascade(
    first: Path | None,
    then: Path | None,
    when: str | None,
    device: str,
    engine: Engine | None,
    others: Sequence[object],
) -> "Scorer | None":
    """The cascade that the options name; None where they name none. `others`: options that it leaves no room for."""
    from patchscan.detector.cascade import parse_band
    from patchscan.scanning.cascade_scorer import CascadeScorer
    from patchscan.scanning.scorers import InProcessScorer

    if not (first or then or when):
        return None
    if not (first and then and when):
        raise UserError("a cascade needs all of --first, --then and --when")
    if any(others):
        raise UserError("a cascade takes no --run, --server, --model or --select")
    band = parse_band(when)
    return CascadeScorer(InProcessScorer(first, device, engine), InProcessScorer(then, device, engine), *band)


def shard_number(index: int, within: str | None) -> int:
    """The shard that `--index` and `--within` name."""
    from patchscan.scanning.shards import parse_ranges

    if within is None:
        return index
    try:
        return parse_ranges(within)[index]
    except (ValueError, IndexError) as error:
        raise UserError(f"--within {within} names no shard number {index}; write e.g. 3,7,12-20") from error


def metrics_observers(port: int | None) -> list["Observer"]:
    """The metrics observer, where a port is given."""
    from patchscan.scanning.observers import MetricsObserver

    return [MetricsObserver(port)] if port is not None else []


def open_events(path: Path | None) -> TextIO | None:
    """Open the file of the event stream, where one is given: it stays open until the process ends."""
    try:
        return path.open("a") if path else None
    except OSError as error:
        raise UserError(f"--events {path} cannot be written: {error.strerror}") from error
