"""The memory that is reckoned for decoding is the memory that decoding takes, in every format."""

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.image_tree import ENCODINGS, picture
from tests.jpegs import three_scans

SIDE = 1600
# For each line, the names of a small and a large file, a process of its own that has decoded nothing before.
MEASURE = """
import os, sys
from pathlib import Path
from patchscan.detector.images import decode, decoded_bytes
def field(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024
def measure(small, large):
    data = Path(large).read_bytes()
    decode(Path(small).read_bytes())  # imports and the decoder's own buffers
    before = field("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    decode(data)
    print(field("VmHWM") - before, decoded_bytes(data), flush=True)
for line in sys.stdin:
    if (child := os.fork()) == 0:
        measure(*line.split())
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("died", flush=True)
"""


@pytest.fixture(scope="module")
def measuring() -> Iterator[subprocess.Popen[str]]:
    """The process that measures, which imports the decoders once."""
    command = [sys.executable, "-c", MEASURE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        yield process


def saved(case: str, pixels: np.ndarray) -> bytes:
    """The picture as one of ENCODINGS."""
    mode, kind, options = ENCODINGS[case]
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8) if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", compression="zlib", **options)
    return file.getvalue()


OTHERS: dict[str, Callable[[np.ndarray], bytes]] = {
    "JPEG of three scans": three_scans,
    "TIFF of one strip": lambda pixels: tiff(pixels, rowsperstrip=len(pixels)),
    "TIFF of one tile": lambda pixels: tiff(pixels, tile=pixels.shape[:2]),
    "TIFF of one strip of 16 bits": lambda pixels: tiff(pixels.astype(np.uint16) << 8, rowsperstrip=len(pixels)),
    "TIFF of planes": lambda pixels: tiff(
        np.moveaxis(pixels, 2, 0), planarconfig="separate", rowsperstrip=pixels.shape[0]
    ),
    "turned TIFF": lambda pixels: tiff(pixels, extratags=[(274, 3, 1, 6, True)]),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the process's peak memory is read from /proc")
@pytest.mark.parametrize("case", [*ENCODINGS, *OTHERS])
def test_decoding_takes_no_more_than_is_reckoned(case: str, measuring: subprocess.Popen[str], tmp_path: Path) -> None:
    pixels = np.tile(picture(5, 160, 160), (SIDE // 160, SIDE // 160, 1))
    encode = OTHERS.get(case) or partial(saved, case)
    (tmp_path / "large").write_bytes(encode(pixels))
    (tmp_path / "small").write_bytes(encode(pixels[:64, :64]))
    assert measuring.stdin
    assert measuring.stdout
    measuring.stdin.write(f"{tmp_path / 'small'} {tmp_path / 'large'}\n")
    taken, reckoned = (int(number) for number in measuring.stdout.readline().split())
    # The interpreter's own growth is a megabyte or two.
    assert taken <= reckoned + 4 * 2**20
    assert reckoned <= 2.5 * taken
