"""Images on which the decoder crashes, hangs or takes all memory: each costs a scan one rejected row and no more."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from patchscan.storage import open_store
from tests.command import PATCHSCAN, environment, patchscan
from tests.poisonous import ABORT, CRASH, EAT, POISONED, SLEEP, SPIN, bmp
from tests.scan_kit import image, scan_names, stub_server, table_of

TIME_LIMIT = {"patchscan.detector.decoders.TIME_S": 10}
DIED = {
    "abort.bmp": "the decoder crashed (SIGABRT)",
    "crash.bmp": "the decoder crashed (SIGSEGV)",
    "eat.bmp": "decoding it takes more than 192 MB of memory",
    "sleep.bmp": "decoding it took more than 10 s",
    "spin.bmp": "decoding it took more than 10 s",
}


@pytest.fixture(scope="module")
def scorer() -> Iterator[list[str]]:
    """The options that name a scorer."""
    with stub_server() as options:
        yield options


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(image(number))
    for name, width in {"abort": ABORT, "crash": CRASH, "eat": EAT, "sleep": SLEEP, "spin": SPIN}.items():
        (folder / f"{name}.bmp").write_bytes(bmp(width))
    return folder


def rows_of(out: Path) -> dict[str, Any]:
    store = open_store(str(out))
    return table_of(store, scan_names(store)[-1])


def messages(rows: dict[str, Any]) -> dict[str, str]:
    return {key: row["error_message"] for key, row in rows.items() if row["error_code"] == "decoder_died"}


def test_a_scan_with_poisonous_images_ends_in_one_go(photos: Path, tmp_path: Path, scorer: list[str]) -> None:
    poisoned = environment() | POISONED
    done = patchscan("scan", photos, "--out", tmp_path / "out", *scorer, constants=TIME_LIMIT, env=poisoned)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "out")
    assert messages(rows) == DIED
    assert [key for key, row in sorted(rows.items()) if row["status"] == "scored"] == [f"{n}.png" for n in range(6)]
    assert all(rows[key]["status"] == "rejected" for key in DIED)


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group of this many bytes; skips the test where this user may make none."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    path = {kind: path for _, kinds, path in lines for kind in kinds.split(",")}
    version1 = "memory" in path
    parent = Path("/sys/fs/cgroup/memory" if version1 else "/sys/fs/cgroup")
    group = parent / path["memory" if version1 else ""].lstrip("/") / f"patchscan-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"this user may make no control group ({error})")
    try:
        try:
            (group / ("memory.limit_in_bytes" if version1 else "memory.max")).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"this user may not limit memory ({error})")
        yield group
    finally:
        deadline = time.monotonic() + 30
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        group.rmdir()


def test_a_worker_of_a_gigabyte_survives_what_takes_more(photos: Path, tmp_path: Path, scorer: list[str]) -> None:
    """A WebP of 38 bytes that takes a gigabyte, and a decoder that takes all that it gets."""
    for name in ("sleep", "spin"):
        (photos / f"{name}.bmp").unlink()
    Image.new("RGB", (8000, 8000), "red").save(photos / "one colour.webp", lossless=True, method=0, quality=0)
    plan = json.loads(patchscan("scan-plan", photos, "--out", tmp_path / "out", *scorer).stdout)["plan"]
    worker = [PATCHSCAN, "scan-worker", "--plan", plan, "--index", "0", *scorer]
    with memory_group(2**30) as group:
        inside = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *worker]
        done = subprocess.run(inside, env=environment() | POISONED, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out")
    died = messages(rows)
    assert "about 977 MB of memory, more than there is" in died.pop("one colour.webp")
    assert died == {key: DIED[key] for key in ("abort.bmp", "crash.bmp", "eat.bmp")}
    assert sum(row["status"] == "scored" for row in rows.values()) == 6
