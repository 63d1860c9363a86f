"""Run the cases of a target in processes of their own, and keep what they find."""

import multiprocessing
import random
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Generator
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz.targets import TARGETS, Target

OUT = Path("build/fuzz")
# The largest picture that is read takes 1,016 MB, and an earlier one may still be held by what it raised.
SECONDS, MEGABYTES = 10.0, 1536
START_S = 600.0  # to import and to make the samples
FINDING = "finding"


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
            outcome = outcome_of(target, data)
            if peak_megabytes() - before > MEGABYTES:
                outcome = f"{FINDING}: {peak_megabytes() - before:.0f} MB"
            told.send((number, outcome))
            if outcome.endswith(" MB"):
                return
            number += 1


def outcome_of(target: Target, data: bytes) -> str:
    """What became of a case; a finding where it raised what it should not, or took too much CPU time for its size."""
    before = time.process_time()
    try:
        outcome = target.run(data)
    except Exception:  # noqa: BLE001  whatever it is, it is a finding
        return f"{FINDING}: " + traceback.format_exc()
    took = time.process_time() - before
    if took > target.cpu_s + target.cpu_s_a_megabyte * len(data) / 2**20:
        return f"{FINDING}: {took:.1f} s of CPU time for {len(data):,} bytes"
    return outcome


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


def outcomes_of_process(name: str, seed: int, first: int, end: float) -> Generator[tuple[int, str], None, None]:
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
