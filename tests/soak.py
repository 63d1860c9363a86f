"""A long mixed load on `patchscan serve`, workers killed all the while: `python -m tests.soak --minutes 20`.

Good images of several kinds, damaged and hostile requests, at saturation; every request must end in the answer it
deserves, if need be after retries, and a good request's answer must always have the same bits. Prints one JSON object
with the memory at the start and at each quarter's end; exit code 1 where a request was not answered so.
"""

import argparse
import base64
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image

from demo.sample import hostile_files
from tests.serving_kit import Served, encoded, picture, png, tar_of, zip_of

CLIENTS = 16
TRIES = 40
# More than the gate waits for TorchServe (125 s), so that it is the gate that says so.
CLIENT_TIMEOUT_S = 150
# Replies after which a client tries again, as docs/serve.md says.
AGAIN = {"500", "503", "504", "507"}
SAMPLE_EVERY_S = 5


@dataclass(frozen=True)
class Ask:
    """One request and the status it deserves; `good` ones must be answered with the same bits every time."""

    name: str
    body: bytes
    wanted: int = 200
    kind: str = "application/octet-stream"
    path: str = "/predictions/tiny"
    headers: dict[str, str] = field(default_factory=dict)
    good: bool = False


def good_asks() -> list[Ask]:
    """Images raw, as base64, in a tar and in a zip."""
    asks = [Ask(f"png {seed}", png(seed), good=True) for seed in range(160)]
    asks += [
        Ask(f"jpeg {seed}", encoded(Image.fromarray(picture(seed, 500, 375)), "JPEG"), good=True) for seed in range(30)
    ]
    text = json.dumps({"data": base64.b64encode(png(1)).decode()}).encode()
    members = {f"{seed}.png": png(seed) for seed in range(6)}
    asks += [Ask("json", text, kind="application/json", good=True), Ask("tar", tar_of(members), good=True)]
    return [*asks, Ask("zip", zip_of(members), good=True)]


def hostile_asks() -> list[Ask]:
    """Damaged files, bombs, malformed requests, wrong tokens and paths."""
    asks = [Ask(file.name, file.data, 422 if file.expected else 200) for file in hostile_files()]
    return [
        *asks,
        Ask("zip bomb", zip_of({f"{number}.png": bytes(33 * 2**20) for number in range(9)}), 400),
        Ask("damaged zip", b"PK\x03\x04 no zip", 400),
        Ask("damaged json", b'{"data": 7}', 400, kind="application/json"),
        Ask("wrong token", png(1), 401, headers={"Authorization": "Bearer wrong"}),
        Ask("another path", png(1), 404, path="/models/tiny"),
        Ask("unknown model", png(1), 404, path="/predictions/none"),
        Ask("too many bytes", bytes(46 * 2**20), 413, headers={"Expect": "100-continue"}),
    ]


class Load:
    """Clients that send at saturation until told to stop, and what became of it."""

    def __init__(self, served: Served):
        self.served = served
        self.good, self.hostile = good_asks(), hostile_asks()
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.statuses: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.first: dict[str, str] = {}

    def client(self, number: int) -> None:
        """One client: two good requests for each hostile one."""
        random_ = random.Random(number)
        with self.served.client() as http:
            http.timeout = httpx.Timeout(CLIENT_TIMEOUT_S)
            while not self.stop.is_set():
                for ask in (*random_.choices(self.good, k=2), random_.choice(self.hostile)):
                    self._send(http, ask)

    def _send(self, http: httpx.Client, ask: Ask) -> None:
        started = time.monotonic()
        for attempt in range(TRIES):
            try:
                reply = http.put(ask.path, content=ask.body, headers={"Content-Type": ask.kind} | ask.headers)
                status, text = str(reply.status_code), reply.text
            except httpx.HTTPError as error:
                # Too large a body is refused, and the connection closed, while it is still being sent.
                refused = ask.wanted == 413 and isinstance(error, httpx.WriteError | httpx.ReadError)
                status, text = "413" if refused else type(error).__name__, ""
            with self.lock:
                self.statuses[status] += 1
            if status.isdecimal() and status not in AGAIN:
                break
            time.sleep(min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1))
        with self.lock:
            self.seconds.append(time.monotonic() - started)
            if status != str(ask.wanted):
                self.outcomes[f"wrong: {status} for {ask.name}"] += 1
            elif ask.good and self.first.setdefault(ask.name, text) != text:
                self.outcomes["wrong: other bits"] += 1
            else:
                self.outcomes["answered" if attempt == 0 else "answered after retries"] += 1


