"""Makes Pillow's BMP decoder fail on pictures of certain sizes, in every process whose PYTHONPATH names this folder."""

import ctypes
import os
import signal
import time
from typing import Any

from PIL import BmpImagePlugin

load = BmpImagePlugin.BmpImageFile.load


def take_all_memory() -> None:
    """Take memory and write to it, until there is none."""
    taken = []
    while True:
        taken.append(b"x" * 2**24)


def killed_once() -> None:
    """Kill this process with the first picture, and no other: the mark says that it has been done."""
    if not os.path.exists(os.environ["POISON_MARK"]):  # noqa: PTH110
        os.mkdir(os.environ["POISON_MARK"])  # noqa: PTH102
        killed()


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def spin() -> None:
    while True:
        pass


# By the widths of tests/poisonous.py.
DEEDS = {
    101: lambda: ctypes.string_at(0),
    102: os.abort,
    103: spin,
    104: lambda: time.sleep(10**6),
    105: take_all_memory,
    106: lambda: os._exit(3),
    107: killed,
    108: killed_once,
}


def poisoned(image: BmpImagePlugin.BmpImageFile) -> Any:
    """Decode a picture, or do what its size says."""
    if image.height == 61 and image.width in DEEDS:
        DEEDS[image.width]()
    return load(image)


BmpImagePlugin.BmpImageFile.load = poisoned  # type: ignore[method-assign, assignment]
