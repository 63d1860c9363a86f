"""Hostile files by the thousand, for the places that read strangers' bytes: see targets.py.

    python -m tests.fuzz decoder --minutes 10
    python -m tests.fuzz verifier --minutes 10 --seed 3
    python -m tests.fuzz decoder --case 4711              one case again, in this process, with its traceback

Each case is a real file with a change along its structure (structures.py), some random ones, or both, drawn from seed
and number alone. A case must end in an answer or in the error that users get (ImageError, UserError, RequestError);
anything else is a finding, as is more than 1 GB of memory, 10 s, or the CPU time that a file of its size may take.
Findings are printed with their number and kept in build/fuzz; the exit code is 1 where there is one.
"""

import argparse
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Generator
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz.targets import TARGETS, Target

OUT = Path("build/fuzz")
SECONDS, MEGABYTES = 10.0, 1024
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
