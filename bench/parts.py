"""What an image costs beside its model, step by step: `python -m bench.parts [RUN]`, a table in Markdown.

Milliseconds of CPU time of one thread. A decoding process of a scan does the steps from decoding with limits to the
watermark, the scan's own process looks for marks of origin. RUN: whose crops are cut, by default `model_store/starter`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from threadpoolctl import threadpool_limits

from bench.decoding import decode_alone, timed
from bench.images import encoded, photograph
from bench.rounds import alternate
from patchscan.detector.card import Card
from patchscan.detector.graphic import is_graphic
from patchscan.detector.images import decode, decoded_bytes
from patchscan.detector.patches import seed_from_pixels
from patchscan.detector.prepared import prepare
from patchscan.detector.presets import Preset
from patchscan.detector.tier import estimate_tier
from patchscan.detector.watermark import watermark
from patchscan.scanning.provenance import provenance

SIZES = ((256, 256), (500, 375), (1920, 1080), (4000, 3000))
ROUNDS, SECONDS = 5, 0.3


def steps(data: bytes, preset: Preset) -> dict[str, Callable[[bytes], object]]:
    """The steps by name, on encoded bytes; the steps after decoding use an image that is decoded once."""
    image = decode(data)
    return {
        "decoding alone (Pillow)": decode_alone,
        "memory it will take": decoded_bytes,
        "decoding with limits": decode,
        "seed and crops": lambda _: preset.crops(image.pillow, seed_from_pixels(image.pillow)),
        "tier": lambda _: estimate_tier(image.pillow),
        "graphic": lambda _: is_graphic(image.pillow),
        "watermark": lambda _: watermark(image.pillow, image.jpeg_quality),
        "decoding with limits to watermark": lambda one: prepare(one, preset),
        "marks of origin": lambda one: provenance(one, image.format, None),
    }


def main(run: Path) -> None:
    """Print the medians of the rounds."""
    preset = Card.read(run).preset
    columns = []
    for size in SIZES:
        data = encoded(photograph(0, *size), "JPEG")
        contenders = {name: timed(step, data, SECONDS) for name, step in steps(data, preset).items()}
        with threadpool_limits(1):  # as in the processes that decode
            found = alternate(contenders, ROUNDS)
        columns.append({name: median(values) for name, values in found.items()})
    print(f"| step, ms | {' | '.join(f'{width} x {height}' for width, height in SIZES)} |")
    print(f"| --- |{' --- |' * len(SIZES)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(f'{column[name]:.2f}' for column in columns)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "model_store/starter"))