def processes(served: Served) -> dict[str, list[psutil.Process]]:
    """The gate's process, Java's, and the workers'."""
    gate = psutil.Process(served.pid)
    found: dict[str, list[psutil.Process]] = {"gate": [gate], "java": [], "workers": []}
    for one in gate.children(recursive=True):
        try:
            line = " ".join(one.cmdline())
        except psutil.Error:  # it ended just now
            continue
        kind = "java" if "ModelServer" in line else "workers" if "model_service_worker" in line else None
        if kind:
            found[kind].append(one)
    return found


def memory(served: Served) -> dict[str, int]:
    """Resident MiB of each kind of process; a worker that ends meanwhile counts nothing."""

    def resident(one: psutil.Process) -> int:
        try:
            return int(one.memory_info().rss) // 2**20
        except psutil.Error:
            return 0

    return {kind: sum(resident(one) for one in group) for kind, group in processes(served).items()}


def quarters(samples: list[dict[str, int]]) -> dict[str, dict[str, int]]:
    """The first sample, and each quarter's median: medians, because a worker that was just killed is small."""
    size = max(1, len(samples) // 4)
    parts = {f"quarter {number + 1}": samples[number * size : (number + 1) * size] for number in range(4)}
    medians = {
        name: {kind: round(statistics.median(one[kind] for one in part)) for kind in part[0]}
        for name, part in parts.items()
        if part
    }
    return {"start": samples[0], **medians}


def soak(minutes: float, kill_every_s: float) -> dict[str, Any]:
    """Run the load; returns the figures."""
    with tempfile.TemporaryDirectory(prefix="patchscan-soak-") as folder:
        served = Served.start(Path(folder), workers=2)
        load = Load(served)
        threads = [threading.Thread(target=load.client, args=(number,), daemon=True) for number in range(CLIENTS)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        kills, samples = 0, [memory(served)]
        while (elapsed := time.monotonic() - started) < minutes * 60:
            if elapsed // kill_every_s > kills and (workers := processes(served)["workers"]):
                os.kill(random.choice(workers).pid, signal.SIGKILL)
                kills += 1
            time.sleep(SAMPLE_EVERY_S)
            samples.append(memory(served))
        load.stop.set()
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - started
        code = served.stop()
    ordered = sorted(load.seconds)
    at = quarters(samples)
    return {
        "minutes": round(elapsed / 60, 1),
        "clients": CLIENTS,
        "cpus": os.cpu_count(),
        "requests": len(ordered),
        "requests_per_s": round(len(ordered) / elapsed, 1),
        "outcomes": dict(load.outcomes),
        "statuses_with_retries": dict(load.statuses),
        "workers_killed": kills,
        "seconds_median_95_max": [
            round(ordered[min(len(ordered) - 1, int(len(ordered) * part))], 2) for part in (0.5, 0.95, 1)
        ],
        "memory_mib": at,
        "growth_from_quarter_2_to_4": {
            kind: f"{at['quarter 4'][kind] / at['quarter 2'][kind] - 1:+.1%}" for kind in at["start"]
        },
        "exit_code": code,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--kill-every-s", type=float, default=60)
    options = parser.parse_args()
    figures = soak(options.minutes, options.kill_every_s)
    print(json.dumps(figures, indent=1))
    sys.exit(any(outcome.startswith("wrong") for outcome in figures["outcomes"]) or figures["exit_code"] != 0)
