"""Measure, write build/bench.json, print the tables.

python -m bench                      everything, under 20 minutes on 2 cores (`make bench`)
python -m bench --quick              two minutes (`make bench-quick`)
python -m bench --data DIR           on your own images (GenImage's layout also judges int8)
python -m bench --listed 100000      also list and scan so many objects with a stub scorer; may be repeated
python -m bench --table FILE         the tables of a bench.json as Markdown; --schema: that file's JSON Schema
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench import decoding, gpu, modelling, scaling, serving, training
from bench.crew import ours_and_theirs
from bench.images import scored_images
from bench.results import Bench, Machine, markdown, show
from bench.rounds import FULL, QUICK, Recorder, Settings
from bench.runs import run_folder
from patchscan.common.errors import UserError
from patchscan.common.proxies import bypass_for_loopback

OUT = Path("build/bench.json")


def known_rows(settings: Settings) -> set[str]:
    """The name of every row that a bench with these settings may write."""
    sections = (decoding, modelling, serving, scaling, training, gpu)
    return {name for section in sections for name in section.names(settings)} | set(serving.scaling_names())


def bench(settings: Settings, data: Path | None) -> Bench:
    """Run every section. Raises UserError where something is missing (Java, images)."""
    machine, began = Machine.here(), time.monotonic()
    images, what = scored_images(data, settings.images)
    recorders: list[Recorder] = []
    with tempfile.TemporaryDirectory(prefix="patchscan-bench-") as name:
        folder = Path(name)
        models = dict.fromkeys((*settings.models, *settings.served))
        runs = {model: run_folder(model, folder / "runs") for model in models}
        say("decode")
        recorders.append(decoding.measure(settings))
        with ours_and_theirs(images, machine.cores) as (ours, theirs):
            say("model")
            alone = {model: runs[model] for model in settings.models}
            recorders.append(modelling.measure(settings, ours, theirs, alone, data, folder))
            say("end to end")
            recorders += serving.measure(settings, ours, theirs, runs, images, machine.cores, folder)
        say("scaling")
        recorders.append(scaling.measure(settings, folder / "indexed"))
        say("training")
        recorders.append(training.measure(settings, folder / "trained"))
        recorders.append(gpu.measure(settings, runs))
    return Bench(
        settings=settings.name,
        images=what,
        machine=machine,
        seconds=time.monotonic() - began,
        figures=[figure for one in recorders for figure in one.figures],
        not_run=[left_out for one in recorders for left_out in one.not_run],
    )


def say(section: str) -> None:
    """Which section begins, for whoever waits."""
    print(f"bench: {section} ...", file=sys.stderr, flush=True)


def main() -> None:
    """The command line; exit code 2 and one line where something is missing."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--listed", type=int, action="append", default=[])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", type=Path, metavar="FILE")
    parser.add_argument("--schema", action="store_true")
    asked = parser.parse_args()
    bypass_for_loopback()
    if asked.schema:
        print(json.dumps(Bench.model_json_schema(), indent=1))
    elif asked.table:
        print(markdown(Bench.model_validate_json(asked.table.read_text())))
    else:
        settings = QUICK if asked.quick else FULL
        try:
            done = bench(replace(settings, listed=(*settings.listed, *asked.listed)), asked.data)
        except UserError as error:
            sys.exit(f"bench: {error}")
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(done.model_dump_json(indent=1) + "\n")
        show(done)
        print(f"written: {asked.out}")


if __name__ == "__main__":
    main()
