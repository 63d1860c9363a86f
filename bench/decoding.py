"""Decode and choose the patch: ours against the official way and against decoding alone."""

import io
import time
from collections.abc import Callable

from PIL import Image

from bench.images import encoded, photograph
from bench.official import simplest
from bench.rounds import Recorder, Settings, alternate
from patchscan.detector.images import decode
from patchscan.detector.patches import seed_from_pixels, simplest_patch

WAYS = ("ours", "official", "decode alone")
KINDS = ("JPEG", "PNG")
# The share of the patch in the whole of a 256 x 256 image, where decoding hides the least.
SMALL = (256, 256)


def names(settings: Settings) -> list[str]:
    """Every row of this section."""
    found = []
    for size in settings.sizes:
        for kind in KINDS:
            image = f"{size[0]} x {size[1]} {kind}"
            found += [f"{image}: {way}" for way in WAYS] + [f"{image}: ours / decode alone"]
            found += [f"{image}: official / ours"]
    return found


def measure(settings: Settings) -> Recorder:
    """Milliseconds of CPU an image, by size and format; ratios of the ways."""
    recorder = Recorder("decode")
    for size in settings.sizes:
        for kind in KINDS:
            data = encoded(photograph(0, *size), kind)
            image = f"{size[0]} x {size[1]} {kind}"
            ways = {"ours": ours, "official": simplest, "decode alone": decode_alone}
            contenders = {way: _timed(run, data, settings.seconds / 10) for way, run in ways.items()}
            values = alternate(contenders, 2 * settings.rounds)
            for way in WAYS:
                recorder.add(f"{image}: {way}", "ms", values[way])
            recorder.ratio(f"{image}: ours / decode alone", values["ours"], values["decode alone"], at_most=1.15)
            wanted = 5.0 if size == SMALL else None
            recorder.ratio(f"{image}: official / ours", values["official"], values["ours"], at_least=wanted)
    return recorder


def ours(data: bytes) -> object:
    """Bytes to the chosen patch, as every scan does it."""
    pillow = decode(data).pillow
    return simplest_patch(pillow, seed=seed_from_pixels(pillow))


def decode_alone(data: bytes) -> object:
    """Pillow's pixels, and nothing done with them."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def _timed(run: Callable[[bytes], object], data: bytes, seconds: float) -> Callable[[], float]:
    """CPU time, which is elapsed time on a quiet machine: one thread does it all, and other work costs it less."""

    def measure() -> float:
        count, began = 0, time.process_time()
        while (elapsed := time.process_time() - began) < seconds or not count:
            run(data)
            count += 1
        return 1000 * elapsed / count

    return measure
