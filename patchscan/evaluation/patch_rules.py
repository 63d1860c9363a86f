"""Measure the effect of the patch rule: the AUC of one detector with its patches chosen by each of the rules.

python -m patchscan.evaluation.patch_rules --run runs/ssp-lite --data DATA
"""

from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import pandas as pd
import torch
import typer

from patchscan.common.console import ProgressReport, say
from patchscan.dataset.commands import INDEX
from patchscan.dataset.index import load_index
from patchscan.dataset.source import DataSource
from patchscan.detector.detector import Detector
from patchscan.detector.images import decode
from patchscan.detector.patches import Rule, seed_from_pixels
from patchscan.detector.presets import PatchPreset
from patchscan.reporting.statistics import auc_interval

COUNTS = (1, 5, 16)
CANDIDATES = 30


def patch_rules(detector: Detector, data: str, index: pd.DataFrame) -> pd.DataFrame:
    """Return one row per rule, count and generator of the validation split: `rule`, `count`, `generator`, `auc`, `low`,
    `high` (95 %, DeLong). The weights stay the same; only the preset changes."""
    presets = [
        PatchPreset(rule=rule, count=count, candidates=CANDIDATES) for rule in get_args(Rule) for count in COUNTS
    ]
    source = DataSource(data)
    rows = index[index.split == "val"].reset_index(drop=True)
    logits = np.zeros((len(rows), len(presets)))
    with ProgressReport("patch rules", len(rows)) as progress:
        for number, path in enumerate(rows.path):
            rgb = decode(source.read(path)).rgb
            seed = seed_from_pixels(rgb)
            logits[number] = detector.logits([preset.crops(rgb, seed).pixels for preset in presets])
            progress.advance()
    table = []
    for column, preset in enumerate(presets):
        for generator, group in rows.groupby("generator"):
            label = (group["class"] == "ai").to_numpy().astype(int)
            estimate = auc_interval(label, logits[group.index, column])
            table.append((preset.rule, preset.count, generator, estimate.value, estimate.low, estimate.high))
    return pd.DataFrame(table, columns=["rule", "count", "generator", "auc", "low", "high"])


def main(
    run: Annotated[Path, typer.Option(help="Run folder of a detector that scores patches.")],
    data: Annotated[str, typer.Option(help="Data set in GenImage's layout, a folder or an s3:// URL.")],
    index: INDEX = None,
) -> None:
    """Print a Markdown table with the AUC of every patch rule with 1, 5 and 16 patches."""
    torch.set_num_threads(1)
    table = patch_rules(Detector.load(run), data, load_index(data, index))
    generators = sorted(table.generator.unique())
    say("| rule | patches | " + " | ".join(generators) + " |")
    say("| --- | --- |" + " --- |" * len(generators))
    for (rule, count), group in table.groupby(["rule", "count"], sort=False):
        cells = group.set_index("generator").loc[generators]
        shown = [f"{cell.auc:.3f} ({cell.low:.3f} to {cell.high:.3f})" for cell in cells.itertuples()]
        say(f"| {rule} | {count} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    typer.run(main)
