"""How a scan scales: N small images in a local S3 server, a stub scorer over HTTP, memory and throughput measured.

    python -m bench.scale_scan 10000
    python -m bench.scale_scan 100000
    python -m bench.scale_scan 1000000 --plan-only --json

Up to 100,000 objects the server is the embedded one (moto), which holds them all; above that `bench.s3_stub`, which
counts them. Each step runs in a process of its own. Printed: seconds, CPU-seconds and peak memory of each step,
and what the server alone gives to a client that does nothing but GET, beside what the scan got of it.
"""

import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from bench.images import encoded
from bench.s3_stub import S3Stub
from patchscan.common.processes import available_cpus
from patchscan.detector.card import Card
from patchscan.detector.presets import PatchPreset

BUCKET, PREFIXES, IMAGES, SIDE = "photos", 20, 100, 32
MOST_IN_MOTO = 100_000
CLIENTS, GETS = 8, 200
CARD = Card(name="stub", version="1", architecture="ssp", preset=PatchPreset(), weights_sha256="1" * 64)


@dataclass(frozen=True)
class Step:
    """One step of a scan: elapsed and CPU seconds of all its processes, and the peak memory of the largest."""

    name: str
    seconds: float
    cpu_s: float
    peak_mb: int


@dataclass(frozen=True)
class Scale:
    """The measurements: `requests` of the first scan; `gets_per_s`, the rate at which the S3 server answers a client
    that only reads; `objects_per_s`, the rate of the first scan's workers."""

    objects: int
    server: str
    gets_per_s: float
    objects_per_s: float | None
    steps: list[Step]
    requests: dict[str, int] = field(default_factory=dict)

    def table(self) -> str:
        """Format the figures for a terminal."""
        lines = [f"{self.objects:,} objects in {self.server}, {available_cpus()} cores"]
        lines += [f"{'step':<28}{'seconds':>9}{'CPU-s':>9}{'peak MB':>9}"]
        lines += [f"{one.name:<28}{one.seconds:>9.1f}{one.cpu_s:>9.1f}{one.peak_mb:>9}" for one in self.steps]
        if self.objects_per_s:
            lines.append(f"worked: {self.objects_per_s:.0f} objects/s; requests: {self.requests}")
        lines.append(f"the server alone: {self.gets_per_s:.0f} GET/s")
        return "\n".join(lines)


class Scorer(BaseHTTPRequestHandler):
    """Answers like the TorchServe handler, with a logit computed from the mean of the crops."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Type"] == "application/json":
            reply: dict[str, Any] = {"card": asdict(CARD), "takes": ["crops"]}
        else:
            crops = np.frombuffer(body[-(len(body) // 3072 * 3072) :], np.uint8).reshape(-1, 3072)
            reply = {"logits": [float(one.mean()) / 16 - 8 for one in crops], "digest": CARD.digest}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def serve(count: int) -> None:
    """Run the S3 server with a filled bucket, and the scorer; prints both ports."""
    pictures = [small_image(seed) for seed in range(IMAGES)]
    if count <= MOST_IN_MOTO:
        from moto.s3.models import s3_backends
        from moto.server import ThreadedMotoServer

        backend = s3_backends["123456789012"]["aws"]
        for name in (BUCKET, "results"):
            backend.create_bucket(name, "us-east-1")
        for number in range(count):
            backend.put_object(BUCKET, key_of(number, count), pictures[number % IMAGES])
        moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        moto.start()
        port = moto.get_host_and_port()[1]
    else:
        stub = S3Stub(count, pictures)
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        port = stub.server_address[1]
    scorer = ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    threading.Thread(target=scorer.serve_forever, daemon=True).start()
    print(json.dumps({"s3": port, "scorer": scorer.server_address[1]}), flush=True)
    sys.stdin.read()


def small_image(seed: int) -> bytes:
    """Make a PNG of SIDE x SIDE pixels: noise around a grey level chosen by the seed."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 40, (SIDE, SIDE, 3)) + random.integers(0, 200)
    return encoded(pixels.astype(np.uint8), "PNG")


