"""A long mixed load on `patchscan serve`, workers killed all the while: `python -m tests.soak --minutes 5`.

Good images, damaged and hostile ones, at saturation; every request must end in an answer, if need be after retries,
and a good image's answer must always have the same bits. Prints one JSON object; exit code 1 where that failed.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from demo.sample import hostile_files
from tests.serving_kit import Served, png

CLIENTS = 16
TRIES = 40


class Load:
    """Clients that send at saturation until told to stop, and what became of it."""

    def __init__(self, served: Served):
        self.served = served
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.statuses: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.first: dict[int, str] = {}
        self.hostile = [(file.data, file.expected) for file in hostile_files()]

    def client(self, number: int) -> None:
        """One client: two good images for each hostile file."""
        random_ = random.Random(number)
        with self.served.client() as http:
            while not self.stop.is_set():
                seed = random_.randrange(200)
                self._send(http, png(seed), 200, seed)
                self._send(http, png(seed + 1), 200, seed + 1)
                data, expected = random_.choice(self.hostile)
                self._send(http, data, 200 if expected is None else 422, None)

    def _send(self, http: httpx.Client, data: bytes, wanted: int, seed: int | None) -> None:
        started = time.monotonic()
        for attempt in range(TRIES):
            try:
                reply = http.put("/predictions/tiny", content=data)
                status = str(reply.status_code)
            except httpx.HTTPError as error:
                status = type(error).__name__
            with self.lock:
                self.statuses[status] += 1
            if status in ("200", "422"):
                break
            time.sleep(min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1))
        with self.lock:
            self.seconds.append(time.monotonic() - started)
            if status != str(wanted):
                self.outcomes[f"wrong: {status} for {wanted}"] += 1
            elif seed is not None and self.first.setdefault(seed, reply.text) != reply.text:
                self.outcomes["wrong: other bits"] += 1
            else:
                self.outcomes["answered" if attempt == 0 else "answered after retries"] += 1


def processes(pid: int) -> dict[int, str]:
    """Every process below `pid`: its command line."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            line = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
            found |= {int(child): line} | processes(int(child))
    return found


def memory(pid: int) -> dict[str, int]:
    """Resident MiB of the gate, Java, and the workers together."""

    def resident(one: int) -> int:
        text = Path(f"/proc/{one}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) // 1024 if "VmRSS:" in text else 0

    below = processes(pid)
    java = sum(resident(one) for one, line in below.items() if "ModelServer" in line)
    workers = sum(resident(one) for one, line in below.items() if "model_service_worker" in line)
    return {"gate": resident(pid), "java": java, "workers": workers}


def kill_a_worker(served: Served) -> None:
    """SIGKILL to one of the workers."""
    workers = [one for one, line in processes(served.pid).items() if "model_service_worker" in line]
    if workers:
        os.kill(random.choice(workers), signal.SIGKILL)


def soak(minutes: float, kill_every_s: float) -> dict[str, Any]:
    """Run the load; returns the figures."""
    with tempfile.TemporaryDirectory(prefix="patchscan-soak-") as folder:
        served = Served.start(Path(folder), workers=2)
        load = Load(served)
        threads = [threading.Thread(target=load.client, args=(number,)) for number in range(CLIENTS)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        kills, samples = 0, []
        while time.monotonic() - started < minutes * 60:
            time.sleep(min(kill_every_s, 10))
            samples.append({"s": round(time.monotonic() - started), **memory(served.pid)})
            if (time.monotonic() - started) // kill_every_s > kills:
                kill_a_worker(served)
                kills += 1
        load.stop.set()
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - started
        code = served.stop()
    ordered = sorted(load.seconds)
    return {
        "minutes": round(elapsed / 60, 1),
        "clients": CLIENTS,
        "cpus": os.cpu_count(),
        "requests": len(ordered),
        "requests_per_s": round(len(ordered) / elapsed, 1),
        "outcomes": dict(load.outcomes),
        "statuses_with_retries": dict(load.statuses),
        "workers_killed": kills,
        "seconds_median_95_max": [round(ordered[int(len(ordered) * part)], 2) for part in (0.5, 0.95)]
        + [round(ordered[-1], 2)],
        "memory_mib": samples[:: max(1, len(samples) // 6)],
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
