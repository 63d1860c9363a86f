"""Measure end to end: encoded images through `patchscan serve` (gate and TorchServe) to JSON, and scans from S3 to
Parquet, compared with the model alone and with SSP's official method on the same images."""

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import psutil
import urllib3

from bench.rounds import Recorder, Settings, alternate
from bench.s3_servers import s3_server
from bench.workers import Job, WorkerPool
from patchscan.common.errors import UserError
from patchscan.scanning.plan import ScanSource
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.scorers import Select, ServerSettings, TorchServeScorer
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.serving.archive import archive
from patchscan.storage import open_store
from patchscan.storage.embedded_s3 import EmbeddedS3

BUCKET, RESULTS = "bench", "bench-results"
# Two full batches per worker: one being scored, one waiting.
CLIENTS_PER_WORKER = 16
MODEL, SERVED, SCAN = "model alone", "served", "scanned"
SERVER_DECODES, OFFICIAL = "scanned, --select server", "official way"
WITHOUT_S3 = "scanned, without the S3 server's work"


def names(settings: Settings) -> list[str]:
    """Every row of the end to end section."""
    found = []
    for model in settings.served:
        found += [f"{model}: {name}" for name in (MODEL, SERVED, SCAN, SERVER_DECODES, WITHOUT_S3)]
        found += [f"{model}: {way} / {MODEL}" for way in (SERVED, SCAN, WITHOUT_S3)]
        if model == "ssp":
            ratios = (f"{way} / {OFFICIAL}" for way in (MODEL, SERVED, SCAN))
            found += [f"{model}: {one}" for one in (OFFICIAL, *ratios)]
    if {"ssp", "ssp-lite"} <= set(settings.served):
        found += ["ssp-lite / ssp, served", f"ssp-lite, served / {OFFICIAL} with ssp"]
    return found


def scaling_names() -> list[str]:
    """Every row that `measure` adds to the section on scaling."""
    return ["1 worker, served", "all workers, served", "all workers / 1 worker"]


@dataclass(frozen=True)
class Server:
    """A running `patchscan serve`: its address, the file with its inference token, and its process id."""

    url: str
    keys: Path
    pid: int


@contextmanager
def serving(store: Path, name: str, scratch: Path, workers: int) -> Iterator[Server]:
    """`patchscan serve` on one archive, as a process."""
    options = [name, "--workers", str(workers), "--scratch", str(scratch), "--model-store", str(store)]
    for address in ("--inference", "--management", "--metrics"):
        options += [address, "127.0.0.1:0"]
    command = [sys.executable, "-m", "patchscan", "serve", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        said = process.stdout.readline()
        if not said:
            raise UserError("patchscan serve did not start")
        line = json.loads(said)
        yield Server(line["inference"], Path(line["keys"]), process.pid)
    finally:
        process.terminate()
        process.wait()


class Load:
    """Clients that post the images in turn, enough of them to keep all workers busy."""

    def __init__(self, server: Server, model: str, images: list[bytes], workers: int):
        self.server, self.path, self.images = server, f"/predictions/{model}", images
        self.clients = CLIENTS_PER_WORKER * workers

    def rate(self, seconds: float) -> float:
        """Measure answers per second over `seconds`, or over as many answers as there are clients if that takes longer.

        The measurement starts once every client has had an answer and ends with an answer, because the answers of a
        batch arrive together.
        """
        turn, stop, refused = itertools.count(), threading.Event(), list[int]()
        answered: list[list[float]] = [[] for _ in range(self.clients)]

        def post(client: int) -> None:
            token = json.loads(self.server.keys.read_text())["inference"]["key"]
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "image/jpeg"}
            with urllib3.connection_from_url(self.server.url, headers=headers, timeout=120, retries=False) as http:
                while not stop.is_set():
                    reply = http.urlopen("POST", self.path, body=self.images[next(turn) % len(self.images)])
                    if reply.status != 200:
                        refused.append(reply.status)
                        return
                    answered[client].append(time.perf_counter())

        threads = [threading.Thread(target=post, args=(client,)) for client in range(self.clients)]
        for thread in threads:
            thread.start()
        while not all(answered) and _all_alive(threads):
            time.sleep(0.01)
        began, before = time.perf_counter(), sum(map(len, answered))
        while time.perf_counter() - began < seconds or sum(map(len, answered)) - before < self.clients:
            if not _all_alive(threads):
                stop.set()
                raise UserError(f"{self.server.url} does not answer, or answers with an error: {refused[:1]}")
            time.sleep(0.01)
        counted = [moment for moments in answered for moment in moments if moment > began]
        stop.set()
        for thread in threads:
            thread.join()
        return len(counted) / (max(counted) - began)


def _all_alive(threads: list[threading.Thread]) -> bool:
    return all(thread.is_alive() for thread in threads)


