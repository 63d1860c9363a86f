"""SIGTERM to `patchscan serve`. This module's name sorts last among those that share the server: it ends it."""

import threading
import time
from pathlib import Path

import httpx

from tests.serving_kit import Served, png, tar_of


def test_sigterm_answers_what_is_in_flight_and_ends_everything(served: Served) -> None:
    body = tar_of({f"{number}.png": png(number, 1000, 1000) for number in range(12)})
    replies: list[httpx.Response] = []
    with served.client() as client:
        sender = threading.Thread(target=lambda: replies.append(client.put("/predictions/tiny", content=body)))
        sender.start()
        while sender.is_alive() and served.metrics()["patchscan_requests_in_flight{}"] < 1:
            time.sleep(0.02)
        processes = children(served.pid)
        assert served.stop() == 0
        sender.join()
    assert replies[0].status_code == 200
    assert len(replies[0].json()["answers"]) == 12
    assert len(processes) >= 2  # Java and a worker
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]


def children(pid: int) -> list[int]:
    """Every process below this one."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *children(int(child))]
    return found
