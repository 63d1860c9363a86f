"""Hostile files by the thousand, for the two places that read strangers' bytes: the decoder and the archive verifier.

    python -m tests.fuzz decoder --minutes 10
    python -m tests.fuzz verifier --minutes 10 --seed 3
    python -m tests.fuzz decoder --case 4711              one case again, in this process, with its traceback

Each case is a real file with a few random mutations, drawn from seed and number alone. A case must end in an answer or
in the error that users get (ImageError, UserError); anything else is a finding, as is more than 1 GB of memory or 10 s
for one file. Findings are printed with their number and kept in build/fuzz; the exit code is 1 where there is one.
"""

import argparse
import io
import json
import multiprocessing
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchscan.common.errors import UserError
from patchscan.detector.card import CARD_FILE, WEIGHTS_FILE, Card
from patchscan.detector.images import ImageError
from patchscan.detector.prepared import prepare
from patchscan.detector.presets import PatchPreset, Preset, WholeImagePreset
from tests.image_tree import picture

OUT = Path("build/fuzz")
SECONDS, MEGABYTES = 10.0, 1024
START_S = 600.0  # to import and to make the samples
FINDING = "finding"
NUMBERS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    1e308,
    float("nan"),
    2**63,
    10**30,
    "",
    "x",
    "../x",
    "\0",
    [],
    {},
    [[]],
    {"kind": "ensemble"},
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Decoder:
    """Bytes of every format, to the crops of a patch model and of a whole-image model."""

    def __init__(self, folder: Path):
        cards: dict[str, Preset] = {"ssp": PatchPreset(), "simplecnn": WholeImagePreset()}
        self.cards = [
            Card(name="x", version="1", architecture=name, preset=preset, weights_sha256="")
            for name, preset in cards.items()
        ]
        photo = Image.fromarray(picture(7, 160, 120))
        frames = [photo.rotate(180), photo.rotate(90)]
        deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
        animation: dict[str, Any] = {"save_all": True, "append_images": frames}
        self.samples = [
            encoded(photo, "JPEG"),
            encoded(photo, "JPEG", progressive=True),
            encoded(photo, "MPO", **animation),
            encoded(photo.convert("CMYK"), "JPEG"),
            *(
                encoded(one, "PNG")
                for one in (photo, deep, photo.quantize(64), photo.convert("RGBA"), photo.convert("1"))
            ),
            encoded(photo, "PNG", **animation),
            *(encoded(photo, "WEBP", lossless=lossless, **animation) for lossless in (False, True)),
            encoded(photo, "WEBP"),
            encoded(photo, "GIF", **animation),
            *(
                encoded(photo, "TIFF", compression=kind)
                for kind in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits")
            ),
            encoded(deep, "TIFF"),
            encoded(photo.copy(), "TIFF", save_all=True, append_images=[photo.rotate(180)]),
            encoded(photo, "BMP"),
            encoded(photo.quantize(16), "BMP"),
            encoded(photo, "AVIF"),
            encoded(photo, "HEIF"),
            encoded(Image.new("RGB", (100_000, 8), "grey"), "PNG"),
        ]

    def case(self, draw: random.Random) -> bytes:
        """One hostile file."""
        data = mutated(draw.choice(self.samples), draw, self.samples)
        return with_checksums(data) if draw.random() < 0.7 else data

    def run(self, data: bytes) -> str:
        """What became of it: `scored`, or the error's code."""
        for card in self.cards:
            try:
                prepare(data, card.preset)
            except ImageError as error:
                return str(error.code)
        return "scored"