class Scan:
    """Scans of one bucket with one served model; each scan is new and writes its own results.

    `rates_without_s3`: the rates of scans with default settings, less the CPU time of the S3 server, which in practice
    runs on another machine.
    """

    def __init__(self, server: Server, model: str, s3: EmbeddedS3, objects: int, cores: int):
        self.server, self.model, self.s3, self.objects, self.cores = server, model, s3, objects, cores
        self.rates_without_s3: list[float] = []
        self._runs = itertools.count()

    def fill(self, images: list[bytes]) -> None:
        """Put the objects into the bucket."""
        self.s3.client().create_bucket(Bucket=RESULTS)
        fill_bucket(self.s3, BUCKET, images, self.objects)

    def rate(self, select: Select | None = None) -> float:
        """Measure objects per second, from the listing to the last shard's Parquet file."""
        settings = ServerSettings(url=self.server.url, model=self.model, token_file=self.server.keys)
        with patch.dict("os.environ", self.s3.environment):
            scorer = TorchServeScorer(settings)
            out = open_store(f"s3://{RESULTS}/{self.model}-{next(self._runs)}")
            began, store_s = time.perf_counter(), cpu_s(self.s3.process.pid)
            made = plan_scan(ScanRequest(source=ScanSource(url=f"s3://{BUCKET}"), card=scorer.card), out)
            worker = Worker(made, out, scorer, WorkSettings(select=select))
            for index in range(made.shards):
                worker.work(index)
            elapsed, store_s = time.perf_counter() - began, cpu_s(self.s3.process.pid) - store_s
            scorer.close()
        if select is None:
            self.rates_without_s3.append(made.listed / (elapsed - store_s / self.cores))
        return made.listed / elapsed


def fill_bucket(s3: EmbeddedS3, bucket: str, images: list[bytes], objects: int) -> None:
    """Make a bucket of this many objects, the images in turn."""
    client = s3.client()
    client.create_bucket(Bucket=bucket)
    for number in range(objects):
        client.put_object(Bucket=bucket, Key=f"{number:06d}.jpg", Body=images[number % len(images)])


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and of all its descendants until now."""
    process = psutil.Process(pid)
    used = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(one.user + one.system for one in used))


def measure(
    settings: Settings,
    per_core: WorkerPool,
    default: WorkerPool,
    runs: dict[str, Path],
    images: list[bytes],
    cores: int,
    folder: Path,
) -> list[Recorder]:
    """Compare each served model with the same model alone; measure the scaling of the last one."""
    recorder, scaling = Recorder("end to end"), Recorder("scaling")
    served: dict[str, list[float]] = {}
    official: list[float] = []
    store = folder / "store"
    for model in settings.served:
        name = archive(runs[model], store, engine="onnx").stem
        alone = partial(per_core.rate, Job("onnx", runs[model]), settings.serving_seconds)
        with serving(store, name, folder / f"serve-{model}", cores) as server, s3_server() as s3:
            load = Load(server, name, images, cores)
            objects = max(settings.scanned, int(settings.serving_seconds * load.rate(settings.seconds)))
            scan = Scan(server, name, s3, objects, cores)
            scan.fill(images)
            contenders: dict[str, Callable[[], float]] = {
                MODEL: alone,
                SERVED: partial(load.rate, settings.serving_seconds),
                SCAN: scan.rate,
                SERVER_DECODES: partial(scan.rate, select="server"),
            }
            if model == "ssp":
                contenders[OFFICIAL] = partial(default.rate, Job("official", runs[model]), settings.serving_seconds)
            values = alternate(contenders, settings.rounds)
            values[WITHOUT_S3] = scan.rates_without_s3[-settings.rounds :]
            _record(recorder, model, values)
            served[model] = values[SERVED]
            official = values.get(OFFICIAL, official)
            if settings.scaling and model == settings.served[-1]:
                with serving(store, name, folder / "serve-one", 1) if cores > 1 else nullcontext(server) as one:
                    _scaling(settings, scaling, load, Load(one, name, images, 1))
    if {"ssp", "ssp-lite"} <= served.keys():
        recorder.ratio("ssp-lite / ssp, served", served["ssp-lite"], served["ssp"], at_least=10)
        recorder.ratio(f"ssp-lite, served / {OFFICIAL} with ssp", served["ssp-lite"], official)
    return [recorder, scaling]


def _record(recorder: Recorder, model: str, values: dict[str, list[float]]) -> None:
    for name, rates in values.items():
        recorder.add(f"{model}: {name}", "images/s", rates)
    for way, aim in ((SERVED, 0.95), (SCAN, 0.90), (WITHOUT_S3, 0.90)):
        recorder.ratio(f"{model}: {way} / {MODEL}", values[way], values[MODEL], at_least=aim)
    if OFFICIAL in values:
        recorder.ratio(f"{model}: {MODEL} / {OFFICIAL}", values[MODEL], values[OFFICIAL])
        for way in (SERVED, SCAN):
            recorder.ratio(f"{model}: {way} / {OFFICIAL}", values[way], values[OFFICIAL], at_least=4)


def _scaling(settings: Settings, recorder: Recorder, load: Load, one: Load) -> None:
    """Measure the effect of the number of workers."""
    contenders: dict[str, Callable[[], float]] = {
        "1 worker, served": partial(one.rate, settings.serving_seconds),
        "all workers, served": partial(load.rate, settings.serving_seconds),
    }
    values = alternate(contenders, settings.rounds)
    for name, rates in values.items():
        recorder.add(name, "images/s", rates)
    recorder.ratio("all workers / 1 worker", values["all workers, served"], values["1 worker, served"])
