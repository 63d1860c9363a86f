"""Measure decoding and choosing the patch, compared with SSP's official method and with decoding alone."""

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
# The size for which the official method is compared: decoding takes the smallest share of the time here.
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
    """Measure milliseconds of CPU time per image by size and format, and the ratios of the methods."""
    recorder = Recorder("decode")
    for size in settings.sizes:
        for kind in KINDS:
            data = encoded(photograph(0, *size), kind)
            image = f"{size[0]} x {size[1]} {kind}"
            ways = {"ours": ours, "official": simplest, "decode alone": decode_alone}
            contenders = {way: timed(run, data, settings.seconds / 10) for way, run in ways.items()}
            values = alternate(contenders, 2 * settings.rounds)
            for way in WAYS:
                recorder.add(f"{image}: {way}", "ms", values[way])
            recorder.ratio(f"{image}: ours / decode alone", values["ours"], values["decode alone"], at_most=1.15)
            wanted = 5.0 if size == SMALL else None
            recorder.ratio(f"{image}: official / ours", values["official"], values["ours"], at_least=wanted)
    return recorder


def ours(data: bytes) -> object:
    """Decode and choose the patch, as a scan does."""
    pillow = decode(data).pillow
    return simplest_patch(pillow, seed=seed_from_pixels(pillow))


def decode_alone(data: bytes) -> object:
    """Decode with Pillow and do nothing else."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def timed(run: Callable[[bytes], object], data: bytes, seconds: float) -> Callable[[], float]:
    """Return a function that measures milliseconds of CPU time per call. Other work on the machine affects it less than
    elapsed time."""

    def measure() -> float:
        count, began = 0, time.process_time()
        while (elapsed := time.process_time() - began) < seconds or not count:
            run(data)
            count += 1
        return 1000 * elapsed / count

    return measure