class Verifier:
    """Archives whose members or raw bytes were tampered with, some of them with all digests made to fit again."""

    def __init__(self, folder: Path):
        from patchscan.serving.archive import archive
        from tests.serving_kit import tiny_run

        self.good = archive(tiny_run(folder / "run"), folder / "store").read_bytes()
        with zipfile.ZipFile(io.BytesIO(self.good)) as mar:
            self.members = {name: mar.read(name) for name in mar.namelist()}
        self.file = folder / "case.mar"

    def case(self, draw: random.Random) -> bytes:
        """One hostile archive."""
        return with_weights_named(self._tampered(draw))

    def _tampered(self, draw: random.Random) -> bytes:
        members = dict(self.members)
        if draw.random() < 0.2:
            return mutated(self.good, draw, [b"PK\x01\x02", b"PK\x05\x06" + bytes(18)], tail=draw.random() < 0.5)
        if draw.random() < 0.5:
            members[CARD_FILE] = self._other_card(members[CARD_FILE], draw)
        if draw.random() < 0.3:
            members[WEIGHTS_FILE] = mutated(members[WEIGHTS_FILE], draw, [], head=2000)
        if draw.random() < 0.3:
            name = draw.choice(["MAR-INF/MANIFEST.json", "golden/answers.json", "golden/noise.bmp"])
            members[name] = mutated(members[name], draw, [])
        if draw.random() < 0.1:
            del members[draw.choice(sorted(members))]
        if draw.random() < 0.1:
            members[draw.choice(["../x", "/x", "x.py", "detector/x.py", "é\0", "x/"])] = b"x"
        return packed(members)

    def _other_card(self, text: bytes, draw: random.Random) -> bytes:
        """The card with a value or two replaced anywhere in it."""
        card = json.loads(text)
        for _ in range(draw.randint(1, 2)):
            place = card
            while True:
                key = draw.choice(sorted(place))
                if isinstance(place[key], dict) and place[key] and draw.random() < 0.8:
                    place = place[key]
                else:
                    break
            place[key] = deepcopy(draw.choice(VALUES))
        return json.dumps(card).encode()

    def run(self, data: bytes) -> str:
        """What became of it: `verified`, or the error's first words."""
        from patchscan.serving.verify import verify

        self.file.write_bytes(data)
        try:
            verify(self.file)
        except UserError as error:
            return type(error).__name__
        return "verified"


TARGETS: dict[str, Callable[[Path], Decoder | Verifier]] = {"decoder": Decoder, "verifier": Verifier}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file of this format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def mutated(data: bytes, draw: random.Random, others: list[bytes], head: int = 0, tail: bool = False) -> bytes:
    """The bytes with one to eight changes; within the first `head` bytes or the last 2,000 where that is asked."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        end = min(len(found), head) if head else len(found)
        # Headers are where decisions are made.
        place = draw.randrange(min(end, 64) if draw.random() < 0.3 else end) if end else 0
        place = max(0, len(found) - 1 - draw.randrange(2000)) if tail else place
        span = draw.choice((1, 2, 4, 16, 256, 4096))
        kind = draw.randrange(7)
        if kind == 0 and found:
            found[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            code = draw.choice(("B", "<H", ">H", "<I", ">I"))
            value = draw.choice(NUMBERS) & (256 ** struct.calcsize(code) - 1)
            found[place : place + struct.calcsize(code)] = struct.pack(code, value)
        elif kind == 2:
            del found[place : place + span]
        elif kind == 3:
            found[place:place] = found[place : place + span] * draw.choice((1, 2, 50))
        elif kind == 4:
            found[place:place] = draw.randbytes(span)
        elif kind == 5 and draw.random() < 0.3:
            del found[place:]
        elif kind == 6 and others:
            other = draw.choice(others)
            start = draw.randrange(len(other))
            found[place : place + span] = other[start : start + span]
    return bytes(found)


def with_checksums(data: bytes) -> bytes:
    """A PNG's chunks with sums that fit, so that what was changed in them is read; other bytes as they are."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    found, place = bytearray(data), len(PNG_SIGNATURE)
    while place + 12 <= len(found):
        (length,) = struct.unpack_from(">I", found, place)
        end = place + 8 + length
        if end + 4 > len(found):
            break
        struct.pack_into(">I", found, end, zlib.crc32(found[place + 4 : end]))
        place = end + 4
    return bytes(found)


