"""Images are decoded in child processes: what ends a decoder costs its own image, and nothing else."""

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from patchscan.detector.decoders import DecoderPool, NoDecoderError
from patchscan.detector.images import ImageError, Limits, decoded_bytes, webp_size
from patchscan.detector.prepared import prepare
from patchscan.detector.presets import PatchPreset
from tests.command import running
from tests.image_tree import ENCODINGS, picture
from tests.poisonous import (
    ABORT,
    CRASH,
    EAT,
    EXIT,
    HARMLESS,
    KILLED,
    KILLED_ONCE,
    POISONED,
    SLEEP,
    SPIN,
    bmp,
    memory_of_the_child,
    takes_more_and_leaves_a_circle,
    takes_more_than_is_reckoned,
    threads_of_a_product,
)

PRESET = PatchPreset(count=2)


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in POISONED.items():
            patch.setenv(name, value)
        made = DecoderPool(1)
        yield made
        while not made._idle.empty():
            if child := made._idle.get():
                child.end()


def answer(pool: DecoderPool, data: bytes, **options: Any) -> str:
    try:
        return str(pool.prepare(data, PRESET, **options).image["format"])
    except ImageError as error:
        return f"{error.code}: {error.message}"


@pytest.mark.parametrize(
    ("width", "why"),
    [
        (CRASH, "the decoder crashed (SIGSEGV)"),
        (ABORT, "the decoder crashed (SIGABRT)"),
        (SPIN, "decoding it took more than 1 s"),
        (SLEEP, "decoding it took more than 1 s"),
        (EAT, "decoding it takes more than 192 MB of memory"),
        (EXIT, "the decoder ended with code 3"),
        (KILLED, "the decoder was killed, probably for the memory that it took"),
    ],
)
def test_an_image_that_ends_its_decoder_costs_itself_alone(width: int, why: str, pool: DecoderPool) -> None:
    time_s = 1 if width in (SPIN, SLEEP) else 60
    assert answer(pool, bmp(width), time_s=time_s) == f"decoder_died: {why}"
    assert answer(pool, bmp(HARMLESS)) == "BMP"


def test_a_decoder_that_somebody_else_killed_gets_the_image_again(
    pool: DecoderPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(pool, bmp(ABORT))  # the next child sees the mark's name
    monkeypatch.setenv("POISON_MARK", str(tmp_path / "mark"))
    assert answer(pool, bmp(KILLED_ONCE)) == "BMP"
    assert (tmp_path / "mark").exists()


def test_children_that_cannot_start_are_no_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchscan.detector.decoders.START", "import a_package_that_was_removed")
    with pytest.raises(NoDecoderError, match=r"cannot start \(code 1\)"):
        DecoderPool(1).prepare(bmp(HARMLESS), PatchPreset())


def test_what_a_child_prepares_is_what_this_process_would(pool: DecoderPool) -> None:
    data = bmp(HARMLESS)
    ours, theirs = prepare(data, PRESET), pool.prepare(data, PRESET)
    assert (theirs.image, theirs.tier) == (ours.image, ours.tier)
    assert np.array_equal(theirs.crops.pixels, ours.crops.pixels)
    assert answer(pool, b"text") == "not_an_image: the bytes are not an image of any known format"
    with pytest.raises(ImageError, match="the limit is 10"):
        pool.prepare(data, PRESET, Limits(max_bytes=10))


@pytest.mark.parametrize("case", ENCODINGS)
def test_whole_images_stay_within_the_memory_that_is_reckoned(case: str, pool: DecoderPool) -> None:
    mode, kind, options = ENCODINGS[case]
    image = Image.fromarray(np.tile(picture(5, 160, 160), (10, 10, 1)))
    image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) << 8) if "16" in mode else image.convert(mode)
    file, held = io.BytesIO(), []
    image.save(file, kind, **options)

    def hold(needed: int) -> contextlib.AbstractContextManager[None]:
        held.append(needed)
        return contextlib.nullcontext()

    assert pool.prepare(file.getvalue(), PRESET, hold=hold).image["width"] == 1600
    assert held == [decoded_bytes(file.getvalue())] == [pool.decoded_bytes(file.getvalue())]


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 5}, {"quality": 5, "exif": b"Exif\0\0"}])
def test_a_large_webp_is_reckoned_without_its_pixels(options: dict[str, Any]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8000, 7999), "red").save(file, "WEBP", method=0, **options)
    assert webp_size(file.getvalue()) == (8000, 7999)
    assert decoded_bytes(file.getvalue()) == 8000 * 7999 * 16 + len(file.getvalue())
    assert decoded_bytes(file.getvalue(), Limits(max_pixels=10**6)) == 0


def test_what_is_broken_leaves_no_memory_to_the_next() -> None:
    """An exception held the pixels, and the next large image was refused memory for them."""
    pool, file = DecoderPool(1), io.BytesIO()
    Image.new("RGB", (6000, 6000), "red").save(file, "PNG", compress_level=1)
    [before] = pool.run(memory_of_the_child, bmp(HARMLESS), Limits())
    assert answer(pool, file.getvalue()[:-2000]).startswith("truncated")
    [after] = pool.run(memory_of_the_child, bmp(HARMLESS), Limits())
    assert after < before + 64 * 2**20
    assert answer(pool, file.getvalue()) == "PNG"


def test_an_image_that_takes_more_than_is_reckoned_is_not_told_of_as_damaged(pool: DecoderPool) -> None:
    whole, other = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (6000, 6000), "red").save(whole, "TIFF", compression="tiff_deflate", strip_size=10**9)
    Image.new("RGB", (6000, 6000), "red").save(other, "PNG", compress_level=1)
    for work in (takes_more_than_is_reckoned, takes_more_and_leaves_a_circle):
        assert pool.run(work, whole.getvalue(), Limits()) == "decoded"
    with pytest.raises(ImageError, match="damaged"):  # its decoder tells what it lacks
        pool.run(takes_more_than_is_reckoned, other.getvalue(), Limits())


def test_a_child_computes_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLAS's waiting threads took seven times as long as an image."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    pool = DecoderPool(1)
    assert pool.run(threads_of_a_product, bmp(HARMLESS), Limits()) == [1]


def test_a_child_asks_for_no_new_memory_for_each_small_image() -> None:
    """The kernel took a quarter of an image's time to give pages, and to take them back."""
    pool, preset = DecoderPool(1), PatchPreset(count=32)

    def faults(number: int) -> int:
        file = io.BytesIO()
        Image.fromarray(picture(number % 4, 375, 500)).save(file, "JPEG")
        pool.prepare(file.getvalue(), preset)
        return int(Path(f"/proc/{pool._started[0]._process.pid}/stat").read_text().rpartition(")")[2].split()[7])

    counts = [faults(number) for number in range(16)]
    assert counts[-1] - counts[4] < 1000  # 4,700 where memory is given back after each


def test_no_child_outlives_its_parent_for_long() -> None:
    script = """
import sys, threading
from patchscan.detector.decoders import DecoderPool
from patchscan.detector.presets import PatchPreset
from tests.poisonous import HARMLESS, SPIN, bmp
pool = DecoderPool(1)
pool.prepare(bmp(HARMLESS), PatchPreset())
print("begins", flush=True)
pool.prepare(bmp(SPIN), PatchPreset(), time_s=3)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, **POISONED}
    ) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == "begins\n"
        (child,) = psutil.Process(parent.pid).children()
        time.sleep(0.5)
        parent.kill()
    assert running(child.pid)
    deadline = time.monotonic() + 30
    while running(child.pid):
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.1)
