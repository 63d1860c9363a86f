"""Is it the patch or the filters? Train variants of SSP alike, each with one part changed, and compare them.

    python -m bench.ablation --data genmix --seen ldm_laion,dalle_mini --unseen dalle3,sd_v2_1 --out build/ablation

SSP itself takes hours for each variant, so a small network stands in for it: that of ssp-lite, 78,753 parameters, on
one 32 x 32 patch an image. All see the same images in the same order, for as many steps, with ssp-lite's optimiser. OUT
holds a run folder for each variant, and the report; the same command goes on after an interruption.
"""

import argparse
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

from patchscan.common.console import say
from patchscan.detector.card import CARD_FILE, WEIGHTS_FILE, Card
from patchscan.detector.device import Precision
from patchscan.detector.models import ARCHITECTURES, SSPLite
from patchscan.detector.onnx_export import write_graph
from patchscan.detector.patches import Rule
from patchscan.detector.presets import PatchPreset
from patchscan.evaluation.evaluate import Options, evaluate
from patchscan.reporting.pages import show_estimate
from patchscan.training.recipe import load_recipe
from patchscan.training.train import train

EPOCHS = 30
CANDIDATES = 30
COUNTS = (5, 16)


class WithoutFilters(SSPLite):
    """The same network on the patch's normalised pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.ZeroPad2d(-2)  # type: ignore[assignment]  # the border that the filters take away
        first = self.stem[0]
        assert isinstance(first, nn.Conv2d)  # a Sequential forgets what it holds
        self.stem[0] = nn.Conv2d(3, first.out_channels, 3, padding=1, bias=False)


class Enlarged(SSPLite):
    """The same network on the noise maps of the patch enlarged to 256 x 256, as SSP does."""

    def penultimate(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 32, 32) to features (n, 64)."""
        return super().penultimate(F.interpolate(x, size=(256, 256), mode="bilinear", align_corners=False))


@dataclass(frozen=True)
class Variant:
    """The rule by which the patch is chosen, in training and after it, and the network."""

    rule: Rule
    network: type[SSPLite] = SSPLite


VARIANTS = {
    "simplest": Variant("simplest"),
    "random": Variant("random"),
    "most-complex": Variant("most_complex"),
    "grid": Variant("grid"),
    "simplest-unfiltered": Variant("simplest", WithoutFilters),
    "random-unfiltered": Variant("random", WithoutFilters),
    "simplest-enlarged": Variant("simplest", Enlarged),
}
# Also scored with more patches than they were trained on.
MORE_PATCHES = ("simplest", "random")


def train_variant(
    name: str,
    data: str,
    out: Path,
    overrides: dict[str, Any],
    device: str | None = None,
    precision: Precision | None = None,
) -> list[Path]:
    """Train a variant, unless OUT has it. Returns its run folder, and those with more patches."""
    variant, run = VARIANTS[name], out / name
    preset = PatchPreset(rule=variant.rule, candidates=CANDIDATES, count=1)
    recipe = load_recipe("ssp-lite-ablation", name=name, preset=preset, train_crops=1, window=None, **overrides)
    with patch.dict(ARCHITECTURES, {"ssp-lite": variant.network}):
        if not (run / CARD_FILE).exists():
            train(recipe, data, str(run), device=device, precision=precision)
        more = COUNTS if name in MORE_PATCHES else ()
        return [run, *(_with_patches(run, count) for count in more)]


def _with_patches(run: Path, count: int) -> Path:
    """A copy of a run folder that scores `count` patches."""
    copy, card = run.with_name(f"{run.name}-{count}"), Card.read(run)
    copy.mkdir(exist_ok=True)
    shutil.copy(run / WEIGHTS_FILE, copy / WEIGHTS_FILE)
    assert isinstance(card.preset, PatchPreset)
    replace(card, name=copy.name, preset=replace(card.preset, count=count)).write(copy)
    write_graph(copy)
    return copy


def table(report: dict[str, Any]) -> list[str]:
    """The report's mean AUCs as Markdown: a row for each run, as stored and as the web delivers."""
    lines: list[str] = []
    for model in report["models"]:
        rows = [row for row in model["scoreboard"][0]["rows"] if row["kind"] == "group"]
        if not lines:
            titles = [f"{row['name']}, {tier}" for row in rows for tier in row["tiers"]]
            lines = [f"| variant | {' | '.join(titles)} |", f"| --- |{' --- |' * len(titles)}"]
        cells = [show_estimate(estimate["auc"], "3") for row in rows for estimate in row["tiers"].values()]
        lines.append(f"| {model['name']} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="bench.ablation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", type=Path)
    parser.add_argument("--seen", required=True, help="generators to train on, separated by commas")
    parser.add_argument("--unseen", required=True, help="generators kept for evaluation, separated by commas")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="default: all; simplest-enlarged takes long",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is a GPU)")
    parser.add_argument("--precision", choices=get_args(Precision), help="see docs/train.md (default: bf16 on a GPU)")
    arguments = parser.parse_args()
    overrides = {"seen": arguments.seen.split(","), "unseen": arguments.unseen.split(","), "epochs": arguments.epochs}
    how = (overrides, arguments.device, arguments.precision)
    runs = [run for name in arguments.variants for run in train_variant(name, arguments.data, arguments.out, *how)]
    options = Options(engine="onnx", tiers=("native", "web"), sources=arguments.sources)
    report = evaluate(runs, {Path(arguments.data).name: arguments.data}, arguments.out / "report", options)
    for line in table(report):
        say(line)


if __name__ == "__main__":
    main()