def key_of(number: int, count: int) -> str:
    """Return the key of an object: in folders for moto, flat for the stub."""
    return f"{number % PREFIXES:02d}/{number:07d}.png" if count <= MOST_IN_MOTO else f"{number:09d}.png"


def gets_per_s(endpoint: str, count: int) -> float:
    """Measure how many GETs per second the S3 server answers to CLIENTS plain HTTP clients. Each gets GETS of the
    `count` objects, or all where there are fewer."""
    each = min(GETS, count)

    def read(first: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(endpoint).netloc)
        for number in range(first, first + each):
            connection.request("GET", f"/{BUCKET}/{key_of(number % count, count)}")
            connection.getresponse().read()

    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(read, range(0, CLIENTS * each, each)))
    return CLIENTS * each / (time.monotonic() - began)


def run(name: str, commands: list[list[str]]) -> tuple[Step, str]:
    """Run patchscan commands one after the other, each in a process. Returns their cost and the last one's output."""
    began, cpu_s, peak, text = time.monotonic(), 0.0, 0, ""
    for arguments in commands:
        with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
            command = [sys.executable, "-m", "patchscan", *arguments]
            process = subprocess.Popen(command, stdout=printed, stderr=errors)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = status
            for file in (printed, errors):
                file.seek(0)
            text = printed.read()
            if status:
                raise RuntimeError(f"{arguments} ended with {status}: {errors.read()[-2000:]}")
        cpu_s, peak = cpu_s + used.ru_utime + used.ru_stime, max(peak, used.ru_maxrss // 1024)
    return Step(name, round(time.monotonic() - began, 1), round(cpu_s, 1), peak), text


def scan(name: str, server: str, plan_only: bool) -> list[Step]:
    """Run a scan: plan, one worker process per shard, reduce."""
    scorer = ["--server", server, "--model", "stub"]
    planned, text = run(f"{name}: plan", [["scan-plan", f"s3://{BUCKET}", "--out", "s3://results/scale", *scorer]])
    if plan_only:
        return [planned]
    made = json.loads(text)
    shards = [["scan-worker", "--plan", made["plan"], "--index", str(one), *scorer] for one in range(made["shards"])]
    return [
        planned,
        run(f"{name}: work {len(shards)} shards", shards)[0],
        run(f"{name}: reduce", [["scan-reduce", "--plan", made["plan"]]])[0],
    ]


def measure(objects: int, plan_only: bool = False) -> Scale:
    """Measure a first scan of `objects` objects and a rescan with 1 % changed; with `plan_only` only the first plan."""
    import boto3

    command = [sys.executable, "-m", "bench.scale_scan", "serve", str(objects)]
    servers = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert servers.stdout
    before = dict(os.environ)
    try:
        ports = json.loads(servers.stdout.readline())
        endpoint, server = (f"http://127.0.0.1:{ports[name]}" for name in ("s3", "scorer"))
        os.environ |= {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "scale", "AWS_SECRET_ACCESS_KEY": "scale"}
        name, ceiling = "moto" if objects <= MOST_IN_MOTO else "bench.s3_stub", gets_per_s(endpoint, objects)
        steps = scan("first scan", server, plan_only)
        if plan_only:
            return Scale(objects, name, ceiling, None, steps)
        client = boto3.client("s3")

        def cost() -> dict[str, Any]:
            report = client.get_object(Bucket="results", Key="scale/report.json")["Body"].read()
            found: dict[str, Any] = json.loads(report)["cost"]
            return found

        requests = cost()["requests"]
        for number in range(0, objects, 100):
            client.put_object(Bucket=BUCKET, Key=key_of(number, objects), Body=small_image(1000 + number))
        again = scan("1 % changed", server, plan_only=False)
        return Scale(objects, name, ceiling, objects / steps[1].seconds, steps + again, requests)
    finally:
        os.environ.clear()
        os.environ.update(before)
        servers.kill()
        servers.communicate()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        scale = measure(int(sys.argv[1]), plan_only="--plan-only" in sys.argv)
        print(json.dumps(asdict(scale)) if "--json" in sys.argv else scale.table())
