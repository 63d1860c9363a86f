"""How a scan scales: N small images in the embedded S3, a stub scorer over HTTP, memory and throughput measured.

    python -m tests.scale_scan 100000

Prints one JSON object: seconds and peak memory of plan, work and reduce, S3 requests, and of a rescan with 1 % changed.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from tests.scan_kit import card, image

BUCKET, PREFIXES, IMAGES = "photos", 20, 100


class Scorer(BaseHTTPRequestHandler):
    """Answers as the TorchServe handler does, with the mean of the crops for a logit."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Type"] == "application/json":
            reply: dict[str, Any] = {"card": asdict(card()), "takes": ["crops"]}
        else:
            crops = np.frombuffer(body[-(len(body) // 3072 * 3072) :], np.uint8).reshape(-1, 3072)
            reply = {"logits": [float(one.mean()) / 16 - 8 for one in crops], "digest": card().digest}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def serve(count: int) -> None:
    """The S3 server with its bucket filled directly, and the scorer; prints both addresses."""
    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer

    backend = s3_backends["123456789012"]["aws"]
    for name in (BUCKET, "results"):
        backend.create_bucket(name, "us-east-1")
    pictures = [image(seed, side=32) for seed in range(IMAGES)]
    for number in range(count):
        backend.put_object(BUCKET, f"{number % PREFIXES:02d}/{number:07d}.png", pictures[number % IMAGES])
    s3 = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    s3.start()
    scorer = ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    threading.Thread(target=scorer.serve_forever, daemon=True).start()
    print(json.dumps({"s3": s3.get_host_and_port()[1], "scorer": scorer.server_address[1]}), flush=True)
    sys.stdin.read()


def step(arguments: list[str]) -> tuple[dict[str, Any], str]:
    """Run one patchscan command; its seconds, CPU-seconds and peak memory, and what it printed."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen([sys.executable, "-c", "import cli; cli.main()", *arguments], stdout=printed)
        _, status, used = os.wait4(process.pid, 0)
        printed.seek(0)
        text = printed.read()
    if status:
        raise SystemExit(f"{arguments} ended with {status}")
    seconds = time.monotonic() - began
    return {
        "s": round(seconds, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": used.ru_maxrss // 1024,
    }, text


def scan(server: str) -> dict[str, Any]:
    """Plan, work every shard in one process each, reduce."""
    scorer = ["--server", server, "--model", "stub"]
    measured: dict[str, Any] = {}
    measured["plan"], text = step(["scan-plan", f"s3://{BUCKET}", "--out", "s3://results/scale", *scorer])
    made = json.loads(text)
    works = [
        step(["scan-worker", "--plan", made["plan"], "--index", str(index), *scorer])[0]
        for index in range(made["shards"])
    ]
    measured["plan"] |= {name: made[name] for name in ("shards", "listed", "unchanged")}
    measured["work"] = {
        "s": round(sum(one["s"] for one in works), 1),
        "cpu_s": round(sum(one["cpu_s"] for one in works), 1),
        "peak_mb_of_each_shard": [one["peak_mb"] for one in works],
    }
    measured["reduce"], _ = step(["scan-reduce", "--plan", made["plan"]])
    return measured


def main(count: int) -> None:
    """Measure a first scan and a rescan with 1 % changed."""
    import boto3

    servers = subprocess.Popen(
        [sys.executable, "-m", "tests.scale_scan", "serve", str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert servers.stdout
    ports = json.loads(servers.stdout.readline())
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    os.environ |= {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_ACCESS_KEY_ID": "scale", "AWS_SECRET_ACCESS_KEY": "scale"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    server = f"http://127.0.0.1:{ports['scorer']}"
    results = {"objects": count, "first": scan(server)}
    client = boto3.client("s3")
    for number in range(0, count, 100):
        client.put_object(
            Bucket=BUCKET, Key=f"{number % PREFIXES:02d}/{number:07d}.png", Body=image(1000 + number, side=32)
        )
    results["rescan, 1 % changed"] = scan(server)
    report = client.get_object(Bucket="results", Key="scale/report.json")["Body"].read()
    results["report"] = {name: json.loads(report)[name] for name in ("totals", "cost")}
    print(json.dumps(results, indent=1))
    servers.kill()
    servers.communicate()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        main(int(sys.argv[1]))
