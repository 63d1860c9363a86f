"""The memory that is reckoned for decoding is the memory that decoding takes, in every format."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.image_tree import ENCODINGS, picture

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


@pytest.mark.skipif(sys.platform != "linux", reason="the process's peak memory is read from /proc")
@pytest.mark.parametrize("case", ENCODINGS)
def test_decoding_takes_no_more_than_is_reckoned(case: str, measuring: subprocess.Popen[str], tmp_path: Path) -> None:
    mode, kind, options = ENCODINGS[case]
    pixels = np.tile(picture(5, 160, 160), (SIDE // 160, SIDE // 160, 1))
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "large", kind, **options)
    image.crop((0, 0, 64, 64)).save(tmp_path / "small", kind, **options)
    assert measuring.stdin
    assert measuring.stdout
    measuring.stdin.write(f"{tmp_path / 'small'} {tmp_path / 'large'}\n")
    taken, reckoned = (int(number) for number in measuring.stdout.readline().split())
    # The interpreter's own growth is a megabyte or two.
    assert taken <= reckoned + 4 * 2**20
    assert reckoned <= 2.5 * taken
