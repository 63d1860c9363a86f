"""Hostile files by the thousand, for the places that read strangers' bytes: see targets.py.

    python -m tests.fuzz decoder --minutes 10
    python -m tests.fuzz verifier --minutes 10 --seed 3
    python -m tests.fuzz decoder --case 4711              one case again, in this process, with its traceback

Each case is a real file with a change along its structure (structures.py), some random ones, or both, drawn from seed
and number alone. A case must end in an answer or in the error that users get (ImageError, UserError, RequestError);
anything else is a finding, as is more than 1.5 GB of memory, 10 s, or the CPU time that a file of its size may take.
Findings are printed with their number and kept in build/fuzz; the exit code is 1 where there is one.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.fuzz.runner import fuzz
from tests.fuzz.targets import TARGETS


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


if __name__ == "__main__":  # the processes that it starts import this module
    main()
