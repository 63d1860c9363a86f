"""The memory that is reckoned for decoding is the memory that decoding takes, in every format."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.image_tree import ENCODINGS, picture

SIDE = 1600
MEASURE = """
import io, sys
from patchscan.detector.images import decode, decoded_bytes
def field(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024
small = int(sys.argv[1])
data = sys.stdin.buffer.read()
data, small = data[:-small], data[-small:]
decode(small)  # imports and the decoder's own buffers
before = field("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
decode(data)
print(field("VmHWM") - before, decoded_bytes(data))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the process's peak memory is read from /proc")
@pytest.mark.parametrize("case", ENCODINGS)
def test_decoding_takes_no_more_than_is_reckoned(case: str) -> None:
    mode, kind, options = ENCODINGS[case]
    pixels = np.tile(picture(5, 160, 160), (SIDE // 160, SIDE // 160, 1))
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8) if mode == "I;16" else image.convert(mode)
    large, small = io.BytesIO(), io.BytesIO()
    image.save(large, kind, **options)
    image.crop((0, 0, 64, 64)).save(small, kind, **options)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(len(small.getvalue()))],
        input=large.getvalue() + small.getvalue(),
        capture_output=True,
        check=True,
    )
    taken, reckoned = (int(number) for number in run.stdout.split())
    # The interpreter's own growth is a megabyte or two.
    assert taken <= reckoned + 4 * 2**20
    assert reckoned <= 2.5 * taken