def packed(members: dict[str, bytes]) -> bytes:
    """The members as a stored zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as mar:
        for name, data in members.items():
            mar.writestr(zipfile.ZipInfo(name), data)
    return file.getvalue()


def with_weights_named(data: bytes) -> bytes:
    """The archive with the digest of its weights on its card, as whoever tampers with them would do; other bytes, and
    one archive in two, as they are."""
    if zlib.crc32(data) % 2:
        return data
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as mar:
            members = {name: mar.read(name) for name in mar.namelist()}
        card = json.loads(members[CARD_FILE])
        card["weights_sha256"] = sha256(members[WEIGHTS_FILE]).hexdigest()
        members[CARD_FILE] = json.dumps(card).encode()
    except Exception:  # noqa: BLE001  it no longer is such an archive
        return data
    return packed(members)


def work(name: str, seed: int, first: int, told: Connection) -> None:
    """In a process of its own: the cases from `first` on, until one takes too much memory; tells each one's outcome."""
    with tempfile.TemporaryDirectory(prefix="patchscan-fuzz-") as folder:
        target = TARGETS[name](Path(folder))
        target.run(target.case(random.Random("warm up")))
        before = peak_megabytes()
        number = first
        while True:
            data = target.case(random.Random(f"{seed} {number}"))
            told.send((number, None))
            try:
                outcome = target.run(data)
            except Exception:  # noqa: BLE001  whatever it is, it is a finding
                outcome = f"{FINDING}: " + traceback.format_exc()
            if peak_megabytes() - before > MEGABYTES:
                outcome = f"{FINDING}: {peak_megabytes() - before:.0f} MB"
            told.send((number, outcome))
            if outcome.endswith(" MB"):
                return
            number += 1


def peak_megabytes() -> float:
    """The most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(name: str, minutes: float, seed: int) -> int:
    """Cases until the time is up; returns how many were findings."""
    outcomes: Counter[str] = Counter()
    first, end = 0, time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        for number, outcome in outcomes_of_process(name, seed, first, end):
            first = number + 1
            if outcome.startswith(FINDING):
                keep(name, seed, number, outcome)
            outcomes[FINDING if outcome.startswith(FINDING) else outcome] += 1
    print(f"{name}, seed {seed}: {outcomes.total():,} cases, {dict(outcomes.most_common())}")
    return outcomes[FINDING]


def outcomes_of_process(name: str, seed: int, first: int, end: float) -> Iterator[tuple[int, str]]:
    """Each case's number and outcome from one process, until the time or the process ends; how it ended is one too."""
    told, tells = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=work, args=(name, seed, first, tells))
    process.start()
    tells.close()
    number, patience = first, START_S
    try:
        while time.monotonic() < end:
            if not told.poll(patience):
                yield number, f"{FINDING}: no end after {patience:.0f} s"
                return
            try:
                number, outcome = told.recv()
            except EOFError:
                process.join()
                yield number, f"{FINDING}: the process ended with {process.exitcode}"
                return
            patience = SECONDS
            if outcome is not None:
                yield number, outcome
                if outcome.endswith(" MB"):
                    return
    finally:
        process.kill()
        process.join()


def keep(name: str, seed: int, number: int, outcome: str) -> None:
    """Say what was found and where its file is."""
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = TARGETS[name](Path(folder)).case(random.Random(f"{seed} {number}"))
    file = OUT / f"{name}-{seed}-{number}"
    file.write_bytes(data)
    print(f"{file}: {outcome.strip().splitlines()[-1]}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="Only this case.")
    asked = parser.parse_args()
    if asked.case is None:
        sys.exit(fuzz(asked.target, asked.minutes, asked.seed) > 0)
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[asked.target](Path(folder))
        print(target.run(target.case(random.Random(f"{asked.seed} {asked.case}"))))


if __name__ == "__main__":
    main()
